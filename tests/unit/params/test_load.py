"""params.yaml as a file: what is read of it, and files that cannot be read."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
import yaml
from ruamel.yaml import YAML
from tiny import ROOT

from slmake import params
from slmake.errors import UserError
from slmake.params.errors import ParamsLoader

SMALLEST = {
    "fetch_model": {"source": "models/tiny"},
    "prepare": {"source": "data/rows.json", "text_template": "{phrase}\n{tone}"},
}


# Files that are right


def test_smallest_file(write):
    """Every other field has a default."""
    loaded = params.load(write())
    assert loaded.prepare.source == "data/rows.json"
    assert (loaded.prepare.max_seq_len, loaded.prepare.test_fraction) == (1024, 0.2)
    assert (loaded.finetune.lora_r, loaded.finetune.learning_rate) == (16, 2e-4)
    assert loaded.all.stages == ["rehearse", "finetune", "merge", "quantize", "evaluate", "gates", "package", "report"]


TEXTS = (
    "08",
    "1e3",
    "010",
    "0o17",
    "1:30",
    "1_000",
    "yes",
    "null",
    "~",
    "2026-01-02",
    "=",
    "<<",
    "",
    " x ",
    "a: b",
    "#c",
    "é\n- d",
)


def test_what_is_written_is_read_as_the_same(tmp_path):
    """Of `make seeds`, Azure ML's steps and imported configurations; DVC reads it as YAML 1.2."""
    path = tmp_path / "params.yaml"
    labels = {text: text for text in TEXTS}
    content = SMALLEST | {"prepare": SMALLEST["prepare"] | {"labels": labels, "columns": [1, 1e3, True, None, *TEXTS]}}
    path.write_text(params.dumped(content), encoding="utf-8")
    read = yaml.load(path.read_text(encoding="utf-8"), ParamsLoader)
    assert read == content == YAML(typ="safe").load(path)
    assert list(map(type, read["prepare"]["columns"])) == list(map(type, content["prepare"]["columns"]))


def test_section_is_one_part(write):
    path = write(finetune={"lora_r": 8})
    assert type(params.section(path, "finetune")) is params.Finetune
    assert params.section(path, "finetune").lora_r == 8


def test_sections_cannot_be_changed(write):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        params.load(write()).finetune.lora_r = 4


@pytest.mark.parametrize("name", ["max_seq_len", "source_max_len"])
def test_source_max_len_is_another_name_of_max_seq_len(write, name):
    """The name that Axolotl's and QLoRA's users know gives the same section, and so the same build."""
    loaded = params.load(write(prepare={name: 256})).prepare
    assert loaded.max_seq_len == 256
    assert params.as_json(loaded) == params.as_json(params.load(write(prepare={"max_seq_len": 256})).prepare)
    assert "source_max_len" not in params.as_json(loaded)


def test_both_names_at_once_are_refused(mistakes):
    """The message does not suggest the very name it refuses."""
    (line,) = mistakes(prepare={"max_seq_len": 64, "source_max_len": 128})
    assert "max_seq_len" in line
    assert "source_max_len" in line
    assert "Did you mean `max_seq_len`" not in line


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("2E-4", 2e-4), ("+3e-4", 3e-4), ("1.5e-5", 1.5e-5), ("1e-3", 0.001), ("1", 1.0)]
)  # fmt: skip
def test_numbers_in_scientific_notation(tmp_path, text, value):
    """YAML 1.1 takes `2e-4` for text; here it is the number that is meant."""
    path = tmp_path / "params.yaml"
    path.write_text(f"{yaml.safe_dump(SMALLEST)}\nfinetune:\n  learning_rate: {text}\n", encoding="utf-8")
    assert params.load(path).finetune.learning_rate == value


def test_text_that_only_resembles_a_number_stays_text(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(SMALLEST).replace("data/rows.json", "e-4"), encoding="utf-8")
    assert params.load(path).prepare.source == "e-4"


def test_one_file_per_split(write):
    loaded = params.load(write(prepare={"source": {"train": "a.json", "test": "b.csv"}}))
    assert loaded.prepare.source.model_dump() == {"train": "a.json", "eval": None, "test": "b.csv"}


def test_utf8_text_and_byte_order_mark(tmp_path):
    content = copy.deepcopy(SMALLEST)
    content["prepare"]["text_template"] = "Текст: {phrase}\n情感: {tone}"
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(content, allow_unicode=True).encode())
    assert params.load(path).prepare.text_template == "Текст: {phrase}\n情感: {tone}"


@pytest.mark.parametrize(
    "stages",
    [
        [],
        ["finetune"],
        ["finetune", "merge"],
        ["quantize"],
        ["quantize", "evaluate"],
        ["evaluate", "gates"],
        ["merge", "finetune"],
    ],
)
def test_stages_that_fit(write, stages):
    assert params.load(write(all={"stages": stages})).all.stages == stages


# Canonical JSON: what decides whether a rule runs again


