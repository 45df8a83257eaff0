"""Fold the adapter into the base model, tensor by tensor.

    python scripts/merge.py --params params.yaml --base build/base --adapter build/adapter --output build/merged

Reads the section `merge` (and `finetune.method`, to check that `onto` fits), the base model's safetensors shards and the
PEFT adapter. Writes the merged model with the same shards, tied weights, configuration and tokenizer. One tensor is in
memory at a time, whatever the model's size. W' = W + s B A in float32 (Hu et al. 2021, arXiv:2106.09685), with s as PEFT
computes it, so that the result equals `merge_and_unload` bit for bit in float32.
"""

import json
import math
import re
import shutil
import struct
from pathlib import Path

from common import cli, outputs, params
from common.errors import UserError
from fetch_model import KEPT, check_safetensors, weight_files

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES = {value: key for key, value in DTYPES.items()}


class Adapter:
    """A PEFT LoRA adapter on disk: its pairs of matrices by the name of the base weight they change."""

    def __init__(self, folder: Path):
        """Read the configuration and the names.

        Raises:
            UserError: no adapter there, damaged, or of a kind that cannot be merged exactly.
        """
        from safetensors import safe_open

        config_path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        for path in (config_path, weights):
            if not path.exists():
                raise UserError(f"{path}: no such file. Build the adapter with `snakemake --cores all {folder}`.")
        check_safetensors(weights)
        self.config = outputs.read_json(config_path, output=folder)
        if self.config.get("peft_type") != "LORA":
            raise UserError(
                f"{config_path}: peft_type {self.config.get('peft_type')} cannot be merged here; only LORA can."
            )
        for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens"):
            if self.config.get(key):
                raise UserError(f"{config_path}: {key} is set; such an adapter cannot be merged tensor by tensor.")
        if self.config.get("bias", "none") != "none":
            raise UserError(f"{config_path}: bias: {self.config['bias']} cannot be merged here; train with bias: none.")
        self.file = safe_open(weights, "pt")
        self.pairs: dict[str, tuple[str, str]] = {}
        for name in self.file.keys():  # noqa: SIM118 (safe_open cannot be iterated)
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
            if not match:
                raise UserError(
                    f"{weights}: tensor {name} is not the A or B matrix of a linear layer; it cannot be merged here."
                )
            target = match[1] + ".weight"
            pair = self.pairs.get(target, ("", ""))
            self.pairs[target] = (name, pair[1]) if match[2] == "A" else (pair[0], name)

    def scaling(self, module: str) -> float:
        """PEFT's factor before B A: alpha / r, or alpha / sqrt(r) with rank stabilization (arXiv:2312.03732)."""
        rank, alpha = self.config["r"], self.config["lora_alpha"]
        for pattern, value in (self.config.get("rank_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                rank = value
                break
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def delta(self, target: str, memory: "Memory"):
        """The update of one base weight, float32, in the weight's own shape; it stands in `memory` until the next one."""
        name_a, name_b = self.pairs[target]
        if not name_a or not name_b:
            raise UserError(f"the adapter has only one of the two matrices for {target}. Build the adapter again.")
        a, b = self.file.get_tensor(name_a).float(), self.file.get_tensor(name_b).float()
        import torch

        update = memory.take("update", (len(b), a.shape[1]), torch.float32)
        torch.mm(b, a, out=update).mul_(self.scaling(target.removesuffix(".weight")))
        return update.T if self.config.get("fan_in_fan_out") else update


class Memory:
    """Memory that every tensor uses again: the kernel's work on fresh pages costs several times what the sums in them do."""

    def __init__(self):
        self.flat: dict = {}

    def take(self, role: str, shape: tuple[int, ...], dtype):
        """A contiguous tensor of a shape and type, with whatever was in it; what `role` held before is lost."""
        import torch

        count = math.prod(shape)
        if count > len(self.flat.get((role, dtype), ())):
            self.flat[role, dtype] = None  # freed before the larger one is there
            self.flat[role, dtype] = torch.empty(count, dtype=dtype)
        return self.flat[role, dtype][:count].view(tuple(shape))


def fake_quantize(tensor, compute_dtype, quant_type: str, double_quant: bool):
    """The 4-bit weight that QLoRA trains on, dequantized (Dettmers et al. 2023, arXiv:2305.14314); float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        tensor.to(compute_dtype).contiguous(), quant_type=quant_type, compress_statistics=double_quant
    )
    return dequantize_4bit(packed, state).float()


def merge_shard(
    source: Path,
    target: Path,
    adapter: Adapter,
    dtype: str,
    rebuild,
    where: dict[str, str],
    linear: set[str],
    memory: Memory,
    bar,
) -> None:
    """Stream one shard: the header first, then each tensor, merged where the adapter has a pair for it.

    Raises:
        UserError: shapes do not fit, or a merged value is not finite.
    """
    import torch
    from safetensors import safe_open

    kinds = check_safetensors(source)
    with safe_open(source, "pt") as shard, open(target, "wb") as out:
        metadata = shard.metadata() or {}
        header, offset = ({"__metadata__": {"format": metadata.get("format", "pt")}}), 0
        shapes = {name: shard.get_slice(name).get_shape() for name in kinds}
        order = sorted(kinds, key=lambda name: (-_size(kinds[name]), name))  # safetensors' own order: wide types first
        written = {}
        for name in order:
            kind = NAMES[dtype] if dtype != "auto" and kinds[name] in DTYPES else kinds[name]
            length = math.prod(shapes[name]) * _size(kind)
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [offset, offset + length]}
            written[name], offset = kind, offset + length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            with safe_open(source, "pt") as again:  # mapped pages go with the mapping
                tensor = again.get_tensor(name)
                if name in where:
                    wide = memory.take("sum", tensor.shape, torch.float32)
                    base = wide.copy_(rebuild(tensor) if rebuild else tensor)
                    update = adapter.delta(where[name], memory)
                    if update.shape != base.shape:
                        raise UserError(
                            f"the adapter's update of {name} is {tuple(update.shape)}, the weight is {tuple(base.shape)}: it belongs to another base model."
                        )
                    tensor = base.add_(update)
                elif name in linear:
                    tensor = rebuild(tensor)
                if tensor.is_floating_point():
                    narrow = getattr(torch, DTYPES[written[name]])
                    if tensor.dtype != narrow:
                        tensor = memory.take("narrow", tensor.shape, narrow).copy_(tensor)
                    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
                        bad = int((~torch.isfinite(tensor)).sum())
                        raise UserError(
                            f"{name}: {bad} values are not finite after the merge; the model would be broken. Train again with a lower learning_rate."
                        )
                out.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
            bar.update(1)


def _size(kind: str) -> int:
    return int(re.search(r"\d+", kind)[0]) // 8 if kind != "BOOL" else 1


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
        from finetune import pick_device, pick_dtype

        linear = linear_weights(base)
        compute_dtype = pick_dtype(finetune.compute_dtype, pick_device())

        def rebuild(tensor):
            return fake_quantize(tensor, compute_dtype, finetune.quant_type, finetune.double_quant)

    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in KEPT:
            shutil.copyfile(path, target / path.name)
    total = sum(len(check_safetensors(file)) for file in files)
    memory = Memory()
    with job.progress(total, "tensors") as bar:
        for file in files:
            merge_shard(file, target / file.name, adapter, section.dtype, rebuild, where, linear, memory, bar)
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
    """Names of the weights that QLoRA holds in 4 bits: every linear layer's but the output head's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    head = empty.get_output_embeddings()
    modules = empty.named_modules()
    return {f"{name}.weight" for name, one in modules if type(one) is torch.nn.Linear and one is not head}


def tensor_bytes(file: Path) -> int:
    """Size of a safetensors file without its header."""
    with open(file, "rb") as handle:
        (header,) = struct.unpack("<Q", handle.read(8))
    return file.stat().st_size - 8 - header


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the merged model to")
    args = parser.parse_args(argv)
    with cli.job("merge", args.log) as job:
        everything = params.load(args.params)
        with outputs.written(args.output) as (folder,):
            merge(everything.merge, everything.finetune, args.base, args.adapter, folder, job)
        job.say(
            f"merged model in {args.output} ({outputs.folder_size(args.output) / 1e6:.0f} MB, {job.seconds():.1f} s)"
        )


if __name__ == "__main__":
    main()
