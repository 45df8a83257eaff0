"""`verify` names a local base model that changed after the build: a folder, or one file, wherever it lies."""

import hashlib
import shutil
from collections.abc import Iterator

import pytest
from tiny import write_params

from slmake.packaging.provenance import provenance
from slmake.sources.fetching import fetch
from slmake.sources.schemes import parse
from tools import verify

CHANGES = {
    "weights": lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
    "one byte of the tokenizer": lambda folder: (folder / "tokenizer_config.json").open("a").write("\n"),
    "a file more": lambda folder: (folder / "added_tokens.json").write_text("{}"),
    "a file less": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.fixture
def model(base, tmp_path, monkeypatch):
    """A copy of the base model in the folder of the build."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(base, tmp_path / "data" / "base")


def changed(source: str, tmp_path) -> Iterator[list[str]]:
    """What `verify` says after a build from `source` and after what the test does then."""
    record = fetch(parse(source), "model", tmp_path / "downloads", None).record
    statement = provenance({}, [], {}, {"base": record, "dataset": {"source": {}}})
    file = write_params(tmp_path / "params.yaml", fetch_model={"source": source, "sha256": None})
    yield verify.changed_inputs(statement, file)
    yield verify.changed_inputs(statement, file)


@pytest.mark.parametrize("where", ["relative", "absolute"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_named(model, tmp_path, change, where):
    source = "data/base" if where == "relative" else str(model)
    states = changed(source, tmp_path)
    assert next(states) == []
    CHANGES[change](model)
    assert next(states) == [f"{source}: changed since the package was made; build again"]


@pytest.mark.parametrize("where", ["relative", "absolute"])
def test_a_changed_file_is_named(model, tmp_path, where):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    source = file.name if where == "relative" else str(file)
    states = changed(source, tmp_path)
    assert next(states) == []
    file.write_bytes(b"GGUf")
    assert next(states) == [f"{source}: changed since the package was made; build again"]


def test_what_is_not_read_and_what_is_not_here_is_no_change(model, tmp_path):
    states = changed("data/base", tmp_path)
    assert next(states) == []
    (model / "README.md").write_text("About the model", encoding="utf-8")
    assert next(states) == []
    states = changed("data/base", tmp_path)
    assert next(states) == []
    shutil.rmtree(model)
    assert next(states) == []


def test_the_folder_s_sum_is_the_one_that_fetch_model_recorded(model, tmp_path):
    record = fetch(parse("data/base"), "model", tmp_path / "downloads", None).record
    lines = [f"{name}\0{hashlib.sha256((model / name).read_bytes()).hexdigest()}\n" for name in sorted(record["files"])]
    assert record["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_foreign_package_names_no_folder_that_is_read(model, tmp_path, monkeypatch):
    """Only what params.yaml here names is read: not all of this disk."""
    monkeypatch.setattr(verify, "sums_of", lambda path: pytest.fail(f"{path} was read"))
    file = write_params(tmp_path / "params.yaml", fetch_model={"source": "data/other", "sha256": None})
    for name in ("/", "data/base", str(model / "config.json"), "/etc/passwd"):
        entry = {"name": name, "digest": {"sha256": "0" * 64}}
        statement = {"predicate": {"buildDefinition": {"resolvedDependencies": [entry]}}}
        assert verify.changed_inputs(statement, file) == []
