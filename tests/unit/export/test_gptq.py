"""gptq: rounding changes the outputs least, and the exporter keeps the weights."""

import json
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import make_model, write_params

from scripts import quantize
from slmake import params
from slmake.errors import UserError
from slmake.export import gptq
from slmake.training.qat import round_to_nearest

GPTQ = {
    "precision": "int4",
    "algo_config": "rtn",
    "calibration": "gptq",
    "calibration_rows": 48,
    "matmul_mixed_precision": None,
    "int8_nodes": [],
}


def problem(out: int = 24, width: int = 80, seed: int = 0):
    """A weight and inputs that vary together, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) + 2 * torch.eye(width)
    return weight, torch.randn(400, width, generator=generator) @ mix


def error(inputs: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    return float((inputs @ (weight - other).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_outputs_change_less_than_by_plain_rounding(block_size):
    weight, inputs = problem()
    placed = gptq.round_with_inputs(weight, gptq.inverse_factor(inputs.T @ inputs), block_size).placed()
    plain = round_to_nearest(weight, 4, block_size)
    assert error(inputs, weight, round_to_nearest(placed, 4, block_size)) < 0.8 * error(inputs, weight, plain)


def test_rounding_moves_only_each_blocks_largest_weights():
    """By half a level: at 7.5 they keep the scale what it was."""
    weight, inputs = problem()
    placed = gptq.round_with_inputs(weight, gptq.inverse_factor(inputs.T @ inputs), 16).placed()
    blocks = placed.reshape(-1, 16)
    rounded = round_to_nearest(placed, 4, 16).reshape(-1, 16)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7.5
    steps = ((rounded - blocks) / scale).abs()
    assert torch.equal(steps > 1e-4, blocks.abs() / scale > 7.25)
    torch.testing.assert_close(steps.amax(dim=1), torch.full((len(blocks),), 0.5), rtol=0, atol=1e-4)


def test_inputs_that_do_not_vary_together_leave_plain_rounding():
    """With independent inputs there is nothing to make up for: every weight goes to its nearest level.

    (Each block's largest weight is positive here: a negative one lies between two levels, and plain rounding's choice is chance.)
    """
    weight, _ = problem()
    blocks = weight.view(-1, 16)
    weight = (blocks * blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).sign()).view_as(weight)
    placed = gptq.round_with_inputs(weight, gptq.inverse_factor(torch.eye(80)), 16).placed()
    expected = round_to_nearest(weight, 4, 16)
    torch.testing.assert_close(round_to_nearest(placed, 4, 16), expected, rtol=1e-5, atol=1e-6)


def test_inputs_that_never_occur_and_blocks_of_zeros():
    weight, inputs = problem()
    inputs[:, 3:40] = 0
    weight[:, 16:32] = 0
    placed = gptq.round_with_inputs(weight, gptq.inverse_factor(inputs.T @ inputs), 16).placed()
    assert torch.isfinite(placed).all()
    assert (placed[:, 16:32] == 0).all()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("model.layers.3.self_attn.q_proj", [["attn/q_proj"], ["attn/qkv_proj"]]),
        ("model.layers.3.self_attn.o_proj", [["attn/o_proj"]]),
        ("model.layers.3.self_attn.qkv_proj", [["attn/qkv_proj"]]),
        ("model.layers.3.mlp.gate_up_proj", [["mlp/gate_up_proj"], ["mlp/gate_proj", "mlp/up_proj"]]),
    ],
)
def test_node_names(module, names):
    wanted = [[f"/model/layers.3/{name}/MatMul" for name in several] for several in names]
    assert gptq.node_names(module) == wanted
    assert gptq.node_names("lm_head") == []


@pytest.fixture(scope="module", params=["llama", "qwen2", "phi3"])
def model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param, tie_word_embeddings=False)


def export(folder, model, dataset, **changes):
    """Run the script in this process; returns the exported folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_params(folder / "params.yaml", quantize={**GPTQ, **changes})
    target = folder / "build" / "onnx"
    given = [] if dataset is None else ["--dataset", str(dataset)]
    quantize.main(["--params", str(file), "--model", str(model), "--output", str(target), *given])
    return target


