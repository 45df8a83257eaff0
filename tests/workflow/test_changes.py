"""What changes before, during and after a build: nothing is built from two versions, and no receipt claims what is not so."""

import json
import os
import shutil
import subprocess
import time

import pytest
import yaml
from project import build, change, edit_in, environment, new_project, planned, record, run, snakemake

SHOWN = {"gates", "package", "report"}  # what follows evaluate
AFTER_PREPARE = {"prepare", "rehearse", "finetune", "merge", "quantize", "evaluate"} | SHOWN


def replacing(old: str, new: str) -> str:
    return f"p = Path('params.yaml'); p.write_text(p.read_text().replace({old!r}, {new!r}))"


def value(project, section: str, field: str):
    return yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))[section][field]


# before a build


@pytest.mark.parametrize("stamp", ["older", "same"])
def test_data_of_an_old_time_is_new_data(repository, stamp):
    """As `cp -p`, `mv`, `tar x` and `rsync -a` leave it: Snakemake, DVC and the recording of receipts go by content."""
    data = repository / "data" / "dataset.json"
    status, receipts = data.stat(), (repository / "dvc.lock").read_bytes()
    data.write_text(data.read_text().replace("number 5 of", "number 6 of"), encoding="utf-8")
    time_of = 0 if stamp == "older" else status.st_mtime_ns
    os.utime(data, ns=(time_of, time_of))
    assert planned(repository) == AFTER_PREPARE
    done = record(repository)
    assert done.returncode == 1
    assert "build/dataset was built from other parameters, code or data than those that are here now" in done.stdout
    assert (repository / "dvc.lock").read_bytes() == receipts


