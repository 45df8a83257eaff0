"""No record, package or published pointer claims what is not so, whatever options Snakemake and DVC were called with."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from project import build, change, edit, planned, record, run

from slmake import params
from slmake.platforms.dvc_yaml import METRICS
from tools import seeds

OTHER = "was built from other parameters, code or data than those that are here now"
ADAPTER = "build/adapter/adapter_model.safetensors"


def flip(path: Path) -> None:
    """Change one bit in place, in every link to the file."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(-5, 2)
        byte = file.read(1)
        file.seek(-5, 2)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(mode)


def restore(project: Path) -> subprocess.CompletedProcess:
    return run(project, "python", "-m", "tools.remote", "restore")


def test_restore_certifies_nothing_that_rotted_with_the_cache(repository):
    """DVC links outputs from its cache and believes what may not be written there: an edit in place changes both."""
    (repository / ADAPTER).unlink()
    run(repository, "dvc", "checkout", "--force", "build/adapter")
    flip(repository / ADAPTER)
    assert "make restore" in build(repository).stdout
    done = restore(repository)
    assert done.returncode == 1, done.stdout
    assert (
        f"{ADAPTER} is not what its receipt says, and DVC had no whole copy of it; nothing was marked as up to date"
        in done.stdout
    )
    assert "`rm -r build/adapter`" in done.stdout
    shutil.rmtree(repository / "build" / "adapter")
    done = build(repository)
    assert done.returncode == 0, done.stdout
    done = restore(repository)
    assert done.returncode == 0, done.stdout


def test_a_package_of_pulled_outputs_names_their_parameters_alone(repository):
    """As after `git clone` and `dvc pull`: Snakemake has no record of what is here."""
    shutil.rmtree(repository / ".snakemake")
    change(repository, "finetune", learning_rate=0.02)
    before = (repository / "dvc.lock").read_bytes()
    for lock in (before, None):
        if lock is None:
            (repository / "dvc.lock").unlink()
        done = run(
            repository, "snakemake", "--cores", "all", "--allowed-rules", "package", "--force", "--", "build/package"
        )
        assert done.returncode == 1, done.stdout
        assert "nothing says what" in done.stdout
        assert "nothing was built" in done.stdout


def test_other_stages_make_other_models(repository):
    """Without merge the exported model is another one, though no parameter of its rule has changed."""
    change(repository, "all", stages=["quantize"])
    done = record(repository)
    assert done.returncode == 1
    assert f"build/onnx-int4 {OTHER}" in done.stdout
    profile = repository / "own" / "config.yaml"
    profile.parent.mkdir()
    profile.write_text("rerun-triggers: [mtime]\n", encoding="utf-8")
    done = run(repository, "env", f"SNAKEMAKE_PROFILE={profile.parent}", "python", "-m", "tools.build")
    assert done.returncode == 0, done.stdout
    assert "quantize → build/onnx-int4 (other inputs" in done.stdout


def test_a_package_names_the_inputs_that_its_model_has(repository):
    change(repository, "all", stages=["quantize", "evaluate", "gates", "package"])
    done = run(
        repository,
        "snakemake",
        "--cores",
        "all",
        "--rerun-triggers",
        "mtime",
        "params",
        "code",
        "--forcerun",
        "package",
    )
    assert done.returncode == 1, done.stdout
    assert f"build/onnx-int4 {OTHER}" in done.stdout


def test_a_rule_of_the_snakefile_is_an_input(repository):
    edit(repository, "Snakefile", '"python -m scripts.merge"', '"true && exec python -m scripts.merge"')
    done = record(repository)
    assert done.returncode == 1
    assert f"build/merged {OTHER}" in done.stdout
    assert "merge" in planned(repository)
    assert (
        "build/code/merge" in run(repository, "dvc", "repro", "--dry", "merge").stdout
        or "merge" in run(repository, "dvc", "status", "merge").stdout
    )


def test_dvc_sees_another_option_of_a_rule(repository):
    edit(repository, "Snakefile", 'nproc_per_node="auto"', "nproc_per_node=1")
    done = run(repository, "dvc", "repro", "finetune")
    assert done.returncode == 0, done.stdout
    assert "Running stage 'finetune'" in done.stdout


def test_dvc_runs_no_rule_under_the_digest_of_other_code(repository):
    before = (repository / "dvc.lock").read_bytes()
    edit(repository, "slmake/training/schedule.py", "def batches(", "OTHER = 1\n\n    def batches(")
    done = run(repository, "dvc", "repro", "-s", "-f", "finetune")
    assert done.returncode
    assert "build/code/finetune is of other code or parameters than those that are here now" in done.stdout
    assert (repository / "dvc.lock").read_bytes() == before
    assert run(repository, "dvc", "checkout", "build/adapter").returncode == 0  # DVC had removed it by itself
    assert (repository / ADAPTER).exists()


