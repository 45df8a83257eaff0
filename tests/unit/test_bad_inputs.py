"""Every input of the table tests/bad_inputs.py is refused in one message with its key words, and nothing is left behind."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import bad_inputs
import pytest
import yaml
from merge_script import edited, make_adapter
from tiny import write_params

from scripts import fetch_model, merge, prepare
from slmake import params
from slmake.errors import UserError
from slmake.olive.reader import Reader
from slmake.sources import schemes
from tools import import_olive

SMALLEST = {
    "fetch_model": {"source": "models/tiny"},
    "prepare": {"source": "data/rows.json", "text_template": "{phrase}\n{tone}"},
}
TABLES = [
    getattr(bad_inputs, name)
    for name in vars(bad_inputs)
    if name.startswith(("PARAM_", "SOURCES", "SECRETS", "DATA_", "MODELS", "ADAPTERS", "PACKAGES", "OLIVE_"))
]


def test_the_table_has_300_inputs_and_none_twice():
    assert sum(len(table) for table in TABLES) >= 300
    for table in TABLES:
        entries = [repr(entry) for entry in table]
        assert len(set(entries)) == len(entries)


def each(entries, check: Callable[..., str | None]) -> None:
    """Try all entries; those whose check returns what is wrong are listed at once."""
    wrong = [f"{entry}\n  {problem}" for entry in entries if (problem := check(*entry))]
    assert not wrong, "\n".join(wrong)


def message(call: Callable, *arguments: object) -> str:
    """What a refusal says; empty if there is none."""
    try:
        call(*arguments)
    except (UserError, ValueError) as error:
        return str(error)
    return ""


def missing(expected: str, text: str) -> str | None:
    """What is wrong with a message: it lacks the expected part."""
    return None if expected in text and "Traceback" not in text else f"expected {expected!r}, got {text!r}"


class Script:
    """A script's `main` in this process, with its outputs in a folder of its own."""

    def __init__(self, main: Callable, folder: Path, capsys, *options: str):
        self.main, self.folder, self.capsys, self.options = main, folder, capsys, options

    def refusal(self, expected: str, *arguments: object, **sections: dict) -> str | None:
        """What is wrong with the script's refusal of these arguments and sections of params.yaml."""
        file, built = write_params(self.folder / "params.yaml", **sections), self.folder / "built"
        outputs = [part for option in self.options for part in (option, built / option.strip("-"))]
        self.capsys.readouterr()
        code = 0
        try:
            self.main([str(part) for part in ["--params", file, *arguments, *outputs]])
        except SystemExit as stopped:
            code = stopped.code
        text = self.capsys.readouterr().err
        left = [path.name for path in built.iterdir()] if built.exists() else []
        shutil.rmtree(built, ignore_errors=True)
        if code != 1 or left or text.count(": error: ") != 1:
            return f"exit code {code}, left behind: {left}, {text!r}"
        return missing(expected, text)


# params.yaml


