"""lora_linear: the fused layer is PEFT's own arithmetic, and round-to-nearest is the exporter's."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import make_model

from slmake.training import lora_linear, qat


def layers(kind: torch.dtype, bias: bool, shape=(24, 16), rank: int = 4, alpha: int = 8):
    """PEFT's LoRA layer over a linear one with random A and B, and a fused twin with the same parameters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    out, width = shape
    model = torch.nn.Sequential(torch.nn.Linear(width, out, bias=bias)).to(kind)
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"]))
    for name, value in peft.named_parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value.data, std=0.3)
            value.data = value.data.to(kind)
            assert "lora_" in name
    twin = copy.deepcopy(peft)
    assert lora_linear.fuse(twin) == 1
    return peft, twin


def gradients(peft, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients for a fixed loss."""
    peft.zero_grad()
    leaf = x.detach().clone().requires_grad_(x.requires_grad)
    y = peft(leaf)
    torch.manual_seed(4)
    (y * torch.randn(y.shape, dtype=y.dtype)).sum().backward()
    found = {name: value.grad for name, value in peft.named_parameters() if value.requires_grad}
    return {"y": y.detach(), "x": leaf.grad, **found}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 16), (3, 7, 16), (2, 3, 4, 16)], ids=["2-D", "3-D", "4-D"])
def test_fused_layer_equals_peft_in_float64(bias, shape):
    peft, twin = layers(torch.float64, bias)
    torch.manual_seed(5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, found = gradients(peft, x), gradients(twin, x)
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_fused_layer_passes_torchs_gradient_check():
    """Analytic against finite differences, for x, A and B."""
    torch.manual_seed(6)
    x, weight, bias, a, b = (torch.randn(s, dtype=torch.float64) for s in ((3, 2, 5), (4, 5), (4,), (2, 5), (4, 2)))
    for value in (x, a, b):
        value.requires_grad_(True)
    frozen = lora_linear.Frozen(weight)
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear.LoraLinear.apply(x, frozen, bias, 1.7, True, a, b), (x, a, b)
    )


def test_layers_with_one_input_pass_torchs_gradient_check():
    """Two layers of different rank and width, as one."""
    torch.manual_seed(6)
    sizes = ((3, 2, 5), (7, 5), (7,), (2, 5), (4, 2), (3, 5), (3, 3))
    x, weight, bias, *adapters = (torch.randn(s, dtype=torch.float64) for s in sizes)
    for value in (x, *adapters):
        value.requires_grad_(True)
    frozen = lora_linear.Frozen(weight)
    assert torch.autograd.gradcheck(
        lambda x, *ab: lora_linear.LoraLinear.apply(x, frozen, bias, 1.7, True, *ab), (x, *adapters)
    )


def test_first_layer_input_without_gradient():
    """Frozen embeddings feed the first layer: x needs no gradient, A and B get theirs all the same."""
    peft, twin = layers(torch.float64, True)
    x = torch.randn((3, 7, 16), dtype=torch.float64)
    expected, found = gradients(peft, x), gradients(twin, x)
    assert found.pop("x") is None
    expected.pop("x")
    assert len(found) == 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_input_that_is_not_contiguous():
    peft, twin = layers(torch.float64, True)
    x = torch.randn((16, 7, 3), dtype=torch.float64).permute(2, 1, 0).requires_grad_(True)
    expected, found = gradients(peft, x), gradients(twin, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_float32_adapter_over_a_bfloat16_base():
    """Output and gradient of x are bfloat16, gradients of A and B float32, all as near to PEFT's as bfloat16 is."""
    peft, twin = layers(torch.float32, True)
    for model in (peft, twin):
        base = model.base_model.model[0].get_base_layer()
        base.weight.data, base.bias.data = base.weight.data.bfloat16(), base.bias.data.bfloat16()
    x = torch.randn((64, 16)).bfloat16().requires_grad_(True)
    expected, found = gradients(peft, x), gradients(twin, x)
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        distance = (found[name].double() - value.double()).norm() / value.double().norm()
        assert distance < 0.01, (name, float(distance))


@pytest.mark.parametrize(("join", "weights_fixed"), [(False, False), (True, False), (True, True)])
def test_whole_model_gives_the_same_loss_and_gradients(base, join, weights_fixed):
    """Every linear layer of a Llama, in float32; join: q, k and v as one, gate and up as one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.requires_grad_(False)
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.1)
    ids = torch.randint(2, 512, (4, 12))

    def run():
        peft.zero_grad()
        loss = peft(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), {n: v.grad.clone() for n, v in peft.named_parameters() if v.requires_grad}

    loss, expected = run()
    assert len(lora_linear.lora_layers(peft)) == lora_linear.fuse(peft, join, weights_fixed) == 14
    counted = []
    original = lora_linear.LoraLinear.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lora_linear.LoraLinear,
            "forward",
            lambda ctx, *given: (counted.append(len(given)), original(ctx, *given))[1],
        )
        fused_loss, found = run()
    assert len(counted) == (8 if join else 14)  # two layers
    assert fused_loss == pytest.approx(loss, abs=1e-6)
    assert len(found) == 28
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def projections(weights_fixed: bool = True, widths=(16, 16, 16), biases=(True, True, True)):
    """A module with q, k and v of PEFT, and a fused twin."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(9)
    names = ("q_proj", "k_proj", "v_proj")
    model = torch.nn.ModuleDict(
        {
            name: torch.nn.Linear(width, out, bias=bias)
            for name, width, bias, out in zip(names, widths, biases, (24, 8, 8), strict=True)
        }
    ).double()
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(names)))
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.3)
    twin = copy.deepcopy(peft)
    assert lora_linear.fuse(twin, True, weights_fixed) == 3
    return [[model.base_model.model[name] for name in names] for model in (peft, twin)]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 0, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("weights_fixed", [False, True])
