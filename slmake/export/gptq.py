"""GPTQ: round weights to 4 bits so that the layer's outputs on real prompts change least (Frantar et al. 2022, arXiv:2210.17323).

Round-to-nearest treats every weight alone. GPTQ rounds column by column and corrects the columns that are not rounded yet
for the error already made, weighted by the second moments of the layer's inputs. The model builder does not have this
method. But it rounds to nearest, which leaves weights unchanged that lie on a level already: the exporter is given such
weights (`placed`) in place of the model's.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from slmake import cli, params
from slmake.errors import NotBuildable
from slmake.export.decoder_layers import DecoderLayers
from slmake.training.data import Data

LEVELS = 8  # symmetric 4 bits: -8 to 7
BATCH, TOKENS = 32, 4096  # largest number of rows, and of tokens, in one forward pass


def _edge(scale: torch.Tensor) -> torch.Tensor:
    """The float32 number next to 7.5 scales whose negative rounds to -8 levels; at 7.5 itself the last bit decides.

    Args:
        scale: float64 [out].
    """
    edge = (scale * (LEVELS - 0.5)).float()
    for _ in range(64):
        below = edge.double() / (edge.double() * 2 / (2 * LEVELS - 1)) < LEVELS - 0.5  # as round_to_nearest divides
        if not below.any():
            break
        edge = torch.where(below, torch.nextafter(edge, torch.full_like(edge, torch.inf)), edge)
    return edge.double()


class Rounded(NamedTuple):
    """A weight [out, in] in 4 bits: blocks of `block_size` weights along `in` share a scale.

    Attributes:
        levels: int8 [out, in], -8 to 7.
        scales: float32 [out, blocks].
        anchors: uint8 [out, blocks], the index in its block of the weight that sets the scale, which is rounded to -8 or 7.
    """

    levels: torch.Tensor
    scales: torch.Tensor
    anchors: torch.Tensor
    block_size: int

    def dequantized(self) -> torch.Tensor:
        """float32 [out, in]: multiples of the scales."""
        return self._by_row(self._blocks() * self.scales[..., None])

    def placed(self) -> torch.Tensor:
        """float32 [out, in]: weights that round-to-nearest puts on these levels, with the same scales.

        Multiples of the scales, except for each block's largest weight, which is 7.5 times the scale: it sets the scale.
        """
        levels, edge = self._blocks(), _edge(self.scales.double()).float()[..., None]
        # A weight at -8 levels would be larger than the one that sets the scale: put it at the edge, which rounds to -8.
        weight = torch.maximum(levels * self.scales[..., None], -edge)
        anchor = self.anchors.long()[..., None]
        return self._by_row(weight.scatter_(2, anchor, levels.gather(2, anchor).sign_() * edge))

    def _blocks(self) -> torch.Tensor:
        padding = -self.levels.shape[1] % self.block_size
        padded = torch.nn.functional.pad(self.levels, (0, padding)).float()
        return padded.view(len(padded), -1, self.block_size)

    def _by_row(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks.view(len(blocks), -1)[:, : self.levels.shape[1]]


def inverse_factor(moments: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Upper Cholesky factor of the moments' inverse, float64 [in, in]: row j says how an error in column j is spread over those after it.

    Args:
        moments: [in, in], sum over tokens of x x' of the layer's inputs (half of the layer's Hessian).
        damping: fraction of the mean diagonal that is added to the diagonal.
    """
    moments = moments.double().clone()
    unused = torch.diagonal(moments) == 0
    moments[unused, unused] = 1.0
    torch.diagonal(moments).add_(damping * torch.diagonal(moments).mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)


def round_with_inputs(weight: torch.Tensor, factor: torch.Tensor, block_size: int) -> Rounded:
    """Round a weight by GPTQ.

    Args:
        weight: [out, in].
        factor: `inverse_factor` of the moments of the layer's inputs.
        block_size: weights along `in` that share one scale, at most 256.
    """
    work = weight.detach().double().clone()
    width = work.shape[1]
    levels = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    scales, anchors = [], []
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        block = work[:, start:end].t().contiguous()  # a column of the weight is a row here: it lies together in memory
        largest, anchor = block.abs().max(dim=0)
        scale = (largest / (LEVELS - 0.5)).float().double()
        scale[scale == 0] = 1.0
        sign = torch.sign(block.gather(0, anchor[None]).squeeze(0))
        outer = (torch.where(sign < 0, -LEVELS, LEVELS - 1) * (sign != 0)).double()
        errors, chosen = torch.empty_like(block), torch.empty_like(block)
        for j, column in enumerate(block):
            spread = factor[start + j, start + j : end]
            level = (column / scale).round_().clamp_(-LEVELS, LEVELS - 1)
            chosen[j] = torch.where(anchor == j, outer, level)
            errors[j] = (column - chosen[j] * scale) / spread[0]
            block[j + 1 :].addr_(spread[1:], errors[j], alpha=-1)
        levels[:, start:end] = chosen.t().to(torch.int8)
        work[:, end:] -= errors.t().contiguous() @ factor[start:end, end:]
        scales.append(scale.float())
        anchors.append(anchor.to(torch.uint8))
    return Rounded(levels, torch.stack(scales, dim=1), torch.stack(anchors, dim=1), block_size)


