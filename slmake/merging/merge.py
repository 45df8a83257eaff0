"""Merge an adapter into a base model, shard by shard and tensor by tensor, in bounded memory.

All sums are taken in float32 and rounded once, to the data type asked for. Over a float32 base, the result equals PEFT's
`merge_and_unload` bit for bit, but for three cases:

- PEFT rounds the update B A of a bfloat16 or float16 adapter to that type before it adds it; here it stays in float32.
- Over a base in another type than float32, PEFT adds in that type.
- Where an adapter changes only one of a tied embedding and output head, or each in another way, PEFT adds to the weights
  that both share, so that the merged model differs from the base with the adapter. Here the head gets a tensor of its own.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.merging.adapter import DTYPES, Adapter
from slmake.merging.fit import Plan, plan, tokenizer_files
from slmake.merging.shards import AsyncWriter, BufferPool, Shard
from slmake.merging.update import ROWS
from slmake.model_folder import KEPT, element_bits, tensor_shapes, weight_files

NAMES = {value: key for key, value in DTYPES.items()}
PIECE = 2**20  # elements of a weight that are merged at a time: as many as stay in the processor's cache


def fake_quantize(tensor, compute_dtype, quant_type: str, double_quant: bool):
    """The 4-bit weight that QLoRA trains on, dequantized (Dettmers et al. 2023, arXiv:2305.14314); float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        tensor.to(compute_dtype).contiguous(), quant_type=quant_type, compress_statistics=double_quant
    )
    return dequantize_4bit(packed, state).float()


