"""A model folder in Hugging Face layout: its weight files, and whether weights, configuration and tokenizer fit each other."""

import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError, first_line, is_failure
from slmake.model_config import refuse_foreign_kernels, refuse_oversized, refuse_quantized
from slmake.sources.pickles import PICKLES, pickle_advice

SINGLE = "model.safetensors"  # all weights in one file
INDEX = "model.safetensors.index.json"  # the shard that has each weight
KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken")
LAYER = re.compile(r"\.(layers|h|blocks)\.\d+\.")  # in a tensor's name: a part of a decoder layer


def check_safetensors(path: Path, remedy: str = "Download the file again.") -> dict[str, str]:
    """Data type of every tensor, by name. UserError, with the remedy, if the file is truncated or not safetensors.

    Only the header is read: its length must match the file's, and every tensor's bytes its shape and type
    (https://github.com/huggingface/safetensors, Format).
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size - 8, 100_000_000):
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ in the header is not an object of texts")
        tensors = {name: spec for name, spec in header.items() if name != "__metadata__"}
        end = max((spec["data_offsets"][1] for spec in tensors.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"the header describes {8 + length + end:,} bytes, the file has {size:,}")
        for name, spec in tensors.items():
            first, last = spec["data_offsets"]
            if not 0 <= first <= last or last - first != math.prod(spec["shape"]) * element_bits(spec["dtype"]) / 8:
                raise ValueError(
                    f"{name}: {last - first:,} bytes do not hold a {spec['dtype']} tensor of shape {spec['shape']}"
                )
        return {name: spec["dtype"] for name, spec in tensors.items()}
    except KeyError as error:
        reason = f"no {error} in the header"
    except (struct.error, ValueError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error)
    raise UserError(f"{path}: truncated or corrupt safetensors: {reason}. {remedy}")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shape of every tensor of a checked safetensors file, by name."""
    with open(path, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    return {name: spec["shape"] for name, spec in header.items() if name != "__metadata__"}


def element_bits(dtype: str) -> int:
    """Bits of one element of a safetensors type: the number in its name (F32, BF16, F8_E4M3); 8 for BOOL."""
    return 8 if dtype == "BOOL" else int(re.search(r"\d+", dtype)[0])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, checked; where it has a single file, that one, as transformers takes it, and no shards.

    Raises:
        UserError: no weights, pickled weights only, a shard of the index missing, a damaged file, or a tensor that is in two shards, in
            none, or in another one than the index says.
    """
    single, index, places = folder / SINGLE, folder / INDEX, {}
    if index.exists() and not single.exists():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {tensor: str(name) for tensor, name in content.items()}
            names = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: damaged: no weight_map in it. Download the folder again.") from None
        for name in names:
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise UserError(
                    f"{index}: it names the file {name!r}; a plain name of a file in the same folder is allowed. Correct it, or get "
                    "the model from where you trust it."
                )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {index.name} names {missing[0]}, which is not there. Download the folder again."
            )
        files = [folder / name for name in names]
    else:
        files = [single] if single.exists() else []
    if not files:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickled:
            raise UserError(f"{folder}: weights are in {pickle_advice(pickled[0])}.")
        raise UserError(f"{folder}: no weights ({SINGLE}, or {INDEX} with its shards).")
    found: dict[str, str] = {}
    for file in files:
        for tensor in check_safetensors(file):
            if tensor in found:
                raise UserError(
                    f"{folder}: tensor {tensor} is in {found[tensor]} and in {file.name}; which one belongs to the model cannot be known. "
                    "Download the folder again, or get the model from where you trust it."
                )
            found[tensor] = file.name
    for tensor, name in places.items():
        if found.get(tensor) != name:
            where = f"it is in {found[tensor]}" if tensor in found else "no shard has it"
            raise UserError(
                f"{index}: it says that tensor {tensor} is in {name}, but {where}. Download the folder again."
            )
    return files


def refuse_odd_files(folder: Path) -> None:
    """Refuse a folder with a pipe, a socket or a device, whose reading need not end, or with a link to something outside of it.

    What is linked would be copied, and shared with the model. A snapshot in the hub's cache may link to the blobs beside it.

    Raises:
        UserError: naming the file, and a link's target.
    """
    root = folder.resolve()
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    for parent, folders, files in os.walk(root):
        for path in (Path(parent, name) for name in (*folders, *files)):
            target = path.resolve() if path.is_symlink() else root
            if not any(target.is_relative_to(where) for where in allowed):
                raise UserError(
                    f"{folder / path.relative_to(root)}: a link to {target}, which is outside of the model folder. Replace it by a "
                    "copy of that file if it belongs to the model, otherwise remove it."
                )
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(
                    f"{folder / path.relative_to(root)}: a pipe, a socket or a device, not a file. Remove it, or replace it by a file."
                )


def refuse_two_heads(folder: Path, tied: bool) -> None:
    """Refuse an output head beside the embedding that it is tied to, where the two differ: which one counts depends on who reads them.

    transformers computes with both, model builders and other runtimes with the embedding. PEFT's merge of `modules_to_save: [lm_head]`
    leaves a model so.

    Args:
        tied: tie_word_embeddings of the configuration.

    Raises:
        UserError: they differ.
    """
    from safetensors import safe_open

    found = {}
    for file in weight_files(folder) if tied else ():
        for name, shape in tensor_shapes(file).items():
            if name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight")):
                found[name] = (file, shape)
    if len(found) != 2 or len({"lm_head" in name for name in found}) != 2:
        return
    (first, second), shapes = found, [shape for _, shape in found.values()]
    with safe_open(found[first][0], "pt") as one, safe_open(found[second][0], "pt") as other:
        parts = (one.get_slice(first), other.get_slice(second))
        rows = range(0, shapes[0][0], 4096) if shapes[0] == shapes[1] else ()
        if rows and all(parts[0][row : row + 4096].equal(parts[1][row : row + 4096]) for row in rows):
            return
    raise UserError(
        f"{folder}: config.json has tie_word_embeddings, but {first} and {second} differ: transformers computes with both, other runtimes with "
        "one. Where the weights are right, set tie_word_embeddings to false in config.json."
    )


def refuse_not_finite(files: Iterable[Path], source: str) -> None:
    """Refuse weights with NaN or infinite values; one tensor is in memory at a time.

    Args:
        source: where the weights come from, for the message.

    Raises:
        UserError: naming the tensor and how many of its values are not finite.
    """
    import torch
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open cannot be iterated)
                value = tensors.get_tensor(name)
                if not value.is_floating_point():
                    continue
                value = value.float() if value.itemsize == 1 else value
                if torch.isfinite(value.sum()):  # a finite sum has finite terms; one of large terms may overflow
                    continue
                bad = int((~torch.isfinite(value)).sum())
                if bad:
                    raise UserError(
                        f"{source}: tensor {name} has {bad:,} of {value.numel():,} values that are not finite (NaN or infinite), as "
                        f"{value.dtype}. The model is broken, or fetch_model.dtype cannot represent it: download it again, or choose a wider dtype."
                    )


def copy_kept(source: Path, target: Path) -> None:
    """Copy what a model folder has beside its weights: configuration, tokenizer and chat templates."""
    for path in (*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")):
        if path.is_file() and path.suffix in KEPT:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def copy_folder(source: Path, target: Path, dtype: str) -> None:
    """Copy a model folder, casting floating-point weights to `dtype` (`auto`: as they are), one shard at a time."""
    files = weight_files(source)
    copy_kept(source, target)
    if files == [source / SINGLE]:
        (target / INDEX).unlink(missing_ok=True)
    if dtype == "auto":
        for file in files:
            shutil.copyfile(file, target / file.name)
        return
    import torch
    from safetensors.torch import load_file, save_file

    torch_dtype, total = getattr(torch, dtype), 0
    for file in files:
        tensors = load_file(file)
        cast = {name: value.to(torch_dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        save_file(cast, target / file.name, metadata={"format": "pt"})
        total += sum(value.numel() * value.element_size() for value in cast.values())
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    outputs.write_json(target / "config.json", config)
    index = target / INDEX
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content.setdefault("metadata", {})["total_size"] = total
        outputs.write_json(index, content)


def meta_model(folder: Path):
    """A folder's modules, as transformers makes them, without memory for weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def refuse_incomplete(source: Path, report: dict) -> None:
    """Refuse weights that do not fit their configuration: transformers would replace missing ones by random numbers.

    Args:
        report: what `from_pretrained(output_loading_info=True)` returns beside the model.

    Raises:
        UserError: a tensor is missing, of another shape, or of a layer that the configuration does not have.
    """
    other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    missing, over = sorted(report["missing_keys"]), sorted(filter(LAYER.search, report["unexpected_keys"]))
    for names, reason in (
        (missing, "not in the weights, but config.json asks for it"),
        (other, "of another shape than config.json says"),
        (over, "in the weights, but config.json has no such layer"),
    ):
        if names:
            more = f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
            raise UserError(
                f"{source}: tensor {names[0]} is {reason}{more}. Weights and configuration are of different models, or damaged: "
                "download them again."
            )


def unusable(folder: Path, error: Exception) -> UserError:
    """The error for a configuration that transformers fails on."""
    return UserError(
        f"{folder}/config.json: transformers cannot make a causal language model of it: {type(error).__name__}: {first_line(error)}"
    )


def check_complete(folder: Path) -> None:
    """Check the weights of a model folder against its configuration, and the tokenizer against the embedding; only headers are read.

    Raises:
        UserError: not a causal language model, a tensor too few or of another shape, or a token without an embedding.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # as in check_loadable
        raise unusable(folder, error) from None
    refuse_incomplete(folder, report)
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    ids = {
        token: number for token, number in tokenizer.get_vocab().items() if token not in tokenizer.all_special_tokens
    }
    ids[tokenizer.eos_token] = tokenizer.eos_token_id
    token, highest = max(ids.items(), key=lambda pair: pair[1])
    if highest >= rows:
        raise UserError(
            f"{folder}: the tokenizer's token {token!r} has the number {highest}, the embedding only {rows} rows: it is another model's "
            "tokenizer, or tokenizer_config.json names a token that the vocabulary does not have."
        )


# In a process of its own: neither a crash nor an endless search can be stopped within the library.
TRY_TOKENIZER = r"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
for text in ("", "It's 12.5 o'clock!\n\n  ", "caf\xe9 \u65e5\u672c \U0001f642 x\u0301", "a" * 500, "a b " * 200):
    for special in (False, True):
        tokenizer.decode(tokenizer.encode(text, add_special_tokens=special).ids)
"""


def _try_tokenizer(folder: Path) -> None:
    """Encode and decode some short texts with tokenizer.json, if there is one.

    Raises:
        UserError: it fails, crashes, or needs more than 10 s of processor time or 8 GiB.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return
    command = [sys.executable, "-c", TRY_TOKENIZER, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        long = done.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
        reason = "that takes too long" if long else said[-1] if said else "it crashes"
        raise UserError(
            f"{folder}: no usable tokenizer (tokenizer.json and tokenizer_config.json): it does not read some short texts: {reason}"
        )


def check_loadable(folder: Path) -> None:
    """Check configuration and tokenizer of a model folder; of most weights, only headers are read.

    Raises:
        UserError: no config.json, an architecture that needs remote code or is unknown, an output head that is tied and another, or a
            tokenizer without an end token.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json: this is not a model folder in Hugging Face layout.")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: it holds an adapter (adapter_config.json) beside a model. Name the adapter's folder in the section adapter, or take "
            "adapter_config.json out."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json is damaged: not a JSON object. Download it again.")
    refuse_quantized(folder / "config.json", config)
    refuse_foreign_kernels(folder / "config.json", config)
    shapes = [shape for file in weight_files(folder) for shape in tensor_shapes(file).values()]
    refuse_oversized(folder / "config.json", config, len(shapes), sum(map(math.prod, shapes)))
    from transformers import AutoConfig, AutoTokenizer

    try:
        known = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{folder}/config.json: transformers does not know this model without remote code: {first_line(error)}"
        ) from None
    except Exception as error:  # whatever a wrong number in it causes
        raise unusable(folder, error) from None
    refuse_two_heads(folder, bool(getattr(known, "tie_word_embeddings", False)))
    _try_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise UserError(
            f"{folder}: no usable tokenizer (tokenizer.json and tokenizer_config.json): {first_line(error)}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no end-of-text token, so a fine-tuned model could never learn to stop. "
            "Set `eos_token` in tokenizer_config.json."
        )
