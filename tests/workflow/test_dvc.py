"""DVC over Snakemake: receipts that match, stages that agree with the Snakefile, metrics, plots and experiments."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from project import RULES, change, environment, planned, run, snakemake
from tiny import ROOT

from slmake.plan import SECTIONS
from slmake.platforms import atomic_dvc, dvc
from tools import remote


def test_a_second_build_of_the_same_bytes_leaves_nothing_to_do(repository):
    """`dvc commit` alone puts the first build's files, with their times, in the place of the second's."""
    assert snakemake(repository, "--force", "build/base", "results/base.json").returncode == 0
    assert snakemake(repository, "--forceall").returncode == 0
    assert planned(repository) == set()
    done = run(repository, "python", "-m", "tools.record")
    assert done.returncode == 0, done.stdout
    assert planned(repository) == set()
    assert "up to date" in run(repository, "dvc", "repro").stdout


def test_a_date_that_no_package_can_have_is_refused_by_the_first_rule_of_dvc(repository, monkeypatch):
    """DVC runs each rule alone; the package would be the last."""
    change(repository, "prepare", seed=3)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    done = run(repository, "dvc", "repro")
    assert done.returncode != 0
    assert "SOURCE_DATE_EPOCH=today: it must be a whole number of seconds since 1970" in done.stdout
    assert "failed to reproduce 'prepare'" in done.stdout


@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_what_was_damaged_after_it_was_built_is_no_receipt(repository, damage):
    """Snakemake does not look into folders: nothing to do for it."""
    done = run(repository, "python", "-m", "tools.record")
    assert done.returncode == 0, done.stdout
    weights = repository / "build" / "adapter" / "adapter_model.safetensors"
    good, receipts = weights.read_bytes(), (repository / "dvc.lock").read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(good[:1000])
    assert planned(repository) == set()
    done = run(repository, "python", "-m", "tools.record")
    assert done.returncode == 1
    assert "record: error: build/adapter was modified since finetune built it; nothing was recorded." in done.stdout
    assert (repository / "dvc.lock").read_bytes() == receipts
    done = run(repository, "python", "-m", "tools.remote", "restore")
    assert done.returncode == 0, done.stdout
    assert weights.read_bytes() == good
    assert planned(repository) == set()
    assert run(repository, "python", "-m", "tools.record").returncode == 0


def test_edited_scores_are_restored_from_git(repository):
    """Git keeps them, not DVC's cache."""
    metrics = repository / "results" / "metrics.json"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole.replace(b"0.", b"1.", 1))
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 1
    assert (
        "nothing says what results/metrics.json was built from; nothing was built. `make restore` brings" in done.stdout
    )
    done = run(repository, "python", "-m", "tools.remote", "restore")
    assert done.returncode == 0, done.stdout
    assert metrics.read_bytes() == whole
    assert planned(repository) == set()
    run(repository, "git", "rm", "-q", "--cached", "results/metrics.json")
    run(repository, "git", "commit", "-q", "-m", "lost")
    metrics.unlink()
    done = run(repository, "python", "-m", "tools.remote", "restore")
    assert done.returncode == 1
    assert "results/metrics.json is not what was recorded. Git keeps it" in done.stdout
    assert "snakemake --cores all --force results/metrics.json" in done.stdout


@pytest.mark.parametrize("what", ["a parameter", "a section", "a file of data"])
def test_nothing_is_restored_over_outputs_of_what_is_here_now(repository, what):
    """dvc.yaml is brought up to date first: it might not name what is new."""
    (repository / "data" / "dataset.json").rename(repository / "data" / "rows-1.json")
    change(repository, "prepare", source="data/rows-*.json")
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 0, done.stdout
    if what == "a file of data":
        (repository / "data" / "rows-2.json").write_text("[]", encoding="utf-8")
    else:
        change(
            repository,
            *{"a parameter": ["finetune"], "a section": ["merge"]}[what],
            **({"learning_rate": 0.02} if what == "a parameter" else {"dtype": "bfloat16"}),
        )
    changed = repository / "build" / "adapter" / "more"
    changed.touch()
    before = (repository / "dvc.lock").read_bytes()
    done = run(repository, "python", "-m", "tools.remote", "restore")
    assert done.returncode == 1
    assert "so no output was overwritten" in done.stdout
    assert changed.exists()
    assert (repository / "dvc.lock").read_bytes() == before


def test_nothing_is_restored_while_a_build_runs(repository):
    lock = repository / ".snakemake" / "locks" / "0.input.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    done = run(repository, "python", "-m", "tools.remote", "restore")
    assert done.returncode == 1
    assert "a build is running here. If it was killed: `.venv/bin/snakemake --unlock`" in done.stdout


