"""GPTQ: round weights to 4 bits so that the layer's outputs on real prompts change least (Frantar et al. 2022, arXiv:2210.17323).

Round-to-nearest treats every weight alone. GPTQ rounds column by column and corrects the columns that are not rounded yet
for the error already made, weighted by the second moments of the layer's inputs. The model builder does not have this
method. But it rounds to nearest, which leaves weights unchanged that lie on a level already. `calibrate` writes such
weights: an ordinary model folder for the ordinary exporter.
"""

import fnmatch
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.model_folder import weight_files
from slmake.training.data import Data
from slmake.training.qat import round_to_nearest

LEVELS = 8  # symmetric 4 bits: -8 to 7
BATCH = 32  # rows in one forward pass


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


def round_with_inputs(
    weight: torch.Tensor, moments: torch.Tensor, block_size: int, damping: float = 0.01
) -> torch.Tensor:
    """GPTQ's weights, such that round-to-nearest does not move them to another level.

    Args:
        weight: [out, in].
        moments: [in, in], sum over tokens of x x' of the layer's inputs (half of the layer's Hessian).
        block_size: weights along `in` that share one scale.
        damping: fraction of the mean diagonal that is added to the diagonal.

    Returns:
        float32 [out, in]: multiples of each block's scale. Only each block's largest weight is 7.5 times the scale: it sets
        the scale, and is rounded to -8 or 7.
    """
    work = weight.detach().double().clone()
    moments = moments.double().clone()
    width = work.shape[1]
    unused = torch.diagonal(moments) == 0
    moments[unused, unused] = 1.0
    torch.diagonal(moments).add_(damping * torch.diagonal(moments).mean())
    # Upper Cholesky factor of the inverse: row j is how an error in column j is spread over the columns after it.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    result = torch.empty_like(work)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        block = work[:, start:end]
        largest, anchor = block.abs().max(dim=1)
        scale = (largest / (LEVELS - 0.5)).float().double()
        scale[scale == 0] = 1.0
        edge = _edge(scale)
        sign = torch.sign(block.gather(1, anchor[:, None]).squeeze(1))
        outer = torch.where(sign < 0, -LEVELS, LEVELS - 1) * scale
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = block[:, j]
            rounded = torch.round(column / scale).clamp_(-LEVELS, LEVELS - 1) * scale
            here = anchor == j
            rounded = torch.where(here, outer, rounded)
            errors[:, j] = (column - rounded) / factor[start + j, start + j]
            if j + 1 < end - start:
                block[:, j + 1 :] -= errors[:, j : j + 1] * factor[start + j, start + j + 1 : end]
            # A weight at -8 levels would be larger than the one that sets the scale: put it at the edge, which rounds to -8.
            result[:, start + j] = torch.maximum(torch.where(here, sign * edge, rounded), -edge)
        work[:, end:] -= errors @ factor[start:end, end:]
    return result.float()


class InputHessians:
    """Sums of x x' over all tokens but padding, for the inputs x of linear modules, collected while a model runs.

    Modules that read the same tensor (q, k and v; gate and up) share one matrix.
    """

    def __init__(self, modules: dict[str, torch.nn.Linear]):
        self.sums: dict[str, torch.Tensor] = {}
        self.owner: dict[str, str] = {}
        self.mask: torch.Tensor | None = None  # bool [batch, time]: false for padding
        self.last: tuple[object, str] = (None, "")
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
    section: params.Quantize, model: Path, dataset: Path, target: Path, job: cli.Job
) -> dict[str, np.ndarray]:
    """Write a float32 copy of a model folder with GPTQ's weights, from prompts of the training split.

    The input Hessians of all layers come from one pass of the unquantized model.

    Returns:
        The weights that the export must have after rounding, float32 [out, in], by tensor name.

    Raises:
        UserError: no training rows, or no module that will have 4 bits.
    """
    from transformers import AutoModelForCausalLM

    rows = Data(dataset / "train.parquet")
    if not len(rows):
        raise UserError("quantize.calibration: gptq needs training prompts, and the train split is empty.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
    ).to(device)
    network.eval()
    modules = in_four_bits(section, network)
    if not modules:
        raise UserError(
            "quantize.calibration: gptq rounds to 4 bits, but with these int8_nodes no product has 4 bits. Set it to none."
        )
    chosen = np.random.default_rng(0).permutation(len(rows))[: section.calibration_rows]
    chosen = chosen[np.argsort(-rows.lengths[chosen], kind="stable")]
    hessians = InputHessians(modules)
    with job.progress(len(chosen), "calibration rows") as bar, torch.inference_mode():
        for start in range(0, len(chosen), BATCH):
            part = chosen[start : start + BATCH]
            ids = rows.batch(part, device)["input_ids"]
            hessians.mask = (
                torch.arange(ids.shape[1], device=device) < torch.from_numpy(rows.real[part]).to(device)[:, None]
            )
            network(input_ids=ids, attention_mask=hessians.mask.long(), use_cache=False, logits_to_keep=1)
            bar.update(len(part))
    hessians.close()
    rounded: dict[str, torch.Tensor] = {}
    with job.progress(len(modules), "products") as bar, torch.inference_mode():
        for name, module in modules.items():
            weight = round_with_inputs(module.weight, hessians[name], section.block_size)
            rounded[f"{name}.weight"] = weight.cpu()
            bar.update(1)
    _write(model, target, rounded)
    return {name: round_to_nearest(weight, 4, section.block_size).numpy() for name, weight in rounded.items()}