def test_no_old_scores_are_published_with_a_new_model(repository):
    change(repository, "publish", url="az://models/tones")
    change(repository, "all", stages=["finetune", "merge", "quantize", "evaluate", "publish"])
    change(repository, "quantize", block_size=16)
    done = run(repository, "snakemake", "--cores", "all", "build/onnx-int4")
    assert done.returncode == 0, done.stdout
    done = run(repository, "snakemake", "--cores", "all", "--allowed-rules", "publish", "--", "results/published.json")
    assert done.returncode == 1
    assert "was built before build/" in done.stdout, done.stdout


def test_a_second_build_publishes_nothing(repository):
    """There is no account here: an upload would fail."""
    change(repository, "publish", url="az://models/tones")
    change(repository, "all", stages=["quantize", "publish"])
    done = run(repository, "snakemake", "--cores", "all", "build/onnx-int4")
    assert done.returncode == 0, done.stdout
    done = run(repository, "python", "-m", "tools.reproduce")
    assert done.returncode == 0, done.stdout
    assert "byte-identical" in done.stdout
    assert "published" not in done.stdout


def test_what_is_brought_back_was_not_published(repository):
    """The pointer may be to a later model: what DVC brings back, publishes of an experiment or skips is no release."""
    change(repository, "publish", url="az://models/tones")
    change(repository, "all", stages=["quantize", "publish"])
    done = run(repository, "snakemake", "--cores", "all", "build/onnx-int4")
    assert done.returncode == 0, done.stdout
    (repository / "results/published.json").write_text("{}", encoding="utf-8")
    run(repository, "snakemake", "--touch", "--cores", "1", "--", "results/published.json")
    assert record(repository).returncode == 0
    assert not planned(repository)
    assert "published.json" not in (repository / "dvc.yaml").read_text(encoding="utf-8")
    done = restore(repository)
    assert done.returncode == 0, done.stdout
    assert "has to publish it: no receipt says what is the latest model there" in done.stdout
    assert set(planned(repository)) == {"publish"}


