"""What a rule loads and reads while it runs: code, data and outputs of other rules, also where somebody puts them back before it ends."""

import os
import py_compile
from pathlib import Path

import pytest
from project import change, edit_in, planned, snakemake


def inside_job(project, rule: str, code: str) -> None:
    """Let a rule's script run Python code of the test when its work begins."""
    script = project / "scripts" / f"{rule}.py"
    text = script.read_text(encoding="utf-8")
    assert " as job:\n" in text
    lines = "".join(f"        {line}\n" for line in code.splitlines())
    script.write_text(text.replace(" as job:\n", f" as job:\n{lines}", 1), encoding="utf-8")


SWAP = """\
import os
from pathlib import Path as P
file = P({name!r})
whole, times = file.read_bytes(), file.stat()
file.write_bytes(whole + {more!r})
{meanwhile}
file.write_bytes(whole)
os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
"""


def swap(name: str, meanwhile: str = "", more: bytes = b"\nVALUE = 1\n") -> str:
    return SWAP.format(name=name, meanwhile=meanwhile, more=more)


def test_code_that_was_another_while_a_rule_started_stops_it(repository):
    """Put back with its time: neither Snakemake nor the recording could see it."""
    code = f"exec({swap('slmake/scoring/gates.py')!r})"
    edit_in(repository, "gates", "before", code)
    done = snakemake(repository)
    assert done.returncode == 1
    assert "gates: error: slmake/scoring/gates.py changed after this build was planned, so it stops" in done.stdout
    assert "Run the same command again" in done.stdout
    assert not (repository / "results" / "gates.json").exists()


def test_code_that_is_another_when_a_rule_loads_it_stops_it(repository):
    """Modules that are imported within a function, long after the rule began."""
    inside_job(
        repository,
        "report",
        "import sys\nsys.modules.pop('slmake.text')\n" + swap("slmake/text.py", "import slmake.text"),
    )
    done = snakemake(repository)
    assert done.returncode == 1
    assert "report: error: slmake/text.py changed after this build was planned" in done.stdout


def test_a_touch_and_a_comment_of_code_stop_nothing(repository):
    inside_job(
        repository,
        "report",
        "import sys\nsys.modules.pop('slmake.text')\n" + swap("slmake/text.py", "import slmake.text", b"# a comment\n"),
    )
    done = snakemake(repository)
    assert done.returncode == 0, done.stdout


def test_data_that_was_another_while_a_rule_read_it_is_not_kept(repository):
    inside_job(repository, "prepare", swap("data/dataset.json", "", b"\n"))
    done = snakemake(repository)
    assert done.returncode == 1
    assert (
        "prepare: error: data/dataset.json was changed while prepare read it; what it made of it is not kept"
        in done.stdout
    )
    assert not (repository / "build" / "dataset").exists()
    assert "prepare" in planned(repository)


def test_a_file_that_joins_a_pattern_while_a_build_runs_stops_it(repository):
    """Its rows would be in the model, and its name in no receipt, where it is gone at the end."""
    (repository / "data" / "dataset.json").rename(repository / "data" / "rows-1.json")
    change(repository, "prepare", source="data/rows-*.json")
    inside_job(repository, "prepare", "from pathlib import Path as P\nP('data/rows-2.json').write_text('[]')")
    done = snakemake(repository)
    assert done.returncode == 1
    assert "prepare: error: data/rows-2.json changed after this build was planned" in done.stdout


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_output_that_is_replaced_while_a_build_runs_is_not_built_on(repository, when):
    """And put back before anybody looks."""
    code = "import shutil; shutil.move('build/adapter', 'kept'); shutil.copytree('kept', 'build/adapter')"
    code += "; open('build/adapter/adapter_config.json', 'a').write(' ')"
    if when == "before":
        edit_in(repository, "merge", "before", code)
        told = "merge: error: build/adapter is not what its rule has built"
    else:
        inside_job(repository, "merge", code)
        told = "merge: error: build/adapter was changed while merge read it; what it made of it is not kept"
    done = snakemake(repository)
    assert done.returncode == 1
    assert told in done.stdout
    assert not (repository / "build" / "merged").exists()


def test_compiled_code_of_a_file_that_changed_is_not_run(repository):
    """Python takes it for the file's where size and time are those of before."""
    file = repository / "slmake" / "text.py"
    before = file.stat()
    compiled = Path(py_compile.compile(str(file)))
    text = file.read_text()
    file.write_text(f"{text[:3]}x{text[4:]}", encoding="utf-8")  # of its docstring
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert compiled.exists()
    assert file.stat().st_size == before.st_size
    snakemake(repository, "--dry-run")
    assert not compiled.exists()
