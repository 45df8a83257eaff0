"""An adapter's configuration says which of its tensors PEFT reads: all others are refused."""

import pytest
import torch
from merge_script import edited, load, make_adapter, refused, run, tensors_of

LISTED = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


def merged_by_peft(base, adapter) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()


COVERED = {
    "a pattern that looks ahead": {"target_modules": r"^(?!.*visual).*(?:q_proj|up_proj).*"},
    "Unsloth's pattern": {
        "target_modules": r"(?:.*?(?:layers|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:gate_proj)))"
    },
    "a layer": {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 1},
    "layers of a list": {"target_modules": LISTED, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "excluded": {"target_modules": LISTED, "exclude_modules": ["v_proj", "layers.0.mlp.up_proj"]},
    "excluded by a pattern": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "saved": {"target_modules": LISTED, "modules_to_save": ["layers.0.mlp"]},
}


@pytest.mark.parametrize("config", COVERED.values(), ids=COVERED.keys())
def test_what_peft_adapts_is_merged_as_by_peft(tmp_path, base, config):
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    merged, expected = tensors_of(run(tmp_path, base, adapter)), merged_by_peft(base, adapter)
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())
    before = tensors_of(base)
    assert any(not torch.equal(value, before[name]) for name, value in merged.items())


def test_all_linear_in_a_configuration_is_understood(tmp_path, base, adapter):
    made = edited(adapter, tmp_path / "adapter", target_modules="All-Linear")
    merged, expected = tensors_of(run(tmp_path, base, made)), merged_by_peft(base, made)
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())


# Edited behind the training, whose adapter is of all linear layers: the first tensor that PEFT leaves out.
EDITED = {
    "fewer": ({"target_modules": ["q_proj"]}, "layers.0.mlp.down_proj.lora_A.weight"),
    "fewer by a pattern": ({"target_modules": r".*layers\.0\..*_proj"}, "layers.1.mlp.down_proj.lora_A.weight"),
    "other": ({"target_modules": ["nothing"]}, "layers.0.mlp.down_proj.lora_A.weight"),
    "excluded": ({"exclude_modules": ["v_proj"]}, "layers.0.self_attn.v_proj.lora_A.weight"),
    "excluded by a pattern": ({"exclude_modules": r".*\.v_proj"}, "layers.0.self_attn.v_proj.lora_A.weight"),
    "a layer": ({"layers_to_transform": [0]}, "layers.1.mlp.down_proj.lora_A.weight"),
    "a layer of a pattern": (
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        "layers.1.mlp.down_proj.lora_A.weight",
    ),
    "no such pattern": ({"layers_to_transform": 0, "layers_pattern": "h"}, "layers.0.mlp.down_proj.lora_A.weight"),
}


@pytest.mark.parametrize(("config", "tensor"), EDITED.values(), ids=EDITED.keys())
def test_what_the_configuration_does_not_cover_is_refused(tmp_path, capsys, base, adapter, config, tensor):
    wrong = edited(adapter, tmp_path / "wrong", **{"target_modules": LISTED, **config})
    message = refused(tmp_path, capsys, base, wrong)
    assert (
        f"{wrong}/adapter_model.safetensors: PEFT would leave out the tensor base_model.model.model.{tensor}: "
        in message
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layers.0.self_attn.q_proj.weight", "it is the weight of an adapted module"),
        ("norm.modules_to_save.default.weight", "modules_to_save of adapter_config.json does not cover it"),
    ],
)
def test_a_whole_tensor_that_peft_leaves_out_is_refused(tmp_path, capsys, base, adapter, name, reason):
    name = f"base_model.model.model.{name}"
    shape = (64,) if "norm" in name else (64, 64)
    wrong = edited(adapter, tmp_path / "wrong", lambda tensors: tensors.update({name: torch.ones(shape)}))
    assert f"PEFT would leave out the tensor {name}: {reason}" in refused(tmp_path, capsys, base, wrong)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", ["(", "(a|a)*$", "*"])
def test_a_pattern_that_cannot_be_used_is_refused(tmp_path, capsys, base, adapter, key, pattern):
    wrong = edited(adapter, tmp_path / "wrong", **{key: pattern})
    message = refused(tmp_path, capsys, base, wrong)
    assert f"{wrong}/adapter_config.json: `{pattern}` " in message
    assert "Write the modules' names." in message
