"""The code that a rule runs, found from its imports, and digests of source files."""

import json
import os
import time
from pathlib import Path

import pytest
from tiny import ROOT

from slmake import code_inputs
from slmake.code_inputs import code, digest, modules
from slmake.errors import UserError

RULES = sorted(path.stem for path in (ROOT / "scripts").glob("[a-z]*.py"))


@pytest.fixture
def project(tmp_path) -> Path:
    """A script, two helpers and a module that nothing imports."""
    files = {
        "scripts/__init__.py": "",
        "scripts/train.py": '"""Train."""\n\nfrom slmake.data import rows\n\n\ndef main():\n    from slmake import late\n',
        "scripts/export.py": "import slmake.data.rows\n",
        "slmake/__init__.py": "",
        "slmake/data/__init__.py": "",
        "slmake/data/rows.py": '"""Rows."""\n\n\ndef rows():\n    """All of them."""\n    return [1, 2]  # two\n',
        "slmake/late.py": "import json\n",
        "slmake/errors.py": "class UserError(Exception): ...\n",
        "slmake/other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


# modules


def test_imports_are_followed_directly_and_through_others(project):
    assert modules("scripts.train", project) == ["scripts/train.py", "slmake/data/rows.py", "slmake/late.py"]
    assert modules("scripts.export", project) == ["scripts/export.py", "slmake/data/rows.py"]


@pytest.mark.parametrize(
    "line",
    ["import slmake.added", "from slmake import added", "from slmake.added import value", "def f():\n    from slmake import added"],
)  # fmt: skip
def test_an_added_import_is_an_input(project, line):
    (project / "slmake" / "added.py").write_text("value = 1\n", encoding="utf-8")
    assert "slmake/added.py" not in modules("scripts.train", project)
    append(project / "slmake" / "data" / "rows.py", f"\n{line}\n")
    assert "slmake/added.py" in modules("scripts.train", project)
    assert "slmake/added.py" in modules("scripts.export", project)


def test_circular_imports_end(project):
    append(project / "slmake" / "data" / "rows.py", "\nimport slmake.late\n")
    append(project / "slmake" / "late.py", "\nimport slmake.data.rows\n")
    assert modules("scripts.export", project) == ["scripts/export.py", "slmake/data/rows.py", "slmake/late.py"]


def test_modules_without_result_and_of_others_are_no_inputs(project):
    append(project / "slmake" / "data" / "rows.py", "\nimport numpy\nfrom slmake.errors import UserError\n")
    assert modules("scripts.export", project) == ["scripts/export.py", "slmake/data/rows.py"]


def test_a_script_that_is_copied_is_an_input():
    """`run.py` in a package is the library's own module."""
    assert "slmake/generation.py" in code("package")


@pytest.mark.parametrize(
    ("text", "message"), [("def (", "scripts/train.py: not valid Python"), (None, "scripts.train: no such module")]
)
def test_what_cannot_be_read_is_named(project, text, message):
    script = project / "scripts" / "train.py"
    script.unlink() if text is None else script.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        modules("scripts.train", project)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_s_inputs_are_its_script_and_the_library(rule):
    files = code(rule)
    assert files[0] == f"scripts/{rule}.py"
    assert all((ROOT / name).is_file() for name in files)
    # What a gate bounds, and what a metric's figure is called, are no mere parameters.
    others = set(files[1:]) - {f"slmake/params/{name}.py" for name in ("dataset_files", "gates", "metrics")}
    assert not [name for name in others if name.startswith(("scripts/", "tools/", "slmake/params/", "slmake/cli"))]


# digest


def test_comments_of_a_lock_do_not_count_but_in_the_provenance(tmp_path):
    lock, text = tmp_path / "cuda.lock", "a==1 \\\n    --hash=sha256:00\n    # via b\nb==2\n"
    sums = []
    for content in (
        text,
        text.replace("# via b", "# via b, c"),
        "# of a resolver\n" + text,
        text.replace("b==2", "b==3"),
    ):
        lock.write_text(content, encoding="utf-8")
        sums.append((digest([lock]), digest([lock], exact=True)))
    meanings, exact = ([pair[side] for pair in sums] for side in (0, 1))
    assert meanings[0] == meanings[1] == meanings[2] != meanings[3]
    assert len(set(exact)) == 4


def meaning(project: Path) -> str:
    return digest([project / name for name in modules("scripts.train", project)])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# two", "# a pair"),
        ('"""All of them."""', '"""Every row."""'),
        ('"""Rows."""', '"""Rows of a dataset."""'),
        ("[1, 2]", "[\n        1,\n        2,\n    ]"),
    ],
    ids=["comment", "docstring", "module docstring", "layout"],
)
def test_comments_docstrings_and_layout_do_not_count(project, before, after):
    rows = project / "slmake" / "data" / "rows.py"
    meant, exact = meaning(project), digest([rows], exact=True)
    rows.write_text(rows.read_text().replace(before, after), encoding="utf-8")
    assert meaning(project) == meant
    assert digest([rows], exact=True) != exact


@pytest.mark.parametrize(("before", "after"), [("[1, 2]", "[1, 3]"), ("return", "yield"), ("def rows", "def lines")])
def test_code_counts(project, before, after):
    rows = project / "slmake" / "data" / "rows.py"
    meant = meaning(project)
    rows.write_text(rows.read_text().replace(before, after), encoding="utf-8")
    assert meaning(project) != meant