class InputHessians:
    """Sums of x x' over all tokens but padding, for the inputs x of linear modules, collected while a model runs.

    Modules that read the same tensor (q, k and v; gate and up) share one matrix.
    """

    def __init__(self, modules: dict[str, torch.nn.Linear]):
        self.sums: dict[str, torch.Tensor] = {}
        self.owner: dict[str, str] = {}
        self.mask: torch.Tensor | None = None  # bool [batch, time]: false for padding
        self.last: tuple[object, str] = (None, "")
        self.factored: tuple[str, torch.Tensor | None] = ("", None)
        self.handles = [module.register_forward_pre_hook(self._watch(name)) for name, module in modules.items()]

    def _watch(self, name: str):
        def before(_module, arguments):
            if arguments[0] is not self.last[0]:
                self.last = (arguments[0], name)
                x = arguments[0][self.mask].float()
                self.sums[name] = self.sums.get(name, 0) + x.t() @ x
            self.owner[name] = self.last[1]

        return before

    def __getitem__(self, name: str) -> torch.Tensor:
        """float32 [in, in]."""
        return self.sums[self.owner[name]]

    def factor(self, name: str) -> torch.Tensor:
        """`inverse_factor` of a module's matrix; the last one is kept for the modules that share it."""
        owner = self.owner[name]
        if self.factored[0] != owner:
            self.factored = ("", None)  # freed before the next is made
            self.factored = (owner, inverse_factor(self.sums[owner]))
        return self.factored[1]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.last = (None, "")


def node_names(module: str) -> list[list[str]]:
    """Graph nodes that the model builder may make of a decoder layer's linear module: alternatives, each a list of names.

    The builder fuses q, k and v where it can, and splits a fused gate and up projection. Other modules have no nodes.
    """
    match = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(self_attn|mlp)\.(\w+)", module)
    if not match:
        return []
    layer, part, name = match.groups()
    part = "attn" if part == "self_attn" else part
    other = ["qkv_proj"] if name in ("q_proj", "k_proj", "v_proj") else ["gate_proj", "up_proj"]
    alternatives = [[name], other] if name in ("q_proj", "k_proj", "v_proj", "gate_up_proj") else [[name]]
    return [[f"/model/layers.{layer}/{part}/{node}/MatMul" for node in nodes] for nodes in alternatives]


def in_four_bits(section: params.Quantize, model) -> dict[str, torch.nn.Linear]:
    """The decoder layers' linear modules that the export will hold in 4 bits, by name."""
    other = [*section.int8_nodes, *section.nodes_to_exclude]
    modules = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        nodes = [node for names in node_names(name) for node in names]
        if nodes and not any(fnmatch.fnmatchcase(node, pattern) for node in nodes for pattern in other):
            modules[name] = module
    return modules


def calibrate(
    section: params.Quantize, model: Path, dataset: Path, scratch: Path, job: cli.Job
) -> dict[str, Callable[[], Rounded]]:
    """Round a model's weights by GPTQ, decoder layer by decoder layer, with prompts of the training split.

    A layer's inputs are those of the unquantized model.

    Args:
        scratch: folder for the rounded weights (a byte a weight) and for the states between two layers.

    Returns:
        What reads the rounded weight, by tensor name.

    Raises:
        NotBuildable: no training rows, or no module that will have 4 bits.
    """
    from transformers import AutoModelForCausalLM

    rows = Data(dataset / "train.parquet")
    if not len(rows):
        raise NotBuildable("quantize.calibration: gptq needs training prompts, and the train split is empty.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", trust_remote_code=False, local_files_only=True, use_safetensors=True
    ).eval()
    modules = in_four_bits(section, network)
    if not modules:
        raise NotBuildable(
            "quantize.calibration: gptq rounds to 4 bits, but with these int8_nodes no product has 4 bits. Set it to none."
        )
    decoder = DecoderLayers(network, device, scratch)
    batches = list(_batches(rows, section.calibration_rows, device))
    rounded: dict[str, Callable[[], Rounded]] = {}
    with job.progress(len(decoder.layers), "layers") as bar, torch.inference_mode():
        for index in (None, *range(len(decoder.layers))):
            with decoder.loaded(index) as layer:
                inside = set(layer.modules())
                own = {name: module for name, module in modules.items() if module in inside}
                hessians = InputHessians(own)
                for number, (ids, mask) in enumerate(batches):
                    hessians.mask = mask
                    decoder.run(number, ids, mask)
                hessians.close()
                for name, module in own.items():
                    weight = round_with_inputs(module.weight, hessians.factor(name), section.block_size)
                    rounded[f"{name}.weight"] = _stored(weight, scratch / f"{name}.safetensors")
            bar.update(int(index is not None))
    return rounded