def test_copies_see_no_file_beside_them(repository):
    """`../` of a name leads to a link in the copy's own folder, and its content counts."""
    (repository.parent / "shared").mkdir()
    rows = repository.parent / "shared" / "rows.json"
    (repository / "data" / "dataset.json").rename(rows)
    change(repository, "prepare", source="../shared/rows.json")
    for _ in range(2):
        done = run(repository, "python", "-m", "tools.seeds", "--runs", "1")
        assert done.returncode == 0, done.stdout
        rows.write_text(rows.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert len(list((repository / seeds.KEPT).glob("*.json"))) == 2
    assert not (repository / "build" / "seeds" / "shared").exists()


def test_seeds_name_no_parameters_that_were_edited_meanwhile(repository, monkeypatch, refused):
    monkeypatch.chdir(repository)
    own = seeds.build

    def edit_behind(*arguments):
        own(*arguments)
        change(repository, "finetune", learning_rate=0.5)

    monkeypatch.setattr(seeds, "build", edit_behind)
    assert "parameters, code or data changed since the runs began" in refused(seeds.main, ["--runs", "1"])
    assert not (repository / seeds.RESULT).exists()
    assert params.load(repository / "params.yaml").finetune.learning_rate == 0.5


def test_another_build_while_it_is_recorded_is_seen(repository, monkeypatch, refused):
    from slmake.platforms import dvc
    from tools import record as tool

    monkeypatch.chdir(repository)
    change(repository, "finetune", learning_rate=0.02)
    assert run(repository, "snakemake", "--cores", "all").returncode == 0
    before = (repository / "dvc.lock").read_bytes()

    def build_behind(*arguments, **options):
        done = dvc.dvc(*arguments, **options)
        subprocess.run(["touch", "data/dataset.json"], check=True)
        assert run(repository, "snakemake", "--cores", "all", "--force", "build/dataset").returncode == 0
        return done

    monkeypatch.setattr(tool, "dvc", build_behind)
    assert "another build wrote outputs while they were recorded" in refused(tool.main, [])
    assert (repository / "dvc.lock").read_bytes() == before


def test_outputs_behind_a_link_are_refused_at_once(repository, tmp_path):
    (repository / "build").rename(tmp_path / "scratch")
    (repository / "build").symlink_to(tmp_path / "scratch")
    done = build(repository)
    assert done.returncode == 2
    assert "build is a link, and DVC records nothing behind one" in done.stdout


def test_a_file_that_looks_like_an_option_is_refused(repository):
    (repository / "data" / "dataset.json").rename(repository / "-rows.json")
    change(repository, "prepare", source="-rows.json")
    done = build(repository)
    assert done.returncode == 1
    assert "-rows.json: a program would take it for an option. Rename the file." in done.stdout


@pytest.mark.parametrize("name", sorted(METRICS))
def test_scores_are_compared_by_content_when_they_are_restored(repository, name):
    scores = json.loads((repository / name).read_text(encoding="utf-8"))
    (repository / name).write_text(json.dumps(scores), encoding="utf-8")
    done = restore(repository)
    assert done.returncode == 0, done.stdout
    assert (repository / name).read_text(encoding="utf-8") != json.dumps(scores)


def test_a_data_file_that_is_gone_is_seen(repository):
    """DVC compares the files that dvc.yaml names now: one that it names no more would be no change."""
    rows = json.loads((repository / "data" / "dataset.json").read_text(encoding="utf-8"))
    for number, part in enumerate((rows[:60], rows[60:])):
        (repository / "data" / f"part-{number}.json").write_text(json.dumps(part), encoding="utf-8")
    change(repository, "prepare", source="data/part-*.json")
    change(repository, "all", stages=[])
    assert build(repository).returncode == 0
    before = (repository / "dvc.lock").read_bytes()
    (repository / "data" / "part-1.json").unlink()
    done = restore(repository)
    assert done.returncode == 1, done.stdout
    assert "prepare" in done.stdout
    assert (repository / "dvc.lock").read_bytes() == before
    assert "build/code/prepare" in run(repository, "dvc", "status", "prepare").stdout
    shutil.rmtree(repository / ".snakemake")
    assert build(repository).returncode == 1
    assert (repository / "dvc.lock").read_bytes() == before
    done = run(repository, "snakemake", "--cores", "all", "--force", "build/dataset")
    assert done.returncode == 0, done.stdout
    assert json.loads((repository / "results" / "dataset.json").read_text(encoding="utf-8"))["rows"]["read"] == 60


def test_scores_of_a_model_that_is_no_stage_any_more_are_seen(repository):
    change(repository, "all", stages=["finetune", "merge", "evaluate", "gates", "report"])
    for name in (".snakemake", ".dvc/tmp", "benchmarks"):
        shutil.rmtree(repository / name)
    done = record(repository)
    assert done.returncode == 1, done.stdout
    assert "nothing says what results/metrics.json" in done.stdout


def test_a_package_of_pulled_outputs_names_no_other_code(repository):
    """What DVC brings of build/code is of the code that was there; it is not compared with that, but with the code that is here."""
    for name in (".snakemake", ".dvc/tmp", "benchmarks", "build/package"):
        shutil.rmtree(repository / name)
    edit(repository, "slmake/training/schedule.py", "def batches(", "OTHER = 1\n\n    def batches(")
    done = run(repository, "snakemake", "--cores", "all", "--force", "build/package")
    assert done.returncode == 1, done.stdout
    assert "nothing says what build/adapter was built from; nothing was built" in done.stdout
    assert not (repository / "build" / "package").exists()


def test_what_another_snakefile_has_built_is_not_recorded(repository):
    text = (repository / "Snakefile").read_text(encoding="utf-8")
    assert text.count('nproc_per_node="auto"') == 1
    (repository / "other.smk").write_text(text.replace('nproc_per_node="auto"', "nproc_per_node=1"), encoding="utf-8")
    done = run(repository, "snakemake", "--cores", "all", "--snakefile", "other.smk", "build/adapter")
    assert done.returncode == 0, done.stdout
    done = record(repository)
    assert done.returncode == 1
    assert f"build/adapter {OTHER}" in done.stdout


def test_candidates_of_another_model_are_seen(repository):
    change(repository, "quantize", calibration="none", search={"block_size": [16, 32], "rows": 24})
    change(repository, "gates", checks=[{"metric": "kl_mean", "maximum": 5.0}])
    done = build(repository)
    assert done.returncode == 0, done.stdout
    assert record(repository).returncode == 0
    change(repository, "all", stages=["quantize", "evaluate", "gates"])
    triggers = ("--rerun-triggers", "mtime", "params", "code", "--forcerun", "quantize")
    assert run(repository, "snakemake", "--cores", "all", *triggers).returncode == 0
    done = record(repository)
    assert done.returncode == 1, done.stdout
    assert f"build/search/merged {OTHER}" in done.stdout or f"results/search.json {OTHER}" in done.stdout