def test_as_json_is_the_same_for_the_same_values(write):
    """Neither the order of the fields nor naming a default changes it; a value does."""
    plain = params.as_json(params.load(write(merge={})).merge)
    assert plain == '{"dtype": "auto", "onto": "full_precision"}'
    assert params.as_json(params.load(write(merge={"onto": "full_precision", "dtype": "auto"})).merge) == plain
    assert params.as_json(params.load(write(merge={"dtype": "float32"})).merge) != plain


# Files that cannot be read


def test_missing_file(tmp_path):
    path = tmp_path / "params.yaml"
    with pytest.raises(UserError) as refused:
        params.load(path)
    assert str(refused.value) == (
        f"{path}: no such file. Run from the project's folder, or restore it with `git checkout {path}`."
    )


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(UserError) as refused:
        params.load(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}: ")


def test_not_utf8(refused_text):
    assert refused_text(b"all: caf\xe9\n") == "not UTF-8 text (byte 8). Save it as UTF-8."


@pytest.mark.parametrize(("content", "kind"), [("- a\n", "a list"), ("text\n", "a single value")])
def test_not_a_mapping(refused_text, content, kind):
    assert refused_text(content) == f"expected sections such as `prepare:` and `finetune:`, found {kind}."


@pytest.mark.parametrize("content", ["", "# only a comment\n"])
def test_empty_file(refused_text, content):
    message = refused_text(content)
    assert message.startswith("empty. Restore it with `git checkout ")
    assert message.endswith("params.yaml`.")


@pytest.mark.parametrize("text", ["010", "-010", "089", "0x1_f", "1:30", "1_000", "0b11", "1:30.5", "1_0.5"])
def test_numbers_that_dvc_reads_differently_are_refused(tmp_path, text):
    """DVC reads YAML 1.2: it would note 10, where YAML 1.1 has 8."""
    path = tmp_path / "params.yaml"
    path.write_text(f"{yaml.safe_dump(SMALLEST)}\nfinetune:\n  seed: {text}\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"read `{text}` as different values")) as refused:
        params.load(path)
    assert "decimal digits" in str(refused.value)
    path.write_text(f"{yaml.safe_dump(SMALLEST)}\nfinetune:\n  seed: 0\n", encoding="utf-8")
    assert params.load(path).finetune.seed == 0


@pytest.mark.parametrize("text", ["yes", "Off", "on", "NO", "True", "false", "'yes'", "0o17"])
def test_truths_that_dvc_reads_differently_are_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(f"{yaml.safe_dump(SMALLEST)}\nfinetune:\n  keep_best: {text}\n", encoding="utf-8")
    if text in ("True", "false"):
        assert params.load(path).finetune.keep_best is (text == "True")
        return
    with pytest.raises(UserError) as refused:
        params.load(path)
    assert ("different values" in str(refused.value)) == (text != "'yes'")


def test_keys_as_yaml_reads_them(tmp_path):
    """Numbers and truth values without quotes are fine."""
    content = yaml.safe_dump({**SMALLEST, "prepare": {**SMALLEST["prepare"], "labels": {0: "a", True: "b", 2.5: "c"}}})
    (tmp_path / "params.yaml").write_text(content, encoding="utf-8")
    assert params.load(tmp_path / "params.yaml").prepare.labels == {"0": "a", "true": "b", "2.5": "c"}


@pytest.mark.parametrize(
    "line", ["chat_date: 2025-06-30", "where: {day: 2025-06-30 10:00:00}", "labels: {2025-06-30: a}"]
)
def test_dates_that_dvc_does_not_record_are_refused(tmp_path, line):
    """Otherwise the record of a whole build would fail."""
    content, path = yaml.safe_dump(SMALLEST), tmp_path / "params.yaml"
    path.write_text(content.replace("prepare:", f"prepare:\n  {line}"), encoding="utf-8")
    with pytest.raises(UserError, match=r"`2025-06-30.*` is a date for YAML, and DVC .*quotes, as text in line \d+"):
        params.load(path)
    path.write_text(content.replace("prepare:", 'prepare:\n  chat_date: "2025-06-30"'), encoding="utf-8")
    assert params.load(path).prepare.chat_date == "2025-06-30"


# As a user runs it


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_check_a_file(write):
    path = write()
    done = run("-m", "slmake.params", path.name, cwd=path.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "params.yaml: 2 sections, valid\n", "")


def test_check_a_wrong_file(write):
    path = write(finetune={"lora_r": 0})
    done = run("-m", "slmake.params", cwd=path.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: params.yaml: 1 error; nothing was run. See docs/params.md.\n"
        "  finetune.lora_r: 0 is not allowed: it should be greater than or equal to 1.\n"
    )


def test_write_the_pages(tmp_path):
    assert run("-m", "slmake.params.docs", "--output", tmp_path, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.md", "params.schema.json"]


def test_import_loads_no_heavy_library(tmp_path):
    """common/ needs the standard library, PyYAML and pydantic only, so that parameters are checked in no time."""
    heavy = ["torch", "transformers", "peft", "datasets", "pyarrow", "numpy", "pandas", "onnxruntime"]
    code = f"import sys, slmake.params; print(sorted(set({heavy}) & set(sys.modules)), 'pydantic' in sys.modules)"
    done = run("-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[] True\n", "")