def row_groups(rows: Data, count: int) -> Iterator[np.ndarray]:
    """The numbers of some rows, chosen by a fixed seed, batch by batch and the longest rows first: int64 [rows]."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    chosen = chosen[np.argsort(-rows.lengths[chosen], kind="stable")]
    while len(chosen):
        size = min(BATCH, max(1, TOKENS // int(rows.lengths[chosen[0]])))
        yield chosen[:size]
        chosen = chosen[size:]


def _batches(rows: Data, count: int, device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and mask (false for padding) of some rows, int64 and bool [rows, time], as `row_groups` chooses them."""
    for part in row_groups(rows, count):
        ids = rows.batch(part, device)["input_ids"]
        yield ids, torch.arange(ids.shape[1], device=device) < torch.from_numpy(rows.real[part]).to(device)[:, None]


def _stored(weight: Rounded, file: Path) -> Callable[[], Rounded]:
    """Write a rounded weight into a file. Returns what reads it."""
    from safetensors.torch import load_file, save_file

    tensors, block_size = weight._asdict(), weight.block_size
    save_file({name: tensors[name].cpu() for name in ("levels", "scales", "anchors")}, file)
    return lambda: Rounded(**load_file(file), block_size=block_size)


def placed(rounded: Mapping[str, Callable[[], Rounded]]) -> dict[str, Callable[[], np.ndarray]]:
    """What gives the weights for the exporter, float32 [out, in], by the names of all products that they may become."""
    parts: dict[str, list[tuple[str, int, int]]] = {}  # tensor, its part and the number of its parts
    for name in rounded:
        for nodes in node_names(name.removesuffix(".weight")):
            for index, node in enumerate(nodes):
                parts.setdefault(node, []).append((name, index, len(nodes)))

    def joined(several: list[tuple[str, int, int]]) -> np.ndarray:
        return np.concatenate(
            [np.array_split(rounded[name]().placed().numpy(), count)[index] for name, index, count in several]
        )

    return {node: partial(joined, several) for node, several in parts.items()}


# Targets other than the CPU have scales in 16 bits. Rounding them moves a weight by 1/2048 of it (another level is an eighth away or
# more), and may decide otherwise where a block's largest weight is half way between two levels (at most 0.2% of a layer's were seen).
HALF_ROUNDING, HALF_TIES = 1e-3, 0.01


def check_weights(folder: Path, rounded: Mapping[str, Callable[[], Rounded]]) -> None:
    """Compare the exported 4-bit weights with GPTQ's, product by product.

    Args:
        rounded: what gives the rounded weight, by tensor name.

    Raises:
        NotBuildable: a product is missing from the graph, or the exporter rounded it to other levels.
    """
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name.removesuffix("_Q4"): node for node in graph.node if node.op_type == "MatMulNBits"}
    parts_of: dict[tuple[str, ...], list[str]] = {}  # q, k and v of a layer may be parts of one node
    for name in rounded:
        alternatives = reversed(node_names(name.removesuffix(".weight")))
        names = next((names for names in alternatives if all(name in nodes for name in names)), None)
        if names is None:
            raise NotBuildable(f"the export has no 4-bit product for {name}: set quantize.calibration to none.")
        parts_of.setdefault(tuple(names), []).append(name)
    for names, parts in parts_of.items():
        expected = np.concatenate([rounded[name]().dequantized().numpy() for name in parts])
        exported = np.concatenate([_dequantized(nodes[name], tensors, folder) for name in names])
        half = any(tensors[nodes[name].input[2]].data_type == onnx.TensorProto.FLOAT16 for name in names)
        allowed = 1e-5 * np.abs(expected).max() + half * HALF_ROUNDING * np.abs(expected)
        wrong = expected.shape != exported.shape or np.abs(exported - expected) > allowed
        if np.mean(wrong) > half * HALF_TIES:
            raise NotBuildable(
                f"the exporter changed {int(np.sum(wrong))} of GPTQ's weights of {', '.join(names)}: "
                "set quantize.calibration to none."
            )


def _dequantized(node, tensors: dict, folder: Path) -> np.ndarray:
    """The weights of a symmetric 4-bit MatMulNBits node, float32 [out, in]."""
    from onnx import numpy_helper

    values = {a.name: a.i for a in node.attribute}
    packed, scales = (numpy_helper.to_array(tensors[name], str(folder)) for name in node.input[1:3])
    out, width, block = values["N"], values["K"], values["block_size"]
    packed = packed.reshape(out, -1)
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(out, -1, block).astype(np.float32) - 8
    return (levels * scales.reshape(out, -1, 1)).reshape(out, -1)[:, :width]
