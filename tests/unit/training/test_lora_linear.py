"""lora_linear: the fused layer is PEFT's own arithmetic."""

import copy

import pytest
import torch

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
        lambda x, a, b: lora_linear.LoraLinear.apply(x, frozen, bias, 1.7, True, None, a, b), (x, a, b)
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
        lambda x, *ab: lora_linear.LoraLinear.apply(x, frozen, bias, 1.7, True, None, *ab), (x, *adapters)
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


def test_layers_over_four_bits_are_one_operation_too():
    """bitsandbytes' own layers: the same output and gradients as PEFT's, float32 values of a dequantized base."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(8)
    model = torch.nn.Sequential(
        bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    ).to("cpu")
    model[0].support_avx512bf16_for_cpu = False
    model.is_loaded_in_4bit = True
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    for name, value in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value.data, std=0.3)
    x = torch.randn(3, 7, 64, requires_grad=True)
    expected = gradients(peft, x)
    assert lora_linear.fuse(peft) == 1
    found = gradients(peft, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("join", [False, True])
def test_copies_of_adapters_follow_them_and_give_the_same_bits(base, join):
    """Over a bfloat16 base, where every pass begins with the copies; without them each layer rounds its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def fused(copied: bool):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model.requires_grad_(False)
        torch.manual_seed(11)
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        with pytest.MonkeyPatch.context() as patch:
            if not copied:
                patch.setattr(lora_linear, "_copy_adapters", lambda model, units: None)
            assert lora_linear.fuse(peft, join, True) == 14
        return peft, [value for value in peft.parameters() if value.requires_grad]

    ids = torch.arange(2, 50).view(4, 12)
    results = []
    for copied in (True, False):
        peft, adapters = fused(copied)
        torch.manual_seed(12)
        steps = []
        for _ in range(3):  # as an optimizer, change the adapters in place between passes
            with torch.no_grad():
                for value in adapters:
                    value += torch.randn_like(value) / 8
            peft.zero_grad()
            peft(input_ids=ids, labels=ids).loss.backward()
            steps.append([value.grad.clone() for value in adapters])
        results.append(steps)
    assert all(value.dtype == torch.float32 for value in adapters)
    for with_copies, without in zip(*results, strict=True):
        for grad, expected in zip(with_copies, without, strict=True):
            assert grad.abs().sum() > 0
            torch.testing.assert_close(grad, expected, rtol=0, atol=0)