@dataclass
class Merge:
    """What every shard's merge needs.

    Attributes:
        rebuild: what the weights in `linear` are replaced by before the merge, or None.
        dtype: of the result; `auto` keeps each tensor's own.
    """

    adapter: Adapter
    plan: Plan
    dtype: str
    rebuild: object
    linear: set[str]
    buffers: BufferPool

    def shard(self, source: Path, target: Path, bar) -> None:
        """Stream one shard: the header first, then each tensor by rows, merged where the adapter changes it.

        Raises:
            UserError: a type does not fit, or a merged value is not finite.
        """
        with (
            Shard(source, self.buffers) as shard,
            Shard(self.adapter.weights, self.buffers) as saved,
            AsyncWriter(target, self.buffers) as out,
        ):
            origins = {name: name for name in shard.kinds if name not in self.plan.copies}
            origins |= {name: origin for name, origin in self.plan.copies.items() if origin in shard.kinds}
            kinds = {name: shard.kinds[origin] for name, origin in origins.items()}
            # safetensors' own order: wide types first
            order = sorted(kinds, key=lambda name: (-element_bits(kinds[name]), name))
            written, header, offset = {}, {"__metadata__": {"format": shard.metadata.get("format", "pt")}}, 0
            for name in order:
                kind = NAMES[self.dtype] if self.dtype != "auto" and kinds[name] in DTYPES else kinds[name]
                shape = list(self.plan.shapes[name])
                length = math.prod(shape) * element_bits(kind) // 8
                header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + length]}
                written[name], offset = kind, offset + length
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            out.file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                if kinds[name] in DTYPES:
                    self._tensor(shard, saved, name, origins[name], DTYPES[written[name]], out)
                elif name in self.plan.changes:
                    raise UserError(f"{source}: {name} is of type {kinds[name]}: an adapter cannot be merged into it.")
                else:
                    for piece in shard.stream(name, 2 * PIECE):
                        out.write(piece)
                bar.update(1)

    def _tensor(self, shard: Shard, saved: Shard, name: str, origin: str, dtype: str, out: AsyncWriter) -> None:
        """Write one floating-point tensor in `dtype`, with the adapter's change where there is one.

        By rows, as many as stay in the processor's cache; whole where the change needs that.

        Raises:
            UserError: a value is not finite.
        """
        import torch

        change, narrow = self.plan.changes.get(name), getattr(torch, dtype)
        replacement = change.replacement if change else None
        update = self.adapter.update(change) if change else None
        rebuild = self.rebuild if name in self.linear and not replacement else None
        shape = self.plan.shapes[name]
        rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
        step = rows if rebuild or (update and update.whole) else max(ROWS if update else 1, PIECE // max(1, width))
        read = self._rows(saved, replacement, step) if replacement else self._rows(shard, origin, step)
        last, bad = 0, 0
        for tensor in read:
            first, last = last, last + (len(tensor) if shape else 1)
            if rebuild:
                tensor = rebuild(tensor)
            if update:
                if tensor.dtype != torch.float32:
                    tensor = self.buffers.get("sum", tensor.shape, torch.float32).copy_(tensor)
                update.add_to(tensor, first, last, self.buffers)
            if tensor.dtype != narrow:
                tensor = self.buffers.get("narrow", tensor.shape, narrow).copy_(tensor)
            if not bool(torch.isfinite(tensor.sum())):  # a sum of large numbers may overflow
                bad += int((~torch.isfinite(tensor)).sum())
            out.write(tensor.contiguous())
        if bad:
            raise UserError(
                f"{name}: {bad} values are not finite after the merge; the model would be broken. Train again with a lower learning_rate."
            )

    @staticmethod
    def _rows(shard: Shard, name: str, step: int) -> Iterator:
        """A tensor of a file by rows, at most `step` at a time."""
        import torch

        shape, kind = shard.shapes[name], getattr(torch, DTYPES[shard.kinds[name]])
        row_bytes = math.prod(shape[1:]) * kind.itemsize
        for data in shard.stream(name, max(1, step * row_bytes)):
            rows = len(data) // row_bytes
            yield data.view(kind).view(rows, *shape[1:]) if shape else data.view(kind).view(())


def merge(
    section: params.Merge, finetune: params.Finetune, base: Path, adapter_folder: Path, target: Path, job: cli.Job
) -> None:
    """Write the merged model into `target`."""
    files = weight_files(base)
    adapter = Adapter(adapter_folder)
    planned = plan(adapter, base, {name: shape for file in files for name, shape in tensor_shapes(file).items()})
    tokenizer = tokenizer_files(adapter, base, planned)
    rebuild, linear = None, set()
    if section.onto == "dequantized":
        from slmake.training.model import pick_device, pick_dtype

        linear = linear_weights(base)
        compute_dtype = pick_dtype(finetune.compute_dtype, pick_device())

        def rebuild(tensor):
            return fake_quantize(tensor, compute_dtype, finetune.quant_type, finetune.double_quant)

    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in KEPT:
            shutil.copyfile(path, target / path.name)
    for path in tokenizer:
        shutil.copyfile(path, target / path.name)
    import torch  # here, so that bad input is reported before it is loaded

    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is left to the thread that writes
    work = Merge(adapter, planned, section.dtype, rebuild, linear, BufferPool())
    with job.progress(len(planned.shapes), "tensors") as bar:
        for file in files:
            work.shard(file, target / file.name, bar)
    _write_config(section.dtype, planned, files, target)


def _write_config(dtype: str, planned: Plan, files: list[Path], target: Path) -> None:
    """Change config.json and the shards' index where the merged model differs from the base in more than values."""
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    before = json.dumps(config)
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if planned.copies:
        config["tie_word_embeddings"] = False
    if planned.vocabulary:
        text = config if "vocab_size" in config else config.get("text_config", config)
        text["vocab_size"] = planned.vocabulary
    if json.dumps(config) == before:
        return
    outputs.write_json(target / "config.json", config)
    index = target / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] |= {name: content["weight_map"][origin] for name, origin in planned.copies.items()}
        content.setdefault("metadata", {})["total_size"] = sum(tensor_bytes(target / file.name) for file in files)
        outputs.write_json(index, content)


def linear_weights(base: Path) -> set[str]:
    """Names of the weights that QLoRA stores in 4 bits: every linear layer's but the output head's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    }


def tensor_bytes(file: Path) -> int:
    """Size of a safetensors file without its header."""
    with open(file, "rb") as handle:
        (header,) = struct.unpack("<Q", handle.read(8))
    return file.stat().st_size - 8 - header
