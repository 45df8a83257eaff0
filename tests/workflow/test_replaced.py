"""Outputs that were replaced since they were built: no receipt, provenance or package takes them for what Snakemake has a record of."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from project import build, change, planned, run

from slmake.platforms import dvc
from tools import record


def status(project: Path) -> str:
    return run(project, "dvc", "status", "finetune").stdout


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_an_old_adapter_is_not_taken_for_the_new_one(repository, tmp_path, how):
    adapter, old = repository / "build" / "adapter", tmp_path / "old"
    if how == "copied":
        subprocess.run(["cp", "-a", adapter, old], check=True)
    else:
        adapter.rename(old)  # its files keep their times and inodes
    change(repository, "finetune", learning_rate=0.02)
    change(repository, "gates", min_accuracy=1.0)
    assert build(repository).returncode == 1  # stopped at gates: nothing is recorded
    package = (repository / "build" / "package").exists()
    shutil.rmtree(adapter)
    old.rename(adapter)
    change(repository, "gates", min_accuracy=0.0)
    done = build(repository)
    assert done.returncode == 1
    assert "build: error: nothing says what build/adapter was built from; nothing was built" in done.stdout
    assert (repository / "build" / "package").exists() == package
    done = run(repository, "snakemake", "--cores", "all", "--force", "build/adapter")
    assert done.returncode == 0, done.stdout
    done = build(repository)
    assert done.returncode == 0, done.stdout
    assert "up to date" in status(repository)


def test_snakemake_builds_nothing_on_an_output_that_was_replaced(repository):
    """Without `make`, too; but it builds that output again."""
    file = repository / "build" / "merged" / "config.json"
    file.write_text(file.read_text().replace("{", "{ ", 1))
    change(repository, "quantize", block_size=16)
    done = run(repository, "snakemake", "--cores", "all")
    assert done.returncode == 1
    assert "nothing says what build/merged was built from; nothing was built" in done.stdout
    assert (repository / "build" / "onnx-int4").exists()
    assert run(repository, "snakemake", "--dry-run").returncode == 0
    done = run(repository, "snakemake", "--cores", "all", "--forcerun", "merge", "--", "build/onnx-int4")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("lost", ["all", "one"])
def test_snakemake_builds_nothing_on_an_output_that_it_has_no_record_of(repository, lost):
    """It would not see that parameters have changed, and the package would claim them."""
    if lost == "all":
        shutil.rmtree(repository / ".snakemake")
        shutil.rmtree(repository / "build" / "package")
    else:
        done = run(repository, "snakemake", "--cleanup-metadata", "build/adapter")
        assert done.returncode == 0, done.stdout
    change(repository, "finetune", learning_rate=0.02)
    for _ in range(2):
        done = build(repository)
        assert done.returncode == 1
        assert re.search(r"nothing says what [^;]*build/adapter", done.stdout), done.stdout
        assert "nothing was built" in done.stdout
    command = re.search(r"`\.venv/bin/(snakemake --cores all --force [^`]*)`", done.stdout)[1]
    done = run(repository, *command.split())
    assert done.returncode == 0, done.stdout
    done = build(repository)
    assert done.returncode == 0, done.stdout


def test_an_output_that_is_older_than_what_it_is_made_from_is_not_recorded(repository):
    """Without the stage package nothing else would tell: the recording by itself does not ask Snakemake."""
    change(repository, "all", stages=["finetune", "merge"])
    change(repository, "finetune", learning_rate=0.02)
    assert build(repository).returncode == 0
    done = run(repository, "snakemake", "--cores", "all", "--force", "build/adapter")
    assert done.returncode == 0, done.stdout
    done = run(repository, "python", "-m", "tools.record")
    assert done.returncode == 1
    assert "build/merged was built before build/adapter, which it is made from; nothing was recorded" in done.stdout
    done = build(repository)
    assert done.returncode == 0, done.stdout


def test_what_dvc_restores_of_another_run_is_not_taken_for_this_one(repository):
    """0.02 by DVC, back to 0.01 from DVC's cache, then 0.02 again by make."""
    for rate in (0.02, 0.01):
        change(repository, "finetune", learning_rate=rate)
        done = run(repository, "dvc", "repro", "finetune")
        assert done.returncode == 0, done.stdout
    change(repository, "finetune", learning_rate=0.02)
    done = build(repository)
    adapter = repository / "build" / "adapter" / "adapter_model.safetensors"
    if done.returncode:
        assert "nothing says what build/adapter was built from" in done.stdout
        return
    wrong = adapter.read_bytes()
    assert run(repository, "snakemake", "--cores", "all", "--force", "build/adapter").returncode == 0
    assert adapter.read_bytes() == wrong  # it was trained anew


