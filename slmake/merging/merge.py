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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.merging.adapter import DTYPES, Adapter
from slmake.merging.fit import Plan, plan, tokenizer_files
from slmake.merging.shards import BufferPool, Buffers, Output, Shard, as_bytes, in_order, pieces
from slmake.merging.update import ROWS, Update
from slmake.model_folder import KEPT, element_bits, meta_model, tensor_shapes, weight_files

NAMES = {value: key for key, value in DTYPES.items()}
PIECE = 2**20  # elements of a weight that are merged at a time: as many as stay in the processor's cache
AHEAD = 32  # pieces that are begun before the first of them is written: more than there are threads


def fake_quantize(tensor, compute_dtype, quant_type: str, double_quant: bool):
    """The 4-bit weight that QLoRA trains on, dequantized (Dettmers et al. 2023, arXiv:2305.14314); float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        tensor.to(compute_dtype).contiguous(), quant_type=quant_type, compress_statistics=double_quant
    )
    return dequantize_4bit(packed, state).float()


@dataclass
class Piece:
    """Some rows of a tensor: what one thread merges at a time.

    Attributes:
        name: of the tensor in the merged model.
        source, read_at: the file that the values come from and the offset of these rows in it.
        shape, kind: of these rows in that file; () for a scalar.
        first, last: the rows, counted in the tensor.
        ends: whether these are the tensor's last rows.
        write_at, narrow: the offset of these rows in the merged file and their data type there.
        update: the adapter's change of the tensor, or None.
        rebuild: what replaces the weight before the merge, or None.
        whole: whether this is a large tensor that cannot be merged by rows.
    """

    name: str
    source: Shard
    read_at: int
    shape: tuple[int, ...]
    kind: object
    first: int
    last: int
    ends: bool
    write_at: int
    narrow: object
    update: Update | None
    rebuild: Callable | None
    whole: bool


@dataclass
class Merge:
    """What every shard's merge needs.

    Attributes:
        rebuild: what the weights in `linear` are replaced by before the merge, or None.
        dtype: of the result; `auto` keeps each tensor's own.
        threads: they read, merge and write pieces, each with its own buffers.
        whole: the buffers of tensors that need to be whole, of which `one_whole` lets only one at a time into memory.
    """

    adapter: Adapter
    plan: Plan
    dtype: str
    rebuild: Callable | None
    linear: set[str]
    threads: ThreadPoolExecutor
    buffers: BufferPool = field(default_factory=BufferPool)
    whole: Buffers = field(default_factory=Buffers)
    one_whole: Lock = field(default_factory=Lock)

    def shard(self, source: Path, target: Path, bar) -> None:
        """Write one shard: the header first, then each tensor by rows, merged where the adapter changes it.

        Raises:
            UserError: a type does not fit, or a merged value is not finite.
        """
        with Shard(source) as shard, Shard(self.adapter.weights) as saved, Output(target) as out:
            origins = {name: name for name in shard.kinds if name not in self.plan.copies}
            origins |= {name: origin for name, origin in self.plan.copies.items() if origin in shard.kinds}
            kinds = {name: shard.kinds[origin] for name, origin in origins.items()}
            values = {name: self._values(shard, saved, name, origin) for name, origin in origins.items()}
            # safetensors' own order: wide types first
            order = sorted(kinds, key=lambda name: (-element_bits(kinds[name]), name))
            header, offset = {"__metadata__": {"format": shard.metadata.get("format", "pt")}}, 0
            for name in order:
                kind = NAMES[self.dtype] if self.dtype != "auto" and kinds[name] in DTYPES else kinds[name]
                source, own = values[name]
                shape = source.shapes[own]
                length = math.prod(shape) * element_bits(kind) // 8
                header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + length]}
                offset += length
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            begin = out.write(struct.pack("<Q", len(text)) + text, 0)
            tasks = (
                piece
                for name in order
                for piece in self._pieces(
                    shard,
                    name,
                    origins[name],
                    values[name],
                    header[name]["dtype"],
                    begin + header[name]["data_offsets"][0],
                )
            )
            bad = 0
            with closing(in_order(self.threads, partial(self._merge, out), tasks, AHEAD)) as merged:
                for piece, end, not_finite in merged:
                    out.complete(end)
                    bad += not_finite
                    if bad and piece.ends:
                        raise UserError(
                            f"{piece.name}: {bad} values are not finite after the merge; the model would be broken. Train again with a lower learning_rate."
                        )
                    bar.update(piece.ends)

    def _values(self, shard: Shard, saved: Shard, name: str, origin: str) -> tuple[Shard, str]:
        """The file that a tensor's values come from, and their name in it: the adapter's where it replaces them."""
        change = self.plan.changes.get(name)
        return (saved, change.replacement) if change and change.replacement else (shard, origin)

    def _pieces(
        self, shard: Shard, name: str, origin: str, values: tuple[Shard, str], kind: str, write_at: int
    ) -> Iterator[Piece]:
        """A tensor by rows, as many as stay in the processor's cache; whole where the change needs that.

        Args:
            values: see `_values`; the layout of the merged file is of the same shape.
            kind: safetensors' name of the type that is written.
            write_at: the tensor's offset in the merged file.

        Raises:
            UserError: the adapter changes a tensor of a type that cannot be merged.
        """
        import torch

        change = self.plan.changes.get(name)
        source, own = values
        update = self.adapter.update(change) if change else None
        rebuild = self.rebuild if name in self.linear and source is shard else None
        if shard.kinds[origin] in DTYPES:
            shape, wide, narrow = source.shapes[own], *(getattr(torch, DTYPES[k]) for k in (source.kinds[own], kind))
        elif change:
            raise UserError(
                f"{shard.handle.name}: {name} is of type {shard.kinds[origin]}: an adapter cannot be merged into it."
            )
        else:  # copied as bytes
            shape, wide, narrow = [shard.bytes[origin]], torch.uint8, torch.uint8
        rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
        whole = bool(rebuild or (update and update.whole))
        step = rows if whole else max(ROWS if update else 1, PIECE // max(1, width))
        for first, last in pieces(rows, max(1, step)):
            yield Piece(
                name,
                source,
                source.begin[own] + first * width * wide.itemsize,
                (last - first, *shape[1:]) if shape else (),
                wide,
                first,
                last,
                last == rows,
                write_at + first * width * narrow.itemsize,
                narrow,
                update,
                rebuild,
                whole,
            )

    def _merge(self, out: Output, piece: Piece) -> tuple[Piece, int, int]:
        """Merge a piece and write it; returns it, its end in the merged file, and how many of its values are not finite."""
        import torch

        buffers = self.whole if piece.whole else self.buffers
        with self.one_whole if piece.whole else nullcontext():
            tensor = piece.source.read(buffers.get("read", piece.shape, piece.kind), piece.read_at)
            if piece.rebuild:
                tensor = piece.rebuild(tensor)
            if piece.update:
                if tensor.dtype != torch.float32:
                    tensor = buffers.get("sum", tensor.shape, torch.float32).copy_(tensor)
                piece.update.add_to(tensor, piece.first, piece.last, buffers)
            if tensor.dtype != piece.narrow:
                tensor = buffers.get("narrow", tensor.shape, piece.narrow).copy_(tensor)
            bad = 0
            if not bool(torch.isfinite(tensor.sum())):  # a sum of large numbers may overflow
                bad = int((~torch.isfinite(tensor)).sum())
            return piece, out.write(as_bytes(tensor.contiguous()), piece.write_at), bad


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

    # One thread of arithmetic in each: threads of their own overlap reading and writing, too.
    threads = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    with threads, job.progress(len(planned.shapes), "tensors") as bar:
        work = Merge(adapter, planned, section.dtype, rebuild, linear, threads)
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
        for file in files:
            new = planned.copies.keys() & tensor_shapes(target / file.name).keys()
            content["weight_map"] |= dict.fromkeys(sorted(new), file.name)
        content.setdefault("metadata", {})["total_size"] = sum(tensor_bytes(target / file.name) for file in files)
        outputs.write_json(index, content)


def linear_weights(base: Path) -> set[str]:
    """Names of the weights that QLoRA stores in 4 bits: every linear layer's but the output head's."""
    import torch

    model = meta_model(base)
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
