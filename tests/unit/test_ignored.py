"""A .dvcignore that keeps from DVC what a stage reads or writes."""

from pathlib import Path

import pytest
from test_push_and_restore import DATA, FOLDER, WEIGHTS, recorded, repository, write  # noqa: F401 (fixtures)

from slmake.errors import UserError
from tools import record

OURS = (Path(__file__).parents[2] / ".dvcignore").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    monkeypatch.setattr(record, "stages", lambda: ["merge"])


@pytest.mark.parametrize(
    ("file", "pattern", "kept"),
    [
        (".dvcignore", "*.safetensors", WEIGHTS),
        (".dvcignore", "config.json", Path("build/merged/config.json")),
        (".dvcignore", "/data/rows.json", DATA),
        (".dvcignore", "build", Path("build/merged")),
        ("data/.dvcignore", "b.*", FOLDER / "b.txt"),
    ],
)
def test_what_a_pattern_would_keep_from_dvc_is_named_with_it(file, pattern, kept):
    write(file, f"{OURS if file == '.dvcignore' else ''}{pattern}\n")
    line = 7 if file == ".dvcignore" else 1
    with pytest.raises(UserError) as refused:
        record.refuse_ignored()
    assert str(refused.value).startswith(f"{file}:{line}:{pattern} keeps {kept} from DVC, so ")


@pytest.mark.parametrize(
    "pattern", ["*.bak", "# mine", "README.md", "notes", "*.safetensors\n!*.safetensors", "/rows.json"]
)
def test_other_patterns_are_the_user_s(pattern):
    write(".dvcignore", f"{OURS}{pattern}\n")
    write("build/merged/model.partial", "of a rule that is running")
    write("data/texts/README.md", "of a model")
    write("data/texts/.git/HEAD", "of a clone, which DVC leaves out by itself")
    record.refuse_ignored()


def test_the_project_s_own_patterns_are_known():
    assert set(OURS.splitlines()) == record.IGNORED