def test_a_base_model_that_changed_in_place_is_another(repository):
    config = repository / "data" / "base" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n", encoding="utf-8")
    os.utime(config, (0, 0))
    assert planned(repository) == AFTER_PREPARE | {"fetch_model"}
    stages = yaml.safe_load((repository / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert "data/base" in stages["fetch_model"]["deps"]
    assert "fetch_model" in run(repository, "dvc", "status").stdout
    assert record(repository).returncode == 1


def test_a_touched_file_is_the_same(repository):
    for name in ("data/dataset.json", "data/base/config.json", "envs/cpu.lock", "scripts/finetune.py", "LICENSE"):
        (repository / name).touch()
    assert planned(repository) == set()
    assert record(repository).returncode == 0
    assert "up to date" in run(repository, "dvc", "status").stdout


def test_outputs_dated_in_the_future_are_built_on(repository):
    """As a clock that was put back leaves them: Snakemake took what was built on them for older, and deleted it after its rule."""
    soon = time.time() + 7200
    for made in ("results/*", "build/*/.snakemake_timestamp", "build/report/*", "benchmarks/*"):
        for file in repository.glob(made):
            os.utime(file, (soon, soon))
    for file in (repository / ".snakemake" / "metadata").iterdir():
        entry = json.loads(file.read_text(encoding="utf-8"))
        times = {name: entry[name] + 7200 for name in ("starttime", "endtime")}
        file.write_text(json.dumps(entry | times), encoding="utf-8")
    assert planned(repository) == set()
    change(repository, "gates", max_accuracy_drop=0.9)
    done = snakemake(repository)
    assert done.returncode == 0, done.stdout
    assert planned(repository) == set()


def test_an_input_dated_in_the_future_is_named(repository):
    """As an archive of another time zone leaves it: where something is built of it, and only there."""
    data = repository / "data" / "dataset.json"
    os.utime(data, (time.time() + 7200,) * 2)
    assert snakemake(repository).returncode == 0
    data.write_text(data.read_text().replace("number 5 of", "number 6 of"), encoding="utf-8")
    os.utime(data, (time.time() + 7200,) * 2)
    before = (repository / "build" / "adapter" / "adapter_model.safetensors").read_bytes()
    done = snakemake(repository)
    assert done.returncode != 0
    assert "data/dataset.json is dated in the future (20" in done.stdout
    assert "`touch data/dataset.json` gives it today's" in done.stdout
    assert (repository / "build" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_comment_in_the_module_that_writes_outputs_makes_a_new_package_and_nothing_else(repository):
    """The package's provenance names the bytes of every script."""
    module = repository / "slmake" / "outputs.py"
    module.write_text(module.read_text() + "\n# a comment\n", encoding="utf-8")
    assert planned(repository) == {"package"}


def test_a_typo_fixed_in_the_report_s_script_makes_a_new_report_and_no_package(repository):
    module = repository / "slmake" / "reporting" / "pages.py"
    module.write_text(module.read_text() + "\nTYPO = 1\n", encoding="utf-8")
    assert planned(repository) == {"report"}


def test_an_edited_helper_reruns_what_uses_it(repository):
    module = repository / "slmake" / "scoring" / "gates.py"
    module.write_text(module.read_text() + "\nVALUE = 1\n", encoding="utf-8")
    assert planned(repository) == SHOWN | {"rehearse"}  # which looks at gates, too


def test_a_package_names_the_sections_of_now(repository):
    """Scored again with the same result, stopped at the gates, built again: gates and report stay, the package names the new section."""
    change(repository, "evaluate", batch_size=3)
    done = run(repository, *["snakemake", "--cores", "1", "--touch", "--force", "results/metrics.json"])
    assert done.returncode == 0, done.stdout
    assert planned(repository) == {"package"}


# dvc.yaml


def test_dvc_yaml_follows_params_yaml(repository):
    """The README's own example, without `make docs`."""
    (repository / "data" / "dataset.json").rename(repository / "data" / "phrases.jsonl")
    change(repository, "prepare", source="data/phrases.jsonl")
    done = run(repository, "dvc", "repro", "prepare", "--single-item", "--force")
    assert done.returncode != 0  # the old name, which nothing reads any more
    (repository / "data" / "dataset.json").write_text("[]", encoding="utf-8")
    done = run(repository, "dvc", "repro", "prepare", "--single-item", "--force")
    assert done.returncode != 0
    assert "dvc.yaml does not watch data/phrases.jsonl, which params.yaml names" in done.stdout
    (repository / "data" / "dataset.json").unlink()
    done = run(repository, "python", "-m", "slmake.platforms.dvc_yaml")
    assert done.returncode == 0, done.stdout
    deps = yaml.safe_load((repository / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["prepare"]["deps"]
    assert "data/phrases.jsonl" in deps
    assert "data/dataset.json" not in deps


def test_dvc_yaml_is_written_only_where_it_would_differ(repository, monkeypatch):
    from slmake.platforms import dvc_yaml

    monkeypatch.chdir(repository)
    dvc_yaml.update()
    monkeypatch.setattr(dvc_yaml, "text", lambda: pytest.fail("written again"))
    dvc_yaml.update()
    with (repository / "dvc.yaml").open("a") as file:
        file.write("# edited\n")
    monkeypatch.setattr(dvc_yaml, "text", lambda: "stages: {}\n")
    dvc_yaml.update()
    assert (repository / "dvc.yaml").read_text() == "stages: {}\n"


@pytest.mark.parametrize(
    ("section", "fields", "stage"),
    [("evaluate", {"models": ["merged", "onnx"]}, "evaluate"), ("all", {"stages": ["finetune", "merge"]}, "merge")],
)
def test_dvc_builds_nothing_by_a_dvc_yaml_of_other_parameters(repository, section, fields, stage):
    """Its receipts would name inputs that the rule did not read, or stages that were not asked for."""
    change(repository, section, **fields)
    before = (repository / "dvc.lock").read_bytes()
    done = run(repository, "dvc", "repro", stage, "--single-item", "--force")
    assert done.returncode != 0
    assert "dvc.yaml is of other parameters than params.yaml" in done.stdout
    assert (repository / "dvc.lock").read_bytes() == before
    assert run(repository, "python", "-m", "slmake.platforms.dvc_yaml").returncode == 0
    done = run(repository, "dvc", "repro", "merge", "--single-item", "--force")
    assert done.returncode == 0, done.stdout


def test_a_section_that_equals_its_defaults_is_in_dvc_yaml_where_params_yaml_has_it(repository, monkeypatch):
    """DVC refuses a stage that watches a section which is not there."""
    from slmake.platforms import dvc_yaml

    monkeypatch.chdir(repository)
    path = repository / "params.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**settings, "merge": {}}), encoding="utf-8")
    with_it = dvc_yaml.origin()
    settings.pop("merge", None)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert dvc_yaml.origin() != with_it


def test_marks_of_a_conflict_are_said_before_the_first_rule(repository):
    change(repository, "report", wrong_answers=9)
    lock = repository / "dvc.lock"
    lock.write_text(lock.read_text() + "\n<<<<<<< HEAD\n", encoding="utf-8")
    done = build(repository)
    assert done.returncode == 1
    assert done.stdout.startswith("build: error: dvc.lock has the marks of a conflict.")
    assert "→" not in done.stdout


def test_receipts_with_the_marks_of_a_conflict_are_the_users_to_choose(repository):
    lock = repository / "dvc.lock"
    whole = lock.read_text()
    conflict = whole.replace("stages:\n", "<<<<<<< HEAD\nstages:\n", 1)
    lock.write_text(conflict, encoding="utf-8")
    done = record(repository)
    assert done.returncode == 1
    assert "dvc.lock has the marks of a conflict. Take one side, `git checkout --ours dvc.lock`" in done.stdout
    assert lock.read_text() == conflict
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 1
    assert "dvc.lock has the marks of a conflict" in done.stdout
    (repository / "dvc.yaml").write_text("a: [", encoding="utf-8")
    done = snakemake(repository, "--forcerun", "gates")
    assert "Traceback" not in done.stdout
    assert "dvc.yaml cannot be read: while parsing a flow node" in done.stdout
    lock.write_text(whole, encoding="utf-8")
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 1
    assert done.stdout.count("dvc.yaml cannot be read: while parsing a flow node") == 1
    assert (repository / "dvc.yaml").read_text(encoding="utf-8") == "a: ["


def test_what_is_wrong_in_params_yaml_is_reported_by_the_build_alone(repository):
    before = (repository / "dvc.yaml").read_bytes()
    change(repository, "prepare", seed=-3)
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 1
    assert done.stdout.count("prepare.seed: -3 is not allowed") == 1, done.stdout
    done = run(repository, "python", "-m", "slmake.platforms.dvc_yaml")
    assert done.returncode == 1
    assert "prepare.seed: -3 is not allowed" in done.stdout
    assert (repository / "dvc.yaml").read_bytes() == before


# during a build


def test_parameters_that_change_while_a_rule_runs_stop_the_build(repository):
    """What runs then was planned with other values: card, provenance and receipts would name the new ones."""
    rate = value(repository, "finetune", "learning_rate")
    edit_in(repository, "gates", "after", replacing(f"learning_rate: {rate}", "learning_rate: 0.123"))
    done = snakemake(repository)
    assert done.returncode == 1
    assert "params.yaml: finetune changed after this build was planned, so it stops" in done.stdout
    assert "Run the same command again" in done.stdout
    assert "Traceback" not in done.stdout
    assert (repository / "results" / "gates.json").exists()
    assert not (repository / "build" / "package").exists()
    assert {"finetune", "merge", "package"} <= planned(repository)
    assert record(repository).returncode == 1


def test_parameters_that_were_taken_back_are_those_of_the_output(repository):
    """A rule reads the section that was planned or stops."""
    least = value(repository, "gates", "min_accuracy")
    edit_in(repository, "gates", "before", replacing(f"min_accuracy: {least}", "min_accuracy: 0.001"))
    done = snakemake(repository)
    assert done.returncode == 1
    assert "gates: error: params.yaml: gates changed after this build was planned" in done.stdout
    change(repository, "gates", min_accuracy=least)
    assert planned(repository) == {"gates", "package"}


def test_parameters_that_change_while_the_last_rule_runs_are_not_recorded(repository):
    edit_in(repository, "report", "after", replacing("wrong_answers: 10", "wrong_answers: 9"))
    done = snakemake(repository)
    assert done.returncode == 1
    assert "params.yaml: report changed after this build was planned" in done.stdout
    done = record(repository)
    assert done.returncode == 1
    assert "build/report/overview.html was built from other parameters" in done.stdout


def test_a_comment_and_another_layout_of_params_yaml_stop_nothing(repository):
    edit_in(repository, "report", "before", replacing("report:\n", "# of the page\nreport:\n\n"))
    done = snakemake(repository)
    assert done.returncode == 0, done.stdout


# after a build


def test_without_snakemake_s_records_only_the_receipts_count(repository):
    """Snakemake alone would go by times and find nothing to do."""
    shutil.rmtree(repository / ".snakemake")
    assert planned(repository) == set()
    assert record(repository).returncode == 0, "all is as the receipts say"
    change(repository, "evaluate", batch_size=3)
    receipts = (repository / "dvc.lock").read_bytes()
    done = record(repository)
    assert done.returncode == 1
    assert "nothing says what results/metrics.json, build/package were built from; nothing was recorded" in done.stdout
    assert (repository / "dvc.lock").read_bytes() == receipts
    done = snakemake(repository, "--dry-run", "--force", "results/metrics.json")
    assert done.returncode == 0, "the command that the message names"


def test_receipts_are_never_cut(repository, monkeypatch):
    """DVC writes dvc.lock in place; where this project runs it, beside."""
    from dvc.utils.serialize import modify_yaml

    from slmake.platforms import atomic_dvc

    lock = repository / "dvc.lock"
    before = lock.read_bytes()

    def fail(data, stream) -> None:
        stream.write("schema: '2.0'\nst")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_dvc.dump(lock, {}, fail)
    assert lock.read_bytes() == before
    with modify_yaml(lock) as data:
        data["stages"]["merge"]["cmd"] = "another"
    assert yaml.safe_load(lock.read_text())["stages"]["merge"]["cmd"] == "another"
    assert not list(repository.glob("*.partial"))


@pytest.mark.parametrize("length", [0, 10, 1000])
def test_receipts_that_were_cut_are_restored(repository, length):
    """By a `dvc repro` that was killed, or a full disk."""
    lock = repository / "dvc.lock"
    whole = lock.read_bytes()
    lock.write_bytes(whole[:length] + b"'" * (length > 0))
    done = record(repository)
    assert done.returncode == 0, done.stdout
    assert lock.read_bytes() == whole


def test_receipts_that_were_cut_and_never_recorded_name_the_way_out(repository):
    (repository / ".dvc" / "tmp" / "slmake.lock").unlink()
    (repository / "dvc.lock").write_text("schema: '2", encoding="utf-8")
    done = record(repository)
    assert done.returncode == 1
    assert "dvc.lock is damaged. Bring it back with `git checkout dvc.lock`" in done.stdout


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rule_ends_with_its_snakemake(copy_of_built):
    """A killed Snakemake leaves no rule that writes beside the next run's."""
    edit_in(copy_of_built, "gates", "before", "Path('pid').write_text(str(__import__('os').getpid()))")
    script = copy_of_built / "scripts" / "gates.py"
    text = script.read_text()
    script.write_text(
        text.replace("        section = params", "        __import__('time').sleep(300)\n        section = params")
    )
    process = subprocess.Popen(["snakemake", "--cores", "1"], cwd=copy_of_built, env=environment())
    pid = copy_of_built / "pid"
    end = time.monotonic() + 120
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)
    rule = int(pid.read_text())
    assert alive(rule)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while alive(rule) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(rule)
    script.write_text(text)
    assert run(copy_of_built, "snakemake", "--unlock").returncode == 0
    done = snakemake(copy_of_built)
    assert done.returncode == 0, done.stdout


def test_a_fresh_project_s_dvc_yaml_is_written_without_a_repository(base, tmp_path):
    project = new_project(tmp_path / "project", base)
    done = run(project, "python", "-m", "slmake.platforms.dvc_yaml")
    assert done.returncode == 0, done.stdout
    assert "data/base" in (project / "dvc.yaml").read_text()
