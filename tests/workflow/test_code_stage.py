"""DVC's stage `code`: the other stages follow what their code does, and not its bytes."""

import shutil

import pytest
import yaml
from project import change, edit, planned, run
from tiny import ROOT


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


def test_another_default_runs_its_rule(repository):
    """Snakemake compares sections with their defaults; DVC alone sees only what params.yaml writes down."""
    params = yaml.safe_load((repository / "params.yaml").read_text(encoding="utf-8"))
    del params["report"]["wrong_answers"]
    (repository / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    assert run(repository, "python", "-m", "tools.record").returncode == 0
    assert ran(repository) == set()
    edit(repository, "slmake/params/report.py", "        10, ge=0, le=1000", "        9, ge=0, le=1000")
    assert ran(repository) == {"code", "report"}


def test_another_command_runs_its_rule(repository):
    edit(repository, "Snakefile", '" --output build/report"', '" --output ./build/report"')
    assert ran(repository) == {"code", "report", "package"}  # a package names the Snakefile


def test_a_package_never_names_other_parameters_than_its_model_has(repository):
    """DVC and Snakemake both have options that build a rule alone."""
    change(repository, "finetune", learning_rate=0.05)
    for command in (
        "dvc repro -s package",
        "snakemake --cores all --rerun-triggers mtime --force build/package",
        "snakemake --cores all --rerun-triggers mtime --force build/report/overview.html",
    ):
        done = run(repository, *command.split())
        assert done.returncode, command
        said = (
            "is of other code or parameters"
            if "dvc" in command
            else "build/adapter was built from other parameters, code or data"
        )
        assert said in done.stdout
    assert {"finetune", "package"} <= ran(repository)


def test_git_joins_no_receipts_of_two_builds(tmp_path):
    """Lines of two sides would be the receipts of a build that nobody made."""
    shutil.copy2(ROOT / ".gitattributes", tmp_path)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    lock, lines = tmp_path / "dvc.lock", [f"{number}\n" for number in range(40)]

    def commit(text: str) -> None:
        lock.write_text(text, encoding="utf-8")
        for command in (["add", "--all"], ["commit", "-qm", "build"]):
            assert run(tmp_path, *git, *command).returncode == 0

    assert run(tmp_path, "git", "init", "-q", "-b", "main").returncode == 0
    commit("".join(lines))
    assert run(tmp_path, "git", "checkout", "-qb", "other").returncode == 0
    commit("".join(["changed\n", *lines[1:]]))
    assert run(tmp_path, "git", "checkout", "-q", "main").returncode == 0
    ours = "".join([*lines[:-1], "changed\n"])
    commit(ours)
    assert run(tmp_path, *git, "merge", "other").returncode
    assert lock.read_text(encoding="utf-8") == ours
    assert run(tmp_path, "git", "merge", "--abort").returncode == 0
    assert run(tmp_path, *git, "merge", "-X", "theirs", "other").returncode == 0
    assert lock.read_text(encoding="utf-8") == "".join(["changed\n", *lines[1:]])
