"""What the tests of the script evaluate share: datasets and exports for it."""

import json
from pathlib import Path

from tiny import write_params

from scripts import prepare
from slmake import params
from slmake.export import builder

TONES = ("sadness", "joy", "fear", "surprise")


def make_dataset(folder: Path, base: Path, rows: list[dict], **changes: object) -> Path:
    """`prepare`'s output for other rows or parameters."""
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    given = {"source": str(folder / "rows.json"), **changes}
    file = write_params(
        folder / "params.yaml", all={"stages": ["finetune"]}, prepare=given
    )  # an empty test split may pass
    arguments = ["--params", file, "--base", base, "--output", folder / "dataset", "--report", folder / "report.json"]
    prepare.main([str(argument) for argument in arguments])
    return folder / "dataset"


def export(model: Path, folder: Path, precision: str) -> Path:
    """The model as ONNX."""
    section = params.Quantize(precision=precision, algo_config="rtn", matmul_mixed_precision=None)
    folder.mkdir(parents=True)
    builder.export(section, model, folder, folder.parent / "cache")
    return folder