def _write(model: Path, target: Path, replaced: dict[str, torch.Tensor]) -> None:
    """Copy a model folder in float32 with some weights replaced."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = weight_files(model)
    for path in sorted(model.iterdir()):
        if path.is_file() and path not in weights:
            shutil.copyfile(path, target / path.name)
    for path in weights:
        with safe_open(path, "pt") as shard:
            tensors = {name: replaced.get(name, shard.get_tensor(name)) for name in shard.keys()}  # noqa: SIM118
        tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    outputs.write_json(target / "config.json", {**config, "dtype": "float32"})


# Targets other than the CPU have scales in 16 bits. Rounding them moves a weight by 1/2048 of it (another level is an eighth away or
# more), and may decide otherwise where a block's largest weight is half way between two levels (at most 0.2% of a layer's were seen).
HALF_ROUNDING, HALF_TIES = 1e-3, 0.01


def check_weights(folder: Path, wanted: dict[str, np.ndarray]) -> None:
    """Compare the exported 4-bit weights with GPTQ's.

    Raises:
        UserError: a product is missing from the graph, or the exporter rounded it to other levels.
    """
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name.removesuffix("_Q4"): node for node in graph.node if node.op_type == "MatMulNBits"}
    parts_of: dict[tuple[str, ...], list[np.ndarray]] = {}  # q, k and v of a layer may be parts of one node
    for name, weight in wanted.items():
        alternatives = reversed(node_names(name.removesuffix(".weight")))
        names = next((names for names in alternatives if all(name in nodes for name in names)), None)
        if names is None:
            raise UserError(f"the export has no 4-bit product for {name}: set quantize.calibration to none.")
        parts_of.setdefault(tuple(names), []).append(weight)
    for names, parts in parts_of.items():
        expected = np.concatenate(parts)
        exported = np.concatenate([_dequantized(nodes[name], tensors) for name in names])
        half = any(tensors[nodes[name].input[2]].data_type == onnx.TensorProto.FLOAT16 for name in names)
        allowed = 1e-5 * np.abs(expected).max() + half * HALF_ROUNDING * np.abs(expected)
        wrong = expected.shape != exported.shape or np.abs(exported - expected) > allowed
        if np.mean(wrong) > half * HALF_TIES:
            raise UserError(
                f"the exporter changed {int(np.sum(wrong))} of GPTQ's weights of {', '.join(names)}: "
                "set quantize.calibration to none."
            )


def _dequantized(node, tensors: dict) -> np.ndarray:
    """The weights of a symmetric 4-bit MatMulNBits node, float32 [out, in]."""
    from onnx import numpy_helper

    values = {a.name: a.i for a in node.attribute}
    packed, scales = (numpy_helper.to_array(tensors[name]) for name in node.input[1:3])
    out, width, block = values["N"], values["K"], values["block_size"]
    packed = packed.reshape(out, -1)
    levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(out, -1, block).astype(np.float32) - 8
    return (levels * scales.reshape(out, -1, 1)).reshape(out, -1)[:, :width]
