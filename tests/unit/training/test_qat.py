"""qat: round-to-nearest is the exporter's, and training goes through the quantized weights."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import make_model

from slmake.training import lora_linear, qat

# -- round to nearest --------------------------------------------------------------------------------------------------


def by_hand(weight: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Round to nearest, block by block, in float64: scale absmax / (2^(bits-1) - 1/2), half to even, clipped."""
    top, found = 2 ** (bits - 1), np.zeros(weight.shape)
    for i, row in enumerate(weight.astype(np.float64)):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            scale = max(abs(part)) / (top - 0.5) or 1.0
            found[i, start : start + block] = np.clip(np.rint(part / scale), -top, top - 1) * scale
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("width", [128, 100, 20], ids=["whole blocks", "padded", "less than a block"])
def test_round_to_nearest_equals_the_formula(bits, block, width):
    weight = np.random.default_rng(bits * block + width).normal(size=(6, width)).astype(np.float32)
    weight[2, : min(block, width)] = 0  # a block of zeros
    weight[4] = 0
    found = qat.round_to_nearest(torch.from_numpy(weight), bits, block)
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), by_hand(weight, bits, block), rtol=0, atol=1e-6)
    assert not found[4].any()
    for row in found:
        for part in row.split(block):
            assert len(part.unique()) <= 2**bits


def test_round_to_nearest_of_known_numbers():
    """Scale 7.5 / 7.5 = 1: levels are whole numbers from -8 to 7; halves go to the even neighbour."""
    weight = torch.tensor([[7.5, -7.5, 0.5, 1.5, -2.5, 3.2, 0.0, -0.4] + [0.0] * 8])
    expected = [7.0, -8.0, 0.0, 2.0, -2.0, 3.0, 0.0, 0.0] + [0.0] * 8
    assert qat.round_to_nearest(weight, 4, 16).tolist() == [expected]


def test_round_to_nearest_leaves_its_input_and_keeps_its_type():
    weight = torch.randn(4, 32, dtype=torch.bfloat16)
    before = weight.clone()
    found = qat.round_to_nearest(weight, 4, 32)
    assert found.dtype == torch.bfloat16
    assert torch.equal(weight, before)
    expected = qat.round_to_nearest(weight.float(), 4, 32).bfloat16()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block"), [(128, 32), (100, 32), (64, 16)])
