"""DVC's stage `code`: the other stages follow what their code does, and not its bytes."""

import pytest
import yaml
from project import planned, run


def ran(project) -> set[str]:
    """The stages that `dvc repro` runs; afterwards nothing is left to do for DVC and Snakemake."""
    done = run(project, "dvc", "repro")
    assert done.returncode == 0, done.stdout
    assert run(project, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    assert planned(project) == set()
    return {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}


def append(project, name: str, text: str) -> None:
    path = project / name
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_a_comment_makes_a_new_package_and_nothing_else(repository):
    """As in Snakemake: the package's provenance names the bytes of every script."""
    append(repository, "slmake/outputs.py", "\n# a comment\n")
    assert ran(repository) == {"code", "package"}


def test_a_comment_in_code_of_no_package_runs_no_rule(repository):
    append(repository, "slmake/reporting/pages.py", "\n# a comment\n")
    (repository / "slmake" / "new.py").write_text("VALUE = 1\n", encoding="utf-8")
    assert ran(repository) == {"code"}


def test_other_code_runs_its_rule(repository):
    append(repository, "slmake/reporting/pages.py", "\nVALUE = 1\n")
    assert ran(repository) == {"code", "report"}


def test_a_new_import_is_watched_without_a_new_dvc_yaml(repository):
    (repository / "slmake" / "new.py").write_text("VALUE = 1\n", encoding="utf-8")
    append(repository, "slmake/reporting/pages.py", "\nimport slmake.new\n")
    assert ran(repository) == {"code", "report"}
    (repository / "slmake" / "new.py").write_text("VALUE = 2\n", encoding="utf-8")
    assert ran(repository) == {"code", "report"}


@pytest.mark.parametrize("damage", ["edited", "deleted"])
def test_a_digest_that_was_damaged_is_written_again(repository, damage):
    digest = repository / "build" / "code" / "merge"
    good = digest.read_text(encoding="ascii")
    digest.unlink()
    if damage == "edited":
        digest.write_text("0" * 64 + "\n", encoding="ascii")
    assert run(repository, "python", "-m", "tools.record").returncode == 0
    assert digest.read_text(encoding="ascii") == good
    assert ran(repository) == set()


def test_receipts_name_the_digest(repository):
    lock = yaml.safe_load((repository / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    assert {dep["path"] for dep in lock["merge"]["deps"]} == {"build/adapter", "build/base", "build/code/merge"}
    assert {"scripts/merge.py", "slmake/outputs.py", "envs/cpu.lock"} <= {
        dep["path"] for dep in lock["package"]["deps"]
    }
