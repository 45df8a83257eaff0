"""LoRA's linear layers as one differentiable operation.

PEFT computes the base product, the update, its scaling and the sum as separate operations that each read and write a
full activation. Here they are one: y = x W' + s (x A') B', with the gradients written out (Hu et al. 2021,
arXiv:2106.09685). Layers that read the same input (q, k and v; gate and up) are one layer with a longer W: fewer and
larger products. The parameters stay PEFT's own. The `forward` of a layer is replaced where a probe shows that PEFT's own
computes the same; other variants, such as DoRA, keep theirs.
"""

import types
from collections.abc import Sequence

import torch

from slmake import memory
from slmake.training.probe import close

# Layers of a module that read the same input, by the names that most architectures use.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Frozen:
    """A frozen weight [out, in] with its two products; in bfloat16 on a CPU it can be packed once, not in every product.

    The operators are those that torch's compiler emits for frozen weights on CPUs (oneDNN). The packed copies need twice
    the weight's memory; the weight itself is then not read again.
    """

    def __init__(self, weight: torch.Tensor, pack: bool = False):
        self.weight, self.packed = weight, None
        if pack and packable(weight):
            self.weight = None
            self.packed = [
                torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())
                for matrix in (weight.detach(), weight.detach().t())
            ]
            memory.release([weight])

    def _product(self, x: torch.Tensor, backward: bool) -> torch.Tensor:
        if self.packed is None:
            return x @ (self.weight if backward else self.weight.t())
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[backward], None, "none", [], "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W': [rows, in] to [rows, out]."""
        return self._product(x, False)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """grad W: [rows, out] to [rows, in]."""
        return self._product(grad, True)


def packable(weight: torch.Tensor) -> bool:
    """Whether this processor and this weight's type have packed products."""
    narrow = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return narrow and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class FourBit:
    """A frozen weight [out, in] in bitsandbytes' 4 bits with its two products, each over the dequantized weight."""

    def __init__(self, weight):
        self.weight = weight

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight.data, self.weight.quant_state).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W': [rows, in] to [rows, out]."""
        return x @ self._whole(x).t()

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """grad W: [rows, out] to [rows, in]."""
        return grad @ self._whole(grad)


class Gathered:
    """The frozen weights of several layers, concatenated for each product: sharded weights are gathered only while in use."""

    def __init__(self, bases: list):
        self.bases = bases

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W': [rows, in] to [rows, out]."""
        return x @ torch.cat([base.weight for base in self.bases]).t()

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """grad W: [rows, out] to [rows, in]."""
        return grad @ torch.cat([base.weight for base in self.bases])