def weights_of(folder) -> dict[str, np.ndarray]:
    graph = onnx.load(folder / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def logits(folder) -> np.ndarray:
    import onnxruntime_genai as og

    loaded = og.Model(str(folder))
    generator = og.Generator(loaded, og.GeneratorParams(loaded))
    generator.append_tokens(np.arange(2, 22, dtype=np.int32))
    return np.array(generator.get_output("logits"), dtype=np.float32)[0]


def test_export_is_nearer_to_the_model_than_plain_rounding(tmp_path, model, dataset):
    """Measured on the model's last layer: its weights differ from plain rounding, its outputs less from the model's."""
    from transformers import AutoModelForCausalLM

    plain = export(tmp_path / "plain", model, dataset, calibration="none")
    placed = export(tmp_path / "placed", model, dataset)
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in placed.iterdir()} == names
    before, after = weights_of(plain), weights_of(placed)
    changed = {name for name in before if "Q4" in name and not np.array_equal(before[name], after[name])}
    assert len(changed) >= 2 * 4  # every product of both layers (q, k and v, or gate and up, may be one)
    with torch.inference_mode():
        ids = torch.arange(2, 22)[None]
        wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0, -1].numpy()
    assert np.abs(logits(placed) - wanted).mean() < 1.5 * np.abs(logits(plain) - wanted).mean()
    assert not list(placed.parent.glob(".*"))


def test_two_runs_are_byte_identical(tmp_path, dataset):
    model = make_model(tmp_path / "llama")
    first, second = (export(tmp_path / name, model, dataset) for name in ("one", "two"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_products_in_eight_bits_are_left_alone(tmp_path, dataset):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "llama"), dtype=torch.float32)
    section = params.Quantize(**{**GPTQ, "int8_nodes": ["*/attn/*", "/model/layers.0/mlp/up_proj/MatMul"]})
    assert set(gptq.in_four_bits(section, model)) == {
        *("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"),
        *("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
    }


def plainly_rounded(weight: torch.Tensor) -> gptq.Rounded:
    blocks = weight.detach().view(len(weight), -1, 32)
    scales = blocks.abs().amax(dim=2) / 7.5
    levels = round_to_nearest(weight.detach(), 4, 32).view_as(blocks) / scales[..., None]
    return gptq.Rounded(levels.round().view_as(weight).to(torch.int8), scales, blocks.abs().argmax(dim=2).byte(), 32)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])  # scales in 32 and in 16 bits
def test_what_the_exporter_wrote_is_compared(tmp_path, dataset, provider):
    model = make_model(tmp_path / "llama", tie_word_embeddings=False)
    target = export(tmp_path / "run", model, dataset, calibration="none", execution_provider=provider)
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    section = params.Quantize(**GPTQ)
    modules = gptq.in_four_bits(section, network)
    rounded = {f"{name}.weight": plainly_rounded(module.weight) for name, module in modules.items()}
    wanted = {name: partial(gptq.Rounded, *weight) for name, weight in rounded.items()}
    gptq.check_weights(target, wanted)
    levels = rounded["model.layers.1.mlp.up_proj.weight"].levels
    levels[: len(levels) // 50 + 1] *= -1
    with pytest.raises(UserError, match=r"changed \d+ of GPTQ's weights of /model/layers.1/mlp/up_proj/MatMul"):
        gptq.check_weights(target, wanted)


def test_calibrated_weights_for_a_target_with_scales_in_16_bits(tmp_path, dataset):
    """Ties that 16 bits decide otherwise do not refuse the export."""
    model = make_model(tmp_path / "llama", tie_word_embeddings=False, hidden_size=256, intermediate_size=512)
    target = export(tmp_path / "run", model, dataset, execution_provider="cuda")
    assert {values.dtype for name, values in weights_of(target).items() if "scale" in name} == {np.dtype("float16")}


def refused(capsys, *arguments, **changes) -> str:
    with pytest.raises(SystemExit) as caught:
        export(*arguments, **changes)
    assert caught.value.code == 1
    return capsys.readouterr().err


def test_bad_input(tmp_path, base, dataset, capsys):
    assert "needs training prompts: give --dataset." in refused(capsys, tmp_path / "a", base, None)
    message = refused(capsys, tmp_path / "b", base, dataset, int8_nodes=["*/attn/*", "*/mlp/*"])
    assert "with these int8_nodes no product has 4 bits. Set it to none." in message
    lost = refused(capsys, tmp_path / "c", base, tmp_path)
    assert f"{tmp_path / 'train.parquet'}: no such file." in lost
    assert not (tmp_path / "c" / "build").exists() or not list((tmp_path / "c" / "build").iterdir())


@pytest.mark.parametrize(
    "changes",
    [{"algo_config": "k_quant"}, {"is_symmetric": False}, {"precision": "int8"}, {"precision": "fp32"}],
    ids=json.dumps,
)
def test_other_roundings_are_refused(changes):
    with pytest.raises(ValueError, match="calibration gptq goes with precision int4"):
        params.Quantize(**{**GPTQ, **changes})
    with pytest.raises(ValueError, match="by int8_nodes, not by mixed_layers"):
        params.Quantize(**{**GPTQ, "matmul_mixed_precision": "mixed_layers:int8"})
