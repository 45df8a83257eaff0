"""decoder_layers: one layer at a time computes what the whole model does, in float32, and leaves the weights as they are."""

import pytest
import torch
from test_families import make_twin

from slmake.export.decoder_layers import DecoderLayers


@pytest.mark.parametrize("name", ["llama", "phi3-long", "gemma", "gemma3", "smollm3", "granite", "lfm2"])
def test_the_last_layers_states_are_the_models_own(tmp_path, name):
    from transformers import AutoModelForCausalLM

    make_twin(name, tmp_path / "model").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    weights = {key: value.clone() for key, value in network.get_decoder().layers.state_dict().items()}
    ids = torch.randint(2, 500, (2, 2, 80), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 2, 80, dtype=torch.bool)
    mask[1, 1, 30:] = False
    layers = DecoderLayers(network, torch.device("cpu"), tmp_path)
    with torch.inference_mode():
        for index in (None, *range(len(layers.layers))):
            with layers.loaded(index) as module:
                assert all(value.dtype == torch.float32 for value in module.parameters())
                for number in range(2):
                    layers.run(number, ids[number], mask[number])
        states = {}
        whole.get_decoder().layers[-1].register_forward_hook(lambda module, inputs, output: states.update(last=output))
        for number in range(2):
            whole(input_ids=ids[number], attention_mask=mask[number].long(), use_cache=False)
            assert torch.equal(layers.states_of(number), states["last"])
    after = network.get_decoder().layers.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in weights.items())