def test_projections_may_be_called_in_any_order(order, weights_fixed):
    expected, found = projections(weights_fixed)
    x = torch.randn((3, 16), dtype=torch.float64)
    for index in order:
        torch.testing.assert_close(found[index](x), expected[index](x), rtol=1e-12, atol=1e-12)


def test_projections_of_different_inputs_are_computed_separately():
    expected, found = projections()
    x, other = torch.randn((2, 3, 16), dtype=torch.float64)
    for index, given in enumerate((x, other, x.clone())):
        torch.testing.assert_close(found[index](given), expected[index](given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("different", [{"widths": (16, 16, 8)}, {"biases": (True, False, True)}], ids=["width", "bias"])
def test_layers_that_differ_are_not_joined(different):
    expected, found = projections(**different)
    for layer, fused in zip(expected, found, strict=True):
        x = torch.randn((3, layer.in_features), dtype=torch.float64)
        torch.testing.assert_close(fused(x), layer(x), rtol=1e-12, atol=1e-12)


def test_bfloat16_weights_are_packed_and_multiply_as_before():
    torch.manual_seed(10)
    weight, x, grad = torch.randn(24, 16).bfloat16(), torch.randn(7, 16).bfloat16(), torch.randn(7, 24).bfloat16()
    packed, plain = lora_linear.Frozen(weight, pack=True), lora_linear.Frozen(weight)
    able = (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )  # not by every processor
    assert (packed.packed is not None) == able
    assert plain.packed is None
    assert lora_linear.Frozen(weight.float(), pack=True).packed is None
    for found, expected in (
        (packed.forward(x), x.float() @ weight.float().t()),
        (packed.backward(grad), grad.float() @ weight.float()),
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)


def test_layers_with_dropout_keep_pefts_forward():
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    peft = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["0"]))
    assert len(lora_linear.lora_layers(peft)) == 1
    assert lora_linear.fuse(peft) == 0


VARIANTS = {"DoRA": {"use_dora": True}, "bias of B": {"lora_bias": True}}


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_lora_keep_pefts_forward(config, trained):
    """Also a new one, whose magnitude or bias has no effect yet: every gradient is PEFT's, and the parameters are unchanged."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 8)).double()
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"], **config)).double()
    parameters = {name: value for name, value in peft.named_parameters() if value.requires_grad}
    assert len(parameters) == 6  # A, B, and magnitude or bias
    if trained:
        for value in parameters.values():
            torch.nn.init.normal_(value.data, std=0.3)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    expected = gradients(peft, x)
    assert lora_linear.fuse(peft, True, True) == 0
    assert qat.QuantizationAware(peft, 32, "all-linear", 1.0, 42).layers == {}
    found = gradients(peft, x)
    for name, value in before.items():
        assert torch.equal(parameters[name], value), name
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_rank_stabilized_lora_is_fused():
    """Another scaling is no other computation."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24)).double()
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_rslora=True)).double()
    torch.nn.init.normal_(peft.base_model.model[0].lora_B["default"].weight, std=0.3)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    expected = gradients(peft, x)
    assert lora_linear.fuse(peft) == 1
    for name, value in gradients(peft, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


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
    y = lora_linear.LoraLinear.apply(x, lora_linear.Frozen(quantized), bias, scaling, False, a, b)[0]
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