def test_what_was_checked_out_and_recorded_is_not_taken_for_what_was_built_last(repository):
    """Another split by make, then receipts and files of the first again, recorded; Snakemake's own record is still of the other."""
    change(repository, "all", stages=["finetune"])  # all that DVC keeps: of times and scores it has the receipts only
    assert build(repository).returncode == 0
    lock = repository / "dvc.lock"
    first = lock.read_bytes()
    change(repository, "prepare", seed=7)
    assert build(repository).returncode == 0
    change(repository, "prepare", seed=42)
    lock.write_bytes(first)
    for command in (("dvc", "checkout", "--force", "--quiet"), ("python", "-m", "tools.record")):
        done = run(repository, *command)
        assert done.returncode == 0, done.stdout
    assert lock.read_bytes() == first
    change(repository, "prepare", seed=7)
    done = build(repository)
    assert done.returncode == 1
    assert "nothing says what build/dataset was built from" in done.stdout
    assert lock.read_bytes() == first


def test_a_record_that_is_killed_when_outputs_are_linked_works_again(repository, monkeypatch):
    monkeypatch.chdir(repository)
    dvc.cache.cache_clear()
    change(repository, "finetune", learning_rate=0.02)
    assert run(repository, "snakemake", "--cores", "all").returncode == 0

    def commit_and_die(*arguments, **options):
        done = dvc.dvc(*arguments, **options)
        assert done.returncode == 0, done.stderr
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "dvc", commit_and_die)
    before = Path("dvc.lock").read_bytes()
    with pytest.raises(SystemExit):
        record.main([])
    assert Path("build/adapter/adapter_model.safetensors").stat().st_nlink > 1
    assert Path("dvc.lock").read_bytes() == before
    monkeypatch.setattr(record, "dvc", dvc.dvc)
    record.main([])
    assert "up to date" in status(repository)
    dvc.cache.cache_clear()


@pytest.mark.parametrize("name", ["build/adapter/adapter_model.safetensors", "data/dataset.json"])
def test_an_edit_that_keeps_size_and_time_is_seen(repository, name):
    file = repository / name
    if name.startswith("data"):
        shutil.rmtree(repository / ".snakemake")
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-8] = content[-8] ^ 1
    with open(file, "r+b") as handle:
        handle.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = build(repository)
    assert done.returncode == 1, done.stdout
    assert re.search("(was|were) built from|was modified since", done.stdout)


def test_a_record_leaves_nothing_in_the_cache_of_runs(repository):
    assert not (repository / ".dvc" / "cache" / "runs").exists()


def test_a_file_that_no_rule_reads_changes_nothing(repository):
    (repository / "data" / "base" / ".DS_Store").touch()
    assert planned(repository) == set()


def test_what_rotted_in_a_copied_project_is_not_recorded(repository, tmp_path):
    """Of a copy only sizes and times are known, and the receipts are not byte for byte those of the last record."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", repository, copy], check=True)
    weights = copy / "build" / "adapter" / "adapter_model.safetensors"
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()  # it is a link into DVC's cache
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with open(copy / "dvc.lock", "a", encoding="utf-8") as handle:
        handle.write("# another commit\n")
    before = (copy / "dvc.lock").read_bytes()
    done = build(copy)
    assert done.returncode == 1
    assert "nothing says what build/adapter was built from; nothing was recorded" in done.stdout
    assert (copy / "dvc.lock").read_bytes() == before


def test_dvc_packs_no_model_of_another_adapter(repository):
    """`--downstream` leaves out the stage that would build the adapter again."""
    for command in ("snakemake --cores all build/adapter", "dvc repro --downstream merge"):
        change(repository, "finetune", num_train_epochs=2.0 if "snakemake" in command else 1.0)
        done = run(repository, *command.split())
    assert done.returncode
    assert "build/adapter was built from other parameters, code or data than those that are here now" in done.stdout
    shutil.rmtree(repository / "build" / "adapter")
    assert run(repository, "git", "checkout", "dvc.lock", "params.yaml").returncode == 0
    done = run(repository, "python", "-m", "tools.remote", "restore")
    assert done.returncode == 0, done.stdout
    weights = repository / "build" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    done = run(repository, "dvc", "repro", "--downstream", "merge")
    assert done.returncode
    assert "build/adapter was built from other parameters, code or data than those that are here now" in done.stdout