def load(folder: Path, sections: dict) -> str:
    content = copy.deepcopy(SMALLEST)
    for name, fields in sections.items():
        content.setdefault(name, {}).update(fields)
    (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return message(params.load, folder / "params.yaml")


def lines_of(text: str) -> list[str]:
    """The errors of a message; its first line counts them."""
    first, *rest = text.splitlines() or [""]
    assert f": {len(rest)} error{'s' * (len(rest) > 1)}; nothing was run. See docs/params.md." in first
    return [line.strip() for line in rest]


def test_values_of_params(tmp_path):
    def check(section: str, field: object, value: object, line: str) -> str | None:
        lines = lines_of(load(tmp_path, {section: {field: value}}))
        return None if lines == [line] else str(lines)

    each(bad_inputs.PARAM_VALUES, check)


def test_sections_of_params(tmp_path):
    def check(sections: dict, line: str) -> str | None:
        lines = lines_of(load(tmp_path, sections))
        return None if len(lines) == 1 and lines[0].startswith(line) else str(lines)

    each(bad_inputs.PARAM_SECTIONS, check)


def test_params_that_are_no_yaml(tmp_path):
    """One line that names the trouble and the line of the file."""

    def check(content: str, reason: str, line: int) -> str | None:
        (tmp_path / "params.yaml").write_text(content, encoding="utf-8")
        text = message(params.load, tmp_path / "params.yaml")
        whole = ": not valid YAML: " in text and f"line {line}" in text and "\n" not in text
        return missing(reason, text) if whole else text

    each(bad_inputs.PARAM_TEXTS, check)


# sources


def test_sources():
    each(bad_inputs.SOURCES, lambda text, why: missing(why, message(schemes.parse, text)))


def test_sources_with_a_secret_are_refused_without_it(tmp_path):
    def check(text: str) -> str | None:
        said = [message(schemes.parse, text, must_pin) for must_pin in (True, False)]
        said += [load(tmp_path, {section: {"source": text}}) for section in ("fetch_model", "prepare")]
        return None if all(said) and bad_inputs.SECRET not in "".join(said) else str(said)

    each(((text,) for text in bad_inputs.SECRETS), check)


# datasets


@pytest.fixture
def prepared(base, tmp_path, capsys) -> Callable:
    """What is wrong with prepare's refusal of a source."""
    script = Script(prepare.main, tmp_path, capsys, "--output", "--report")

    def refusal(expected: str, source: Path, **fields: object) -> str | None:
        section = {"source": str(source), "text_template": "{phrase}\n{tone}", "answer": "tone", **fields}
        return script.refusal(expected, "--base", base, all={"stages": ["finetune"]}, prepare=section)

    return refusal


def test_datasets_that_cannot_be_read(prepared, tmp_path):
    def check(name: str, content: bytes | None, reason: str) -> str | None:
        source = tmp_path / name
        source.unlink(missing_ok=True) if content is None else source.write_bytes(content)
        return prepared(f"{source}{reason}", source)

    each(bad_inputs.DATA_FILES, check)


def test_rows_that_do_not_fit(prepared, tmp_path):
    def check(rows: list, fields: dict, expected: str) -> str | None:
        (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        return prepared(expected, tmp_path / "rows.json", **{"text_template": None, "answer": None, **fields})

    each(bad_inputs.DATA_ROWS, check)


# models and adapters (packages: packaging/test_verify.py)


def edit(folder: Path, name: str, how: object) -> None:
    """Do to a file what the table says."""
    path = folder / name
    match how:
        case None:
            path.unlink()
        case bytes():
            path.write_bytes(how)
        case int():
            path.write_bytes(path.read_bytes()[:how])
        case str():
            path.rename(folder / how)
        case dict():
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | how), encoding="utf-8")


def test_models(base, tmp_path, capsys):
    script = Script(fetch_model.main, tmp_path, capsys, "--output", "--report")

    def check(edits: dict, expected: str) -> str | None:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        for name, how in edits.items():
            edit(folder, name, how)
        return script.refusal(expected, fetch_model={"source": str(folder), "sha256": None, "dtype": "auto"})

    each(bad_inputs.MODELS, check)


def test_adapters(base, tmp_path, capsys):
    adapter = make_adapter(base, tmp_path / "made")
    script = Script(merge.main, tmp_path, capsys, "--output")

    def check(config: dict, expected: str) -> str | None:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        edited(adapter, folder, **config)
        return script.refusal(f"{folder}{expected}", "--base", base, "--adapter", folder)

    each(bad_inputs.ADAPTERS, check)


# Olive


def test_olive_files(tmp_path):
    def check(text: str, expected: str) -> str | None:
        (tmp_path / "olive.json").write_text(text, encoding="utf-8")
        return missing(expected, message(import_olive.read, tmp_path / "olive.json"))

    each(bad_inputs.OLIVE_TEXTS, check)


def test_olive_passes():
    def check(passes: list, field: str, expected: str) -> str | None:
        model = {"type": "HfModel", "model_path": "org/name"}
        content = {"input_model": model, "passes": {f"p{i}": each_pass for i, each_pass in enumerate(passes)}}
        rows = Reader(content, "main").run().rows
        return missing(expected, "".join(row.note for row in rows if (row.kind, row.field) == ("unknown", field)))

    each(bad_inputs.OLIVE_PASSES, check)