@pytest.mark.parametrize("what", ["params.yaml", "an output"])
def test_what_changes_while_a_restored_build_is_compared_is_not_marked_as_built(repository, monkeypatch, refused, what):
    monkeypatch.chdir(repository)
    dvc.cache.cache_clear()
    record = remote.record

    def edit_behind(*arguments):
        if what == "params.yaml":
            change(repository, "finetune", learning_rate=0.02)
        else:
            file = Path("build/merged/config.json")
            text = file.read_text()
            file.unlink()
            file.write_text(text.replace("{", "{ ", 1))
        record(*arguments)

    monkeypatch.setattr(remote, "record", edit_behind)
    message = refused(remote.main, ["restore"])
    reasons = {
        "params.yaml": "parameters, code or data changed while the outputs were compared; nothing was marked as up to date",
        "an output": "an output was replaced while it was compared with its receipt",
    }
    assert reasons[what] in message
    if what == "params.yaml":
        assert "finetune" in planned(repository)
    dvc.cache.cache_clear()


def test_the_page_is_of_the_figures_that_were_restored(repository):
    """They come with the times at which they were built, older than the page."""
    assert run(repository, "python", "-m", "tools.build").returncode == 0
    page, figure = repository / "build" / "report.html", repository / "build" / "report" / "scores.html"
    first, times = page.stat().st_mtime_ns, figure.stat()
    figure.write_text(figure.read_text().replace("<table", "<table class='other'", 1))
    os.utime(figure, ns=(times.st_atime_ns, times.st_mtime_ns))
    seen = []
    for _ in range(2):
        done = run(repository, "python", "-m", "tools.build", "build/report/scores.html")
        assert done.returncode == 0, done.stdout
        seen.append(page.stat().st_mtime_ns)
    assert first < seen[0] == seen[1]


