"""What the tests of the script package share: its call, its inputs, and its files."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import ROOT, write_params

from scripts import package
from slmake.packaging import checksums
from tools import verify

SCORES = {
    "accuracy": 0.8,
    "accuracy_low": 0.75,
    "accuracy_high": 0.85,
    "macro_f1": 0.78,
    "macro_f1_low": 0.7,
    "macro_f1_high": 0.83,
    "outside_labels": 0.0,
    "restricted_accuracy": 0.81,
    "restricted_macro_f1": 0.8,
    "answer_perplexity": 1.2,
    "size_bytes": 1000,
    "per_class": {label: {"precision": 0.9, "recall": 0.7, "f1": 0.79, "rows": 6} for label in ("joy", "fear")},
}
GATE = {
    "gate": "min_accuracy",
    "metric": "accuracy",
    "kind": "minimum",
    "model": "fp32",
    "bound": 0.7,
    "value": 0.8,
    "passed": True,
}
SLOW = GATE | {"gate": "checks[0]", "metric": "latency_ms_p50", "kind": "maximum", "bound": 900.0, "value": 123.4}
FILES = {
    *(
        "README.md",
        "run.py",
        "serve.py",
        "openai_api.py",
        "answer_stream.py",
        "tool_calls.py",
        "inference_model.json",
        "prompt.json",
        "metrics.json",
        "licenses/LICENSE",
        "SHA256SUMS",
        "bom.cdx.json",
        "provenance.intoto.json",
    ),
    *(
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ),
}


def pack(
    parts: Path, folder: Path, options: Sequence[object] = (), container: str | None = None, **section: object
) -> Path:
    """Run the script in this process, with further `options`; returns the package's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"license_files": [str(ROOT / "LICENSE")], **section}
    file = write_params(
        folder / "params.yaml",
        all={"container": container},
        package=settings,
        quantize={"precision": "fp32", "calibration": "none", "int8_nodes": []},
    )
    arguments = ["--params", file, "--model", parts / "model", "--dataset", parts / "dataset"]
    for name in ("base", "dataset"):
        arguments += [f"--{name}-report", parts / f"{name}.json"]
    arguments += [
        "--metrics",
        parts / "metrics.json",
        "--gates",
        parts / "gates.json",
        "--locks",
        ROOT / "envs" / "cpu.lock",
        ROOT / "envs" / "cuda.lock",
    ]
    arguments += ["--materials", parts / "rows.json", ROOT / "Snakefile", "--output", folder / "package"]
    package.main([str(argument) for argument in (*arguments, *options)])
    return folder / "package"


def refused(capsys, *arguments: object) -> str:
    """verify's error; it exits with 1."""
    with pytest.raises(SystemExit) as caught:
        verify.main([str(argument) for argument in arguments])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    return message[message.index("verify: error: ") :]


def reseal(folder: Path, *names: str) -> None:
    """What a forger without a key can do after an edit: make the checksums fit again, and the provenance or bill if named."""
    own = (checksums.SUMS, checksums.SIGNATURE, checksums.PROVENANCE)
    if "bill" in names:
        bom = json.loads((folder / checksums.BOM).read_text())
        for part in bom["components"]:
            if part["type"] == "file":
                part["hashes"][0]["content"] = hashlib.sha256((folder / part["name"]).read_bytes()).hexdigest()
        (folder / checksums.BOM).write_text(checksums.canonical(bom))
    if "provenance" in names:
        statement = json.loads((folder / checksums.PROVENANCE).read_text())
        statement["subject"] = [{"name": n, "digest": {"sha256": d}} for n, d in checksums.digests(folder, own).items()]
        (folder / checksums.PROVENANCE).write_text(checksums.canonical(statement))
    (folder / checksums.SUMS).write_text(checksums.sums_text(checksums.digests(folder, own[:2])))


def change_bill(folder: Path, change) -> None:
    """Edit the bill of materials, and make checksums and provenance fit it."""
    bom = json.loads((folder / checksums.BOM).read_text())
    change(bom)
    (folder / checksums.BOM).write_text(checksums.canonical(bom))
    reseal(folder, "provenance")


def swap_for_link(folder: Path, name: str) -> None:
    """Move a file out of the package and leave a link to it."""
    (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to(folder.parent / "moved")


def file_components(bom: dict) -> list[dict]:
    return [part for part in bom["components"] if part["type"] == "file"]
