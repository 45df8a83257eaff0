"""Fixtures of the tests of prepare."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from prepared import FIELDS, Built, write_rows
from tiny import make_tokenizer, write_params

from scripts import prepare
from slmake.data import splits as splits_module
from slmake.data import tokenize


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A folder with the test tokenizer only: prepare reads nothing else of the base model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """The test tokenizer."""
    return tokenize.load_tokenizer(tokenizer_folder)


@pytest.fixture
def build(tmp_path, tokenizer_folder):
    """Run prepare's main in this process: build(rows or source, name=…, base=…, field=value…)."""

    def run(source, name: str = "dataset", base: Path | None = None, stages=("finetune",), **fields) -> Built:
        if isinstance(source, list):
            source = write_rows(tmp_path / f"{name}-rows.json", source)
        source = {key: str(file) for key, file in source.items()} if isinstance(source, dict) else str(source)
        given = {**FIELDS, "source": source, **fields}
        params = write_params(tmp_path / f"{name}.yaml", all={"stages": list(stages)}, prepare=given)
        folder, report = tmp_path / name, tmp_path / f"{name}-report.json"
        places = ["--base", base or tokenizer_folder, "--output", folder, "--report", report]
        prepare.main([str(part) for part in ["--params", params, *places]])
        tables = [pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist() for split in splits_module.SPLITS]
        return Built(folder, json.loads(report.read_text(encoding="utf-8")), *tables)

    return run


@pytest.fixture
def refused(refused, build, tmp_path):
    """The error of a prepare that leaves no output: refused(rows or source, field=value…)."""

    def run(source, **options) -> str:
        message = refused(build, source, **options)
        left = [path.name for path in tmp_path.iterdir() if "dataset-report" in path.name or ".partial" in path.name]
        assert left == []
        assert not (tmp_path / "dataset").exists()
        return message.removeprefix("prepare: error: ")

    return run
