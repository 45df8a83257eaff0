"""Merge an adapter into a base model, shard by shard and tensor by tensor, in bounded memory."""

import json
import math
import os
import shutil
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.merging.adapter import Adapter
from slmake.model_folder import KEPT, check_safetensors, element_bits, weight_files

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PIECE = 2**20  # elements of a weight that are merged at a time: as many as stay in the processor's cache
ROWS = 32  # least rows of B in one product with A
READ_AHEAD = 2**26  # bytes that the kernel is asked to read before they are needed
WRITE_BACK = 2**26  # bytes after which the kernel is asked to start writing to the disk
NAMES = {value: key for key, value in DTYPES.items()}


class BufferPool:
    """Buffers that every tensor reuses: the kernel's work on new pages costs several times what the arithmetic does.

    Each buffer exists twice: `swap` changes to the other set, while the first is being written to the file.
    """

    def __init__(self):
        self.flat: dict = {}
        self.side = 0

    def swap(self) -> None:
        """Change to the other set of buffers; the current one is unchanged until the next swap."""
        self.side = 1 - self.side

    def get(self, role: str, shape: tuple[int, ...], dtype, swapped: bool = True):
        """A contiguous, uninitialized tensor; it overwrites the previous one of this role in the current set.

        Args:
            swapped: False for a buffer that exists once.
        """
        import torch

        count, key = math.prod(shape), (role, dtype, self.side if swapped else None)
        if count > len(self.flat.get(key, ())):
            self.flat[key] = None  # freed before the larger one is allocated
            self.flat[key] = torch.empty(count, dtype=dtype)
        return self.flat[key][:count].view(tuple(shape))


class AsyncWriter:
    """A file that a thread writes, in order, while the next piece is computed: writing takes as long as the arithmetic."""

    def __init__(self, path: Path, buffers: BufferPool):
        self.buffers, self.pool, self.last = buffers, ThreadPoolExecutor(1), None
        self.file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self.started = 0  # bytes that the kernel was asked to write to the disk

    def __enter__(self):
        return self

    def write(self, tensor) -> None:
        """Start writing a contiguous tensor's bytes. Returns when the previous write has ended, and swaps the buffers.

        Raises:
            OSError: the previous write failed.
        """
        import torch

        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        previous, self.last = self.last, self.pool.submit(self._write, data)
        if previous:
            previous.result()
        self.buffers.swap()

    def _write(self, data: memoryview) -> None:
        self.file.write(data)
        pending = self.file.tell() - self.started
        if pending >= WRITE_BACK and hasattr(os, "posix_fadvise"):
            # For pages that are not on the disk yet, this asks Linux to start writing them now, not at the end.
            os.posix_fadvise(self.file.fileno(), self.started, pending, os.POSIX_FADV_DONTNEED)
            self.started += pending

    def __exit__(self, kind, *_):
        self.pool.shutdown()
        try:
            if self.last and kind is None:
                self.last.result()
        finally:
            self.file.close()


def fake_quantize(tensor, compute_dtype, quant_type: str, double_quant: bool):
    """The 4-bit weight that QLoRA trains on, dequantized (Dettmers et al. 2023, arXiv:2305.14314); float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        tensor.to(compute_dtype).contiguous(), quant_type=quant_type, compress_statistics=double_quant
    )
    return dequantize_4bit(packed, state).float()


class Shard:
    """A safetensors file that is read piece by piece into the same buffers (a mapping costs a page fault for every few pages)."""

    def __init__(self, path: Path, buffers: BufferPool):
        self.buffers, self.kinds, self.pool = buffers, check_safetensors(path), ThreadPoolExecutor(1)
        self.handle = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        (length,) = struct.unpack("<Q", self.handle.read(8))
        specs = json.loads(self.handle.read(length))
        self.metadata = specs.pop("__metadata__", {})
        self.shapes = {name: spec["shape"] for name, spec in specs.items()}
        self.begin = {name: 8 + length + spec["data_offsets"][0] for name, spec in specs.items()}
        self.bytes = {name: spec["data_offsets"][1] - spec["data_offsets"][0] for name, spec in specs.items()}
        self.asked = 0  # end of what the kernel was asked to read ahead
        self.slot = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(cancel_futures=True)
        self.handle.close()

    def stream(self, name: str, step: int) -> Iterator:
        """A tensor's bytes in order, at most `step` at a time, as uint8; a thread reads the next ones meanwhile.

        There are three buffers: one is being read into, one is computed with, one may still be being written.
        """
        import torch

        pending = deque()
        for first, last in pieces(self.bytes[name], step):
            self.slot = (self.slot + 1) % 3
            flat = self.buffers.get(f"read {self.slot}", (last - first,), torch.uint8, swapped=False)
            pending.append(self.pool.submit(self._read, flat, self.begin[name] + first))
            if len(pending) == 2:
                yield pending.popleft().result()
        for read in pending:
            yield read.result()

    def _read(self, flat, offset: int):
        """Fill a buffer with the file's bytes from `offset`."""
        if hasattr(os, "posix_fadvise") and offset + READ_AHEAD // 2 > self.asked:
            os.posix_fadvise(self.handle.fileno(), offset, READ_AHEAD, os.POSIX_FADV_WILLNEED)
            self.asked = offset + READ_AHEAD
        self.handle.seek(offset)
        view = memoryview(flat.numpy())
        while len(view):
            count = self.handle.readinto(view)
            if not count:
                raise UserError(f"{self.handle.name}: became shorter while it was read. Fetch the model again.")
            view = view[count:]
        return flat


def pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive pieces of at most `step`."""
    for first in range(0, length, step):
        yield first, min(first + step, length)


def merge_shard(
    source: Path,
    target: Path,
    adapter: Adapter,
    dtype: str,
    rebuild,
    where: dict[str, str],
    linear: set[str],
    buffers: BufferPool,
    bar,
) -> None:
    """Stream one shard: the header first, then each tensor by rows, merged where the adapter has a pair for it.

    Raises:
        UserError: shapes or types do not fit, or a merged value is not finite.
    """
    with Shard(source, buffers) as shard, AsyncWriter(target, buffers) as out:
        kinds, shapes = shard.kinds, shard.shapes
        header, offset = ({"__metadata__": {"format": shard.metadata.get("format", "pt")}}), 0
        order = sorted(
            kinds, key=lambda name: (-element_bits(kinds[name]), name)
        )  # safetensors' own order: wide types first
        written = {}
        for name in order:
            kind = NAMES[dtype] if dtype != "auto" and kinds[name] in DTYPES else kinds[name]
            length = math.prod(shapes[name]) * element_bits(kind) // 8
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [offset, offset + length]}
            written[name], offset = kind, offset + length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        out.file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            pair = adapter.pair(where[name]) if name in where else None
            if kinds[name] in DTYPES:
                change = rebuild if name in where or name in linear else None
                transposed = bool(adapter.config.get("fan_in_fan_out"))
                merge_tensor(shard, name, pair, transposed, change, DTYPES[written[name]], buffers, out)
            elif pair:
                raise UserError(f"{source}: {name} is of type {kinds[name]}: an adapter cannot be merged into it.")
            else:
                for piece in shard.stream(name, 2 * PIECE):
                    out.write(piece)
            bar.update(1)


def merge_tensor(
    shard: Shard,
    name: str,
    pair: tuple | None,
    transposed: bool,
    rebuild,
    dtype: str,
    buffers: BufferPool,
    out: AsyncWriter,
) -> None:
    """Write one floating-point tensor in `dtype`, with the adapter's update where there is a pair.

    By rows, as many as stay in the processor's cache; whole where `rebuild` is called with the tensor.

    Raises:
        UserError: the pair is of another shape, or a value is not finite.
    """
    import torch

    shape, kind = shard.shapes[name], getattr(torch, DTYPES[shard.kinds[name]])
    rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
    if pair:
        b, a, scaling = pair
        found = (a.shape[1], len(b)) if transposed else (len(b), a.shape[1])
        if found != tuple(shape):
            raise UserError(
                f"the adapter's update of {name} is {found}, the weight is {tuple(shape)}: it belongs to another base model."
            )
    row_bytes, last, bad = width * kind.itemsize, 0, 0
    step = rows if rebuild or (pair and transposed) else max(ROWS, PIECE // max(1, width))
    for data in shard.stream(name, max(1, step * row_bytes)):
        first, last = last, last + len(data) // row_bytes
        tensor = data.view(kind).view(last - first, *shape[1:]) if shape else data.view(kind).view(())
        if rebuild:
            tensor = rebuild(tensor)
        if pair:
            if tensor.dtype != torch.float32:
                tensor = buffers.get("sum", tensor.shape, torch.float32).copy_(tensor)
            # Never of fewer rows: such a product takes another kernel, which may round differently from the whole one.
            start = 0 if transposed else max(0, min(first, last - ROWS))
            part = b[start : None if transposed else last]
            room = buffers.get("update", (len(part), a.shape[1]), torch.float32, swapped=False)
            update = torch.mm(part, a, out=room)
            tensor = tensor.add_((update.T if transposed else update[first - start :]).mul_(scaling))
        narrow = getattr(torch, dtype)
        if tensor.dtype != narrow:
            tensor = buffers.get("narrow", tensor.shape, narrow).copy_(tensor)
        if not bool(torch.isfinite(tensor.sum())):  # a sum of large numbers may overflow
            bad += int((~torch.isfinite(tensor)).sum())
        out.write(tensor.contiguous())
    if bad:
        raise UserError(
            f"{name}: {bad} values are not finite after the merge; the model would be broken. Train again with a lower learning_rate."
        )


def match_weights(adapter: Adapter, files: list[Path]) -> dict[str, str]:
    """Base tensor name to the adapter's target name, for every pair of the adapter.

    Raises:
        UserError: the adapter changes a weight that the base does not have.
    """
    names = {name for file in files for name in check_safetensors(file)}
    missing = sorted(set(adapter.pairs) - names)
    if missing:
        raise UserError(
            f"the base model has no tensor {missing[0]} ({len(missing)} of the adapter's {len(adapter.pairs)} are missing): it is another base model."
        )
    return {name: name for name in adapter.pairs}


def merge(
    section: params.Merge, finetune: params.Finetune, base: Path, adapter_folder: Path, target: Path, job: cli.Job
) -> None:
    """Write the merged model into `target`."""
    files = weight_files(base)
    adapter = Adapter(adapter_folder)
    where = match_weights(adapter, files)
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
    total = sum(len(check_safetensors(file)) for file in files)
    import torch  # here, so that bad input is told before it is loaded

    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is left to the thread that writes
    buffers = BufferPool()
    with job.progress(total, "tensors") as bar:
        for file in files:
            merge_shard(file, target / file.name, adapter, section.dtype, rebuild, where, linear, buffers, bar)
    if section.dtype != "auto":
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = section.dtype
        outputs.write_json(target / "config.json", config)
        index = target / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text(encoding="utf-8"))
            content["metadata"]["total_size"] = sum(tensor_bytes(target / file.name) for file in files)
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