def test_a_failed_rule_s_former_output_is_restored(repository):
    before = (repository / "build" / "adapter" / "adapter_model.safetensors").read_bytes()
    parameters = (repository / "params.yaml").read_bytes()
    change(repository, "finetune", target_modules=["nope"])
    done = snakemake(repository)
    assert done.returncode == 1
    assert "`make restore`" in done.stdout
    (repository / "params.yaml").write_bytes(parameters)
    done = run(repository, "python", "-m", "tools.remote", "restore")
    assert done.returncode == 0, done.stdout
    assert (repository / "build" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert planned(repository) == set()


def test_a_stage_that_is_left_out_is_not_recorded(repository):
    """Its old outputs do not become those of the new inputs, and what was never built is not missed."""
    old = (repository / "results" / "metrics.json").read_bytes()
    change(repository, "all", stages=["finetune", "merge", "quantize"])
    change(repository, "quantize", accuracy_level=0)
    assert snakemake(repository).returncode == 0
    done = run(repository, "python", "-m", "tools.record")
    assert done.returncode == 0, done.stdout
    lock = yaml.safe_load((repository / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    made = {out["path"]: out["md5"] for out in lock["quantize"]["outs"]}
    read = {dep["path"]: dep["md5"] for dep in lock["evaluate"]["deps"]}
    assert read["build/onnx-int4"] != made["build/onnx-int4"]
    assert (repository / "results" / "metrics.json").read_bytes() == old


def test_what_dvc_says_is_shown_when_it_cannot_record(repository):
    (repository / ".dvc").rename(repository / ".nothing")
    done = run(repository, "python", "-m", "tools.record")
    assert done.returncode == 1
    assert (
        "record: error: everything was built, but DVC could not record it: you are not inside of a DVC repository"
        in done.stdout
    )
    assert "Traceback" not in done.stdout


def ran(output: str) -> set[str]:
    """Stages that `dvc repro` ran."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


def test_dvc_yaml_agrees_with_the_snakefile():
    """Names, dependencies, outputs and parameter sections: dvc.yaml is what the Snakefile generates."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from slmake.platforms import dvc_yaml; sys.stdout.write(dvc_yaml.text())"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (ROOT / "dvc.yaml").read_text(encoding="utf-8") == done.stdout, "run `make docs`"
    stages = yaml.safe_load(done.stdout)["stages"]
    assert tuple(stages) == ("code", *RULES)
    assert stages.pop("code")["outs"] == ["build/code"]
    given = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    given |= {f"{name}.{field}": value for name, section in given.items() for field, value in section.items()}
    for name, stage in stages.items():
        sections = [part for part in SECTIONS.get(name, [name]) if part in given]
        assert stage["params"] == [*sections, "all.container"]
        assert f"--allowed-rules {name} --" in stage["cmd"]
        assert (f"scripts/{name}.py" if name == "package" else f"build/code/{name}") in stage["deps"]


def test_up_to_date_after_snakemake_and_commit(repository):
    done = run(repository, "dvc", "repro")
    assert done.returncode == 0, done.stdout
    assert ran(done.stdout) == set()
    assert "up to date" in done.stdout
    assert planned(repository) == set()


def test_a_changed_parameter_runs_exactly_its_stages(repository):
    change(repository, "quantize", accuracy_level=0)
    done = run(repository, "dvc", "repro")
    assert done.returncode == 0, done.stdout
    after = {"code", "rehearse", "quantize", "evaluate", "gates", "package", "report"}
    assert {"quantize", "evaluate"} <= ran(done.stdout) <= after
    assert planned(repository) == set()


def numbers(value: dict) -> dict:
    """Without the lists, which DVC does not show."""
    return {
        key: numbers(one) if isinstance(one, dict) else one for key, one in value.items() if not isinstance(one, list)
    }


def test_metrics_and_plots_are_shown(repository):
    shown = run(repository, "dvc", "metrics", "show", "--json")
    assert shown.returncode == 0, shown.stdout
    values = json.loads(shown.stdout)[""]["data"]["results/metrics.json"]["data"]
    assert values == numbers(json.loads((repository / "results" / "metrics.json").read_text()))
    plots = run(repository, "dvc", "plots", "show")
    assert plots.returncode == 0, plots.stdout
    page = (repository / "dvc_plots" / "index.html").read_text(encoding="utf-8")
    assert "cross entropy per answer token" in page
    assert "Confusion of int4" in page


def test_dvc_removes_nothing_that_a_build_makes(repository):
    """`dvc repro` removes a stage's outputs before it runs the command that meets Snakemake's lock; `dvc status` goes on."""
    lock, adapter = repository / ".dvc/tmp/rwlock", repository / "build/adapter/adapter_model.safetensors"
    killed = {"read": {str(adapter.parent): [{"pid": 1, "cmd": atomic_dvc.BUILD}]}}
    lock.write_text(json.dumps(killed))
    assert run(repository, "python", "-m", "tools.remote", "restore").returncode == 0
    lock.write_text(json.dumps(killed))
    (repository / "mine.py").write_text(SLOW, encoding="utf-8")
    change(repository, "evaluate", metrics=["mine.py:slow"])
    command = [sys.executable, "-m", "tools.build"]
    build = subprocess.Popen(
        command, cwd=repository, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (repository / "mine.asked").exists() and build.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        done = run(repository, "dvc", "repro", "--single-item", "--force", "finetune")
        status = run(repository, "dvc", "status", "finetune")
    finally:
        (repository / "mine.go").touch()
        shown, _ = build.communicate(timeout=300)
    assert (build.returncode, (repository / "mine.asked").exists()) == (0, True), shown
    assert done.returncode != 0
    assert f"blocked by:\n  (PID {build.pid}): {atomic_dvc.BUILD}" in done.stdout
    assert status.returncode == 0
    assert adapter.is_file()
    assert json.loads(lock.read_text()).get("read", {}) == {}
    assert "up to date" in run(repository, "dvc", "status").stdout


# A metric that waits until the test has looked. No text of it is a file's whole name: such a file would be an input.
SLOW = """
import time
from pathlib import Path


def slow(prompt, expected, answer):
    Path(__file__).with_suffix(".asked").touch()
    while not Path(__file__).with_suffix(".go").exists():
        time.sleep(0.1)
    return 1.0
"""


def test_a_build_waits_for_no_dvc_but_names_it(repository):
    change(repository, "report", wrong_answers=9)
    entry = {str(repository / "build/adapter"): {"pid": os.getpid(), "cmd": "dvc repro"}}
    (repository / ".dvc/tmp/rwlock").write_text(json.dumps({"write": entry}))
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 1
    assert (
        f"DVC writes what would be built: (PID {os.getpid()}): dvc repro. Run the same command again when it"
        in done.stdout
    )
    assert json.loads((repository / ".dvc/tmp/rwlock").read_text())["write"] == entry


def test_a_build_behind_dvc_checkout_is_not_in_its_own_way(repository):
    """Its outputs are new to it, so it asks DVC for their status."""
    shutil.rmtree(repository / "build" / "adapter")
    assert run(repository, "dvc", "checkout").returncode == 0
    change(repository, "report", wrong_answers=9)
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 0, done.stdout


def test_a_target_asks_nothing_of_what_it_does_not_read(repository):
    """In a fresh clone, scores and receipts are there and nothing else."""
    for folder in (".snakemake", "build"):
        shutil.rmtree(repository / folder)
    change(repository, "prepare", seed=3)
    done = run(repository, "python", "-m", "tools.build", "build/dataset")
    assert done.returncode == 0, done.stdout
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 0, done.stdout


def test_two_recordings_come_one_after_the_other(repository):
    change(repository, "report", wrong_answers=9)
    assert snakemake(repository).returncode == 0
    command = [sys.executable, "-m", "tools.record"]
    started = [
        subprocess.Popen(command, cwd=repository, env=environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        _, shown = process.communicate(timeout=120)
        assert process.returncode == 0, shown
    assert "up to date" in run(repository, "dvc", "status").stdout