def test_text_in_an_expression_counts(project):
    """Only a text that stands alone at the top of a body is documentation."""
    rows = project / "slmake" / "data" / "rows.py"
    rows.write_text('prompt = "one"\n', encoding="utf-8")
    before = digest([rows])
    rows.write_text('prompt = "two"\n', encoding="utf-8")
    assert digest([rows]) != before


def test_an_edited_helper_changes_what_uses_it_and_nothing_else(project):
    def digests() -> list[str]:
        return [
            digest([project / name for name in modules(f"scripts.{rule}", project)]) for rule in ("train", "export")
        ]

    train, export = digests()
    append(project / "slmake" / "late.py", "\nvalue = 2\n")
    assert digests()[0] != train
    assert digests()[1] == export
    append(project / "slmake" / "data" / "rows.py", "\nvalue = 2\n")
    assert digests()[1] != export


def test_a_digest_is_of_content_not_of_time(tmp_path):
    file = tmp_path / "dataset.json"
    file.write_text("[1]", encoding="utf-8")
    before = digest([file])
    os.utime(file, (0, 0))
    assert digest([file]) == before
    status = file.stat()
    file.write_text("[2]", encoding="utf-8")  # of the same size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # and, as `cp -p` leaves it, of the same time
    assert digest([file]) != before


@pytest.mark.parametrize("change", ["content", "name", "added", "removed", "deep"])
def test_every_change_in_a_folder_counts(tmp_path, change):
    model = tmp_path / "base"
    (model / "deep").mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "deep" / "tokenizer.json").write_text("{}", encoding="utf-8")
    before = digest([model])
    assert digest([model]) == before
    if change == "content":
        (model / "config.json").write_text("[]", encoding="utf-8")
    elif change == "name":
        (model / "config.json").rename(model / "config.jsn")
    elif change == "added":
        (model / "more").write_bytes(b"")
    elif change == "removed":
        (model / "config.json").unlink()
    else:
        (model / "deep" / "tokenizer.json").write_text("[]", encoding="utf-8")
    assert digest([model]) != before


def test_a_missing_file_counts_as_empty_so_that_the_build_can_name_it(tmp_path):
    assert len(digest([tmp_path / "nothing"])) == 64


# what is kept between calls


@pytest.fixture
def facts(tmp_path):
    return lambda: code_inputs._Facts(tmp_path / "slmake.json")


def settled(monkeypatch) -> None:
    """Let files that were just written count as old."""
    now = time.time() + 60
    monkeypatch.setattr(code_inputs.time, "time", lambda: now)


def test_a_file_that_did_not_move_is_read_once(tmp_path, facts, monkeypatch):
    file = tmp_path / "module.py"
    file.write_text("value = 1\n", encoding="utf-8")
    settled(monkeypatch)
    first = facts()
    entry = first(file)
    first.save()
    monkeypatch.setattr(code_inputs, "_read", lambda file: pytest.fail(f"{file} was read again"))
    assert facts()(file) == entry | {"mark": entry["mark"]}


def test_a_file_that_may_change_within_its_time_stamp_is_read_again(tmp_path, facts):
    file = tmp_path / "module.py"
    file.write_text("value = 1\n", encoding="utf-8")
    now = facts()
    before = now(file)["bytes"]
    file.write_text("value = 2\n", encoding="utf-8")
    assert now(file)["bytes"] != before
    now.save()
    assert not (tmp_path / "slmake.json").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"reader": 5}', '{"reader": "another Python", "files": {"a": 1}}']
)
def test_damaged_notes_are_made_again(tmp_path, facts, monkeypatch, text):
    file = tmp_path / "module.py"
    file.write_text("value = 1\n", encoding="utf-8")
    (tmp_path / "slmake.json").write_text(text, encoding="utf-8")
    settled(monkeypatch)
    now = facts()
    assert len(now(file)["bytes"]) == 64
    now.save()
    assert list(json.loads((tmp_path / "slmake.json").read_text())["files"]) == [str(file)]


def test_files_that_are_gone_are_forgotten(tmp_path, facts, monkeypatch):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("value = 1\n", encoding="utf-8")
    settled(monkeypatch)
    now = facts()
    now(tmp_path / "a.py"), now(tmp_path / "b.py")
    (tmp_path / "a.py").unlink()
    now.save()
    assert list(json.loads((tmp_path / "slmake.json").read_text())["files"]) == [str(tmp_path / "b.py")]


def test_where_nothing_can_be_kept_nothing_fails(tmp_path, facts, monkeypatch):
    (tmp_path / "module.py").write_text("value = 1\n", encoding="utf-8")
    settled(monkeypatch)
    now = code_inputs._Facts(tmp_path / "missing" / "slmake.json")
    now(tmp_path / "module.py")
    now.save()
    assert not (tmp_path / "missing").exists()


def test_a_digest_does_not_depend_on_where_the_project_lies(tmp_path):
    """Or a checkpoint could not be resumed on another machine."""
    for name in ("one", "two"):
        (tmp_path / name / "scripts").mkdir(parents=True)
        (tmp_path / name / "scripts" / "x.py").write_text("a = 1\n", encoding="utf-8")
    first, second = (digest(["scripts/x.py"], root=tmp_path / name) for name in ("one", "two"))
    assert first == second
    (tmp_path / "two" / "scripts" / "x.py").write_text("a = 2\n", encoding="utf-8")
    assert digest(["scripts/x.py"], root=tmp_path / "two") != first