def _scaled(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * (a b), in one kernel on a GPU: its host cannot launch kernels as fast as the GPU computes them."""
    if a.is_cuda:
        return a.new_empty(len(a), b.shape[1]).addmm_(a, b, beta=0, alpha=scaling)
    return (a @ b).mul_(scaling)


def _product_as(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b in another type, in one kernel on a GPU, which does not round the sum before."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda and a.dtype != dtype else (a @ b).to(dtype)


def stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The A of several layers as one: [r_1 + r_2 + …, in]."""
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


def diagonal(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The B of several layers as one, as blocks of a diagonal: [out_1 + out_2 + …, r_1 + r_2 + …]."""
    return torch.block_diag(*matrices) if len(matrices) > 1 else matrices[0]


class Joined:
    """The adapters of layers that are computed as one, copied into the base's type.

    Attributes:
        matrices: A [r, in] and B [out, r] of all these layers.
        parts: the part of `matrices` that each adapter's matrix is copied into, and that matrix.
    """

    def __init__(self, layers: list):
        adapters = [_adapter(layer) for layer in layers]
        dtype, row, column = _type(layers[0].get_base_layer()), 0, 0
        self.matrices = tuple(
            join([pair[index].detach() for pair in adapters]).to(dtype)
            for index, join in enumerate((stacked, diagonal))
        )
        self.parts = []
        for a, b in adapters:
            end = column + len(a)
            self.parts += [(self.matrices[0][column:end], a), (self.matrices[1][row : row + len(b), column:end], b)]
            row, column = row + len(b), end


class LoraLinear(torch.autograd.Function):
    """y_i = x W_i' + s (x A_i') B_i' for layers i that read the same x, or y = x Q' with a quantized Q of W + s B A.

    Shapes: x [..., in]; frozen (`Frozen` of W or Q, or `Gathered`) [out, in] and bias [out] or None of all layers, out being the sum of
    out_i; scaling s; update False with Q, which includes the update; adapters a_1 [r_1, in], b_1 [out_1, r_1], a_2, b_2, …
    Returns a tuple of [..., out_i].
    The adapters' matrices may be float32 over a bfloat16 base; products are taken in x's type. `joined` are their copies in that
    type, if there are any.
    """

    @staticmethod
    def forward(ctx, x, frozen, bias, scaling, update, joined, *adapters):
        a, b = adapters[0::2], adapters[1::2]
        flat = x.reshape(-1, x.shape[-1])
        a_, b_ = joined.matrices if joined else (stacked(a).to(x.dtype), diagonal(b).to(x.dtype))
        inner = _scaled(flat, a_.t(), scaling)
        y = frozen.forward(flat)
        if update:
            y.addmm_(inner, b_.t())
        if bias is not None:
            y += bias
        ctx.save_for_backward(flat, inner, a_, b_)
        ctx.frozen, ctx.scaling, ctx.update, ctx.type = frozen, scaling, update, a[0].dtype
        ctx.shape, ctx.ranks, ctx.sizes = x.shape, [len(matrix) for matrix in a], [len(matrix) for matrix in b]
        return tuple(part.view(*x.shape[:-1], part.shape[-1]) for part in y.split(ctx.sizes, dim=1))

    @staticmethod
    def backward(ctx, *grads):
        flat, inner, a, b = ctx.saved_tensors
        parts = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        grad_inner = _scaled(grad, b, ctx.scaling)
        grad_a = _product_as(grad_inner.t(), flat, ctx.type).split(ctx.ranks)
        grad_b = _product_as(grad.t(), inner, ctx.type)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.frozen.backward(grad)
            if ctx.update:
                grad_x.addmm_(grad_inner, a)
            grad_x = grad_x.view(ctx.shape)
        adapters, row, column = [], 0, 0
        for part, size, rank in zip(grad_a, ctx.sizes, ctx.ranks, strict=True):
            adapters += [part, grad_b[row : row + size, column : column + rank]]
            row, column = row + size, column + rank
        return grad_x, None, None, None, None, None, *adapters


def _adapter(module) -> tuple[torch.Tensor, torch.Tensor]:
    name = module.active_adapters[0]
    return module.lora_A[name].weight, module.lora_B[name].weight


def _forward(self, x, *args, **kwargs):
    base, scaling, quantized = self.get_base_layer(), self.scaling[self.active_adapters[0]], self.fake_quantized
    frozen = self.frozen or Frozen(base.weight if quantized is None else quantized)
    return LoraLinear.apply(x, frozen, base.bias, scaling, quantized is None, self.joined, *_adapter(self))[0]


class FusedProjections:
    """Layers of a module that are computed as one when the first is called; the others' results are kept until their calls."""

    def __init__(self, layers: list, weights_fixed: bool, pack: bool):
        """If the weights are fixed, concatenate them once; unless packed, each layer's own becomes a view of its part."""
        self.layers, self.bases = layers, [layer.get_base_layer() for layer in layers]
        self.scaling = layers[0].scaling[layers[0].active_adapters[0]]
        if weights_fixed:
            weight = torch.cat([base.weight.data for base in self.bases])
            memory.release(base.weight.data for base in self.bases)
            self.frozen = Frozen(weight, pack)
            if self.frozen.packed is None:
                for base, part in zip(self.bases, weight.split([len(base.weight) for base in self.bases]), strict=True):
                    base.weight.data = part
        else:
            self.frozen = Gathered(self.bases)
        self.x, self.results, self.joined = None, [], None
        for index, layer in enumerate(layers):
            layer.forward = types.MethodType(self._forward_of(index), layer)

    @staticmethod
    def compatible(layers: list) -> bool:
        """Whether these layers can be one: same input width, scaling and type, all with a bias or all without."""
        bases = [layer.get_base_layer() for layer in layers]
        kinds = {
            (
                base.in_features,
                base.weight.dtype,
                base.bias is None,
                layer.scaling[layer.active_adapters[0]],
                _adapter(layer)[0].dtype,
            )
            for base, layer in zip(bases, layers, strict=True)
        }
        return len(kinds) == 1

    def _forward_of(self, index: int):
        def forward(layer, x, *args, **kwargs):
            if index == 0:
                matrices = [matrix for projection in self.layers for matrix in _adapter(projection)]
                bias = None if self.bases[0].bias is None else torch.cat([base.bias for base in self.bases])
                first, *rest = LoraLinear.apply(x, self.frozen, bias, self.scaling, True, self.joined, *matrices)
                self.x, self.results = x, [None, *rest]
                return first
            if self.x is not x:  # another input than the first layer's
                return _forward(layer, x)
            out, self.results[index] = self.results[index], None
            if index == len(self.layers) - 1:
                self.x = None
            return _forward(layer, x) if out is None else out

        return forward


def lora_layers(peft) -> dict[str, torch.nn.Module]:
    """PEFT's LoRA layers over plain linear ones, by module name."""
    from peft.tuners.lora.layer import Linear

    return {
        name: module
        for name, module in peft.named_modules()
        if type(module) is Linear and type(module.get_base_layer()) is torch.nn.Linear
    }


def four_bit_layers(peft) -> list[torch.nn.Module]:
    """PEFT's LoRA layers over bitsandbytes' 4-bit linear ones."""
    return [module for module in peft.modules() if hasattr(module, "lora_A") and _quantized(module.get_base_layer())]


def _quantized(base) -> bool:
    return getattr(base.weight, "quant_state", None) is not None


def _type(base) -> torch.dtype:
    """The type that a layer's products are taken in."""
    return base.weight.quant_state.dtype if _quantized(base) else base.weight.dtype


@torch.no_grad()
def _computes(module, frozen: Frozen | FourBit) -> bool:
    """Whether `LoraLinear` gives the result of PEFT's own forward, with random values in all parameters of the adapter.

    DoRA's magnitude, a bias of B and the like would have no effect with the values that they are initialized to.
    """
    base, generator = module.get_base_layer(), torch.Generator().manual_seed(0)
    of_base = {id(value) for value in base.parameters()}
    parameters = [value for value in module.parameters() if id(value) not in of_base]
    before = [value.clone() for value in parameters]
    x = torch.randn(4, base.in_features, generator=generator).to(base.weight.device, _type(base))
    try:
        for value in parameters:
            random = torch.randn(value.shape, generator=generator)
            value.copy_(random / value.shape[-1] ** 0.5)
        scaling = module.scaling[module.active_adapters[0]]
        fused = LoraLinear.apply(x, frozen, base.bias, scaling, True, None, *_adapter(module))[0]
        return close(fused, module(x), 0.02)
    finally:
        for value, original in zip(parameters, before, strict=True):
            value.copy_(original)


def fuse(peft, join: bool = False, weights_fixed: bool = False, pack: bool = False) -> int:
    """Replace the forward of every plain LoRA layer without dropout; returns how many were replaced.

    Args:
        join: compute layers that read the same input as one (not with quantized weights).
        weights_fixed: the base's weights stay as and where they are (not quantized, not sharded).
        pack: pack fixed weights for faster products, where the processor has them: two more copies in memory.
    """
    plain = {}
    for name, module in lora_layers(peft).items():
        if _replace(module, Frozen(module.get_base_layer().weight)):
            plain[name] = module
    four_bit = []
    for module in four_bit_layers(peft):
        frozen = FourBit(module.get_base_layer().weight)
        if _replace(module, frozen):
            module.frozen = frozen
            four_bit.append(module)
    alone, fused = dict(plain), []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in plain) if join else ():
        for names in PROJECTIONS:
            layers = [plain.get(f"{parent}.{name}") for name in names]
            if None not in layers and FusedProjections.compatible(layers):
                fused.append(FusedProjections(layers, weights_fixed, pack))
                for name in names:
                    del alone[f"{parent}.{name}"]
    if weights_fixed:
        for module in alone.values():
            module.frozen = Frozen(module.get_base_layer().weight, pack)
        units = [(unit, unit.layers) for unit in fused] + [
            (module, [module]) for module in (*alone.values(), *four_bit)
        ]
        _copy_adapters(peft.get_base_model(), units)
    return len(plain) + len(four_bit)


def _copy_adapters(model, units: list[tuple[object, list]]) -> None:
    """Copy all adapters into the base's type before each pass of the model, at once: on a GPU, a kernel instead of two a layer.

    Args:
        units: what computes some layers as one and takes their `joined`, and these layers.
    """
    parts = []
    for unit, layers in units:
        if _adapter(layers[0])[0].dtype != _type(layers[0].get_base_layer()):
            unit.joined = Joined(layers)
            parts += unit.joined.parts
    if not parts:
        return
    copies, matrices = zip(*parts, strict=True)

    def refresh(*_):
        with torch.no_grad():
            torch._foreach_copy_(copies, matrices)

    model.register_forward_pre_hook(refresh)


def _replace(module, frozen: Frozen | FourBit) -> bool:
    """Give a layer the one operation, if it has no dropout and a probe agrees."""
    if not isinstance(module.lora_dropout[module.active_adapters[0]], torch.nn.Identity):
        return False
    if not _computes(module, frozen):
        return False
    module.fake_quantized = module.frozen = module.joined = None
    module.forward = types.MethodType(_forward, module)
    return True
