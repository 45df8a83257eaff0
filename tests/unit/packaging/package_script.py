"""What the tests of the script package share: its call, its inputs, and its files."""

from pathlib import Path

import pytest
from tiny import ROOT, write_params

from scripts import package
from tools import verify

FIGURES = {
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
FILES = {
    *(
        "README.md",
        "run.py",
        "serve.py",
        "openai_api.py",
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


def pack(parts: Path, folder: Path, **section: object) -> Path:
    """Run the script in this process; returns the package's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"license_files": [str(ROOT / "LICENSE")], **section}
    file = write_params(
        folder / "params.yaml",
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
        "--lock",
        ROOT / "envs" / "cpu.lock",
    ]
    arguments += ["--materials", parts / "rows.json", ROOT / "Snakefile", "--output", folder / "package"]
    package.main([str(argument) for argument in arguments])
    return folder / "package"


def refused(capsys, *arguments: object) -> str:
    """verify's error; it exits with 1."""
    with pytest.raises(SystemExit) as caught:
        verify.main([str(argument) for argument in arguments])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    return message[message.index("verify: error: ") :]