def test_round_to_nearest_equals_onnxruntimes_rtn_quantizer(bits, width, block):
    """Called as `rtn_quantize` calls it for the model builder: padded, transposed, scheme sym, type uint."""
    from onnxruntime.quantization.neural_compressor.weight_only import pad_tensor, quant_tensor

    weight = np.random.default_rng(11).normal(size=(24, width)).astype(np.float32)  # [out, in]
    weight[3, :block] = 0
    padded = pad_tensor(weight.T, block, math.ceil(width / block))
    levels, scale, zero = quant_tensor(padded.T, bits, block, "sym", "uint", 1)
    assert set(np.unique(zero)) == {2 ** (bits - 1)}
    expected = (levels.astype(np.uint8).astype(np.float64) - zero) * scale.astype(np.float32)
    expected = expected.reshape(24, -1)[:, :width]
    found = qat.round_to_nearest(torch.from_numpy(weight), bits, block).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_round_to_nearest_equals_the_node_onnxruntime_writes(bits, tmp_path):
    """The whole quantizer on a one-node graph, its packed weight unpacked and dequantized again."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, RTNWeightOnlyQuantConfig

    weight = np.random.default_rng(12).normal(size=(64, 24)).astype(np.float32)  # [in, out]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "g",
        [info("x", 1, [1, 64])],
        [info("y", 1, [1, 24])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    config = RTNWeightOnlyQuantConfig(customized_weight_config={"m": {"bits": bits}})
    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=True, algo_config=config)
    quantizer.process()
    (node,) = quantizer.model.model.graph.node
    assert node.op_type == "MatMulNBits"
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer}
    packed, scales = stored[node.input[1]], stored[node.input[2]].reshape(24, -1, 1)
    levels = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    expected = ((levels.astype(np.float32) - 2 ** (bits - 1)) * scales).reshape(24, 64)
    found = qat.round_to_nearest(torch.from_numpy(weight.T.copy()), bits, 32).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# -- training through the quantized weights ----------------------------------------------------------------------------


def test_quantized_forward_and_straight_through_gradients():
    """y = x Q' + bias; dL/dx = g Q; dL/dA = s B' g' x and dL/dB = s g' x A', as if Q were W + s B A."""
    torch.manual_seed(8)
    x, grad = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 5, 24, dtype=torch.float64)
    weight, bias = torch.randn(24, 16, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    a, b, scaling = torch.randn(4, 16, dtype=torch.float64), torch.randn(24, 4, dtype=torch.float64), 1.7
    quantized = qat.round_to_nearest(weight + scaling * b @ a, 4, 16)
    for value in (x, a, b):
        value.requires_grad_(True)
    y = lora_linear.LoraLinear.apply(x, lora_linear.Frozen(quantized), bias, scaling, False, None, a, b)[0]
    torch.testing.assert_close(y, x @ quantized.T + bias, rtol=1e-12, atol=1e-12)
    y.backward(grad)
    flat, g = x.detach().reshape(-1, 16), grad.reshape(-1, 24)
    torch.testing.assert_close(x.grad, grad @ quantized, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(a.grad, scaling * b.T @ g.T @ flat, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b.grad, scaling * g.T @ flat @ a.T, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A Llama with adapters on every linear layer; B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path_factory.mktemp("deep") / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(2)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.1)
    lora_linear.fuse(peft)
    return peft


@pytest.mark.parametrize("modules", ["all-linear", ["gate_proj", "up_proj"]], ids=["all", "two"])
def test_refresh_quantizes_the_merged_weights(deep, modules):
    """The named layers compute with W + s B A in four bits: the model equals one whose weights were replaced."""
    aware = qat.QuantizationAware(deep, 32, modules, 1.0, 42)
    assert len(aware.layers) == (14 if modules == "all-linear" else 4)
    aware.refresh(None)
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        found = deep(input_ids=ids).logits
        plain = copy.deepcopy(deep).merge_and_unload()
        merged = plain(input_ids=ids).logits
        for name, module in plain.named_modules():
            if f"base_model.model.{name}" in aware.layers:
                expected = qat.round_to_nearest(module.weight, 4, 32)
                quantized = deep.get_submodule(f"base_model.model.{name}").fake_quantized
                torch.testing.assert_close(quantized, expected, rtol=0, atol=1e-6, msg=name)
                module.weight.data = expected
        expected = plain(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - merged).abs().max() > 1e-3  # quantization is not a no-op
    for module in lora_linear.lora_layers(deep).values():
        module.fake_quantized = None


def quantized_layers(aware: qat.QuantizationAware) -> set[str]:
    """Names of the layers that are quantized now."""
    return {name for name, layer in aware.layers.items() if layer.fake_quantized is not None}


def test_refresh_follows_the_adapter(deep):
    aware = qat.QuantizationAware(deep, 32, "all-linear", 1.0, 42)
    aware.refresh(None)
    module = next(iter(aware.layers.values()))
    before = module.fake_quantized.clone()
    aware.refresh(None)
    assert torch.equal(module.fake_quantized, before)
    with torch.no_grad():
        module.lora_B["default"].weight.mul_(2)
    aware.refresh(None)
    assert not torch.equal(module.fake_quantized, before)


def test_rate_draws_layers_by_seed_and_step_alone(deep):
    """Half of 14 layers on average; all of them to evaluate, whatever the rate."""
    aware = qat.QuantizationAware(deep, 32, "all-linear", 0.5, 42)
    drawn = []
    for step in range(40):
        aware.refresh(step)
        drawn.append(quantized_layers(aware))
    assert 0.4 < sum(map(len, drawn)) / (40 * 14) < 0.6
    assert len({frozenset(names) for names in drawn}) > 30
    again, other = (qat.QuantizationAware(deep, 32, "all-linear", 0.5, seed) for seed in (42, 43))
    again.refresh(7)
    assert quantized_layers(again) == drawn[7]
    other.refresh(7)
    assert quantized_layers(other) != drawn[7]
    aware.refresh(None)
    assert len(quantized_layers(aware)) == 14
    for layer in aware.layers.values():
        layer.fake_quantized = None
