"""make restore and pull, where names or options are less usual, and where they refuse before anything is brought."""

from pathlib import Path

import pytest
from test_push_and_restore import (  # noqa: F401 (fixtures)
    DATA,
    JOB,
    STAGES,
    WEIGHTS,
    add,
    kept,
    objects,
    record,
    recorded,
    repository,
    write,
)

from slmake.errors import UserError
from tools import remote


def test_a_name_with_a_colon_is_no_stage():
    """DVC reads FILE:STAGE where one is named."""
    path = Path("data/12:30.json")
    write(path, "first")
    add(path)
    path.unlink()
    remote.restore(JOB)
    assert path.read_text() == "first"


@pytest.mark.parametrize("where", ["corpora", "stage"])
def test_another_version_than_the_lost_one_is_said(where):
    """What the message names would record it in the place of the lost one."""
    path, name = kept(where)
    write(path, "second")
    add(path) if where == "corpora" else record(name)
    write(path, "first rows" if where == "stage" else "first")
    objects(path)[0].unlink()
    Path("there/object").touch()
    with pytest.raises(UserError, match=f"{path}: neither DVC's cache on this disk nor the remote") as refused:
        remote.pull(JOB)
    command = f"add {path}" if where == "corpora" else f"commit --force {name}"
    assert f"What is here is another version, which `.venv/bin/dvc {command}` would record" in str(refused.value)


def test_what_a_rule_has_made_and_no_remote_gets_stops_no_pull(monkeypatch):
    """The rest is brought; then the stage is named that has to be built."""
    write("dvc.yaml", STAGES.replace("results/scores.csv,", "{results/scores.csv: {push: false}},"))
    record()
    brought = []
    for out in ("results/scores.csv",):
        [made] = [entry["md5"] for entry in remote.tracked() if entry["path"] == out]
        remote.cached(made).unlink()
        Path(out).unlink()
    Path("there/object").touch()
    monkeypatch.setattr(remote, "transfer", lambda verb, job, *names: brought.append(verb))
    remote.pull(JOB)
    assert brought == ["pull"]


def test_other_inputs_are_refused_before_data_is_brought():
    """Data that changed with them stays, too: `make` builds of what is here."""
    write("prompt.txt", "one")
    write("dvc.yaml", STAGES.replace("data/texts]", "data/texts, prompt.txt]"))
    record()
    first = {name: Path(name).read_bytes() for name in (f"{DATA}.dvc", "dvc.lock")}
    write(DATA, "second")
    add(DATA)
    write("prompt.txt", "two")
    write(WEIGHTS, "second, never recorded")
    for name, content in first.items():
        Path(name).write_bytes(content)
    with pytest.raises(
        UserError, match=r"merge was recorded with other prompt\.txt than are here.*no output was overwr"
    ):
        remote.restore(JOB)
    assert DATA.read_text() == "second"
