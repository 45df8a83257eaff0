"""What the tests of the script fetch_model share: its call and its error."""

import json
import re
from pathlib import Path

import pytest
from tiny import write_params

from scripts import fetch_model


def fetch(tmp_path: Path, source: object, **fields: object) -> tuple[Path, dict]:
    """Run the script in this process; returns the folder and the report."""
    section = {"source": str(source), "sha256": None, "dtype": "auto", **fields}
    params = write_params(tmp_path / "params.yaml", fetch_model=section)
    folder, report = tmp_path / "build" / "base", tmp_path / "build" / "base.json"
    fetch_model.main(["--params", str(params), "--output", str(folder), "--report", str(report)])
    return folder, json.loads(report.read_text(encoding="utf-8"))


def refused(tmp_path: Path, capsys, source: object, **fields: object) -> str:
    """The script's error; it exits with 1 and leaves nothing behind."""
    with pytest.raises(SystemExit) as caught:
        fetch(tmp_path, source, **fields)
    assert caught.value.code == 1
    assert not (tmp_path / "build").exists() or list((tmp_path / "build").iterdir()) == []
    message = capsys.readouterr().err
    assert re.search(r"^fetch_model: error: ", message, re.M)
    return message[message.index("fetch_model: error: ") :]


def change(folder: Path, name: str, **fields: object) -> None:
    """Set fields of a JSON file of a model folder."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(content | fields), encoding="utf-8")
