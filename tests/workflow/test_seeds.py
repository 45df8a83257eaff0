"""tools.seeds: several builds of a tiny project, their spread, and what is kept between calls."""

import json
import os
import re
import statistics
import subprocess
import sys

import pytest
from project import change, planned, run, snakemake

from slmake import params
from slmake.reporting.seeds import seeds_page
from tools import seeds


def call(project, *options):
    return run(project, "python", "-m", "tools.seeds", *options)


def test_runs_differ_in_their_seeds_alone_and_are_kept(repository):
    done = call(repository, "--runs", "2", "--splits", "42", "7")
    assert done.returncode == 0, done.stdout
    result = json.loads((repository / seeds.RESULT).read_text())
    changes = [made["changes"] for made in result["runs"]]
    assert [(made["prepare"]["seed"], made["finetune"]["seed"]) for made in changes] == [
        (split, seed) for split in (42, 7) for seed in (42, 43)
    ]
    scores = [made["scores"] for made in result["runs"]]
    # The first run is the build that stands in the project, so its scores are those of that build.
    own = json.loads((repository / "results/metrics.json").read_text())
    assert scores[0]["merged"]["accuracy"] == own["merged"]["accuracy"]
    assert scores[0]["adapter"] != scores[1]["adapter"]
    line = next(line for line in result["summary"] if (line["model"], line["score"]) == ("merged", "accuracy"))
    values = [score["merged"]["accuracy"] for score in scores]
    assert line["mean"] == pytest.approx(statistics.fmean(values))
    assert line["sd"] == pytest.approx(statistics.stdev(values))
    assert (line["least"], line["greatest"]) == (min(values), max(values))
    assert "<svg" in (repository / seeds.PICTURE).read_text()
    assert [path.suffix for path in (repository / seeds.KEPT).iterdir()] == [".json"] * 4  # no model is left

    again = call(repository, "--runs", "2")
    assert again.returncode == 0, again.stdout
    assert "steps" not in again.stdout  # nothing was trained
    change(repository, "finetune", learning_rate=0.02)
    other = call(repository, "--runs", "1")
    assert other.returncode == 0, other.stdout
    assert len(list((repository / seeds.KEPT).iterdir())) == 5


def test_runs_of_other_data_are_not_mixed(repository, monkeypatch, refused):
    """Data outside of the project's folder, too."""
    monkeypatch.chdir(repository)
    rows = repository.parent / "rows.json"
    (repository / "data" / "dataset.json").rename(rows)
    change(repository, "prepare", source=str(rows))
    measured = seeds.measured

    def edit_behind(*arguments):
        result = measured(*arguments)
        rows.write_text(rows.read_text() + "\n")
        return result

    monkeypatch.setattr(seeds, "measured", edit_behind)
    message = refused(seeds.main, ["--runs", "2"])
    assert "parameters, code or data changed since the runs began" in message
    assert not (repository / seeds.RESULT).exists()


def test_a_base_model_that_was_not_built_so_is_refused(repository, monkeypatch, refused):
    """Nor is a run of another base taken for one of this: its content is in the name under which scores are kept."""
    monkeypatch.chdir(repository)
    monkeypatch.setattr(seeds, "build", lambda *arguments: None)  # Snakemake finds nothing to do
    monkeypatch.setattr(seeds, "run_all", lambda here, *others: known.append(seeds.content_of(here)))
    known: list[str] = []
    seeds.main(["--runs", "1"])
    weights = repository / "build" / "base" / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\x3f")
    message = refused(seeds.main, ["--runs", "1"])
    assert "nothing says what build/base was built from" in message
    assert len(known) == 1
    assert seeds.content_of(repository) != known[0]


def test_a_build_goes_on_after_them(repository):
    """They link the new base model, which is in no receipt yet."""
    config = repository / "data" / "base" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    done = call(repository, "--runs", "1")
    assert done.returncode == 0, done.stdout
    done = run(repository, "python", "-m", "tools.build")
    assert done.returncode == 0, done.stdout


def test_the_reports_page_shows_them(repository):
    assert call(repository, "--runs", "2").returncode == 0
    change(repository, "report", seeds="results/seeds.json")
    assert planned(repository) == {"report"}
    assert snakemake(repository).returncode == 0
    page = (repository / "build" / "report" / "seeds.html").read_text()
    lines = json.loads((repository / seeds.RESULT).read_text())["summary"]
    line = next(line for line in lines if (line["model"], line["score"]) == ("int4", "accuracy"))
    cells = f"int4 accuracy {line['mean']:.4f} {line['sd']:.4f}"
    assert cells in " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "make seeds" not in page
    assert "<svg" in (repository / "build" / "report" / "seeds.svg").read_text()
    change(repository, "finetune", learning_rate=0.02)
    result, everything = json.loads((repository / seeds.RESULT).read_text()), params.load(repository / "params.yaml")
    assert "had another finetune in params.yaml" in seeds_page(result, everything)
    change(repository, "all", stages=["quantize", "evaluate", "gates", "report"])
    assert "another set of stages" in seeds_page(result, params.load(repository / "params.yaml"))
    change(repository, "report", seeds="results/nowhere.json")
    done = snakemake(repository, "--dry-run")
    assert done.returncode == 1
    assert "params.yaml: report.seeds: results/nowhere.json: no such file" in done.stdout


def test_a_project_without_training_is_refused(repository):
    change(repository, "all", stages=["quantize", "evaluate"])
    done = call(repository)
    assert done.returncode == 1
    assert "leaves out finetune" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (repository / seeds.RESULT).exists()


def test_a_failed_build_keeps_what_was_measured(repository):
    assert call(repository, "--runs", "1").returncode == 0
    change(repository, "finetune", target_modules=["no_such_proj"])
    before = (repository / seeds.RESULT).read_text()
    done = call(repository, "--runs", "1")
    assert done.returncode == 1
    assert "Finished runs are kept" in done.stdout
    assert (repository / seeds.RESULT).read_text() == before
    assert [path.suffix for path in (repository / seeds.KEPT).iterdir()] == [".json"]


def test_copies_of_killed_runs_are_removed(tmp_path):
    """Not those of runs that go on, here or elsewhere on the same disk."""
    code = "import sys, time, pathlib; from tools import seeds\nwith seeds.scratch(pathlib.Path(sys.argv[1])):\n print(flush=True)\n time.sleep(60)"
    runs = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) for _ in range(2)]
    for run_ in runs:
        run_.stdout.readline()
    runs[0].kill()
    runs[0].wait()
    (tmp_path / "slmake-seed-other").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    seeds.remove_left_over(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    runs[1].kill()
    runs[1].wait()
    seeds.remove_left_over(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["slmake-seed-other"]
