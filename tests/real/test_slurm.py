"""The tiny pipeline as real Slurm jobs, each in its container: undisturbed, cancelled half-way, out of memory, out of time."""

import re
import shlex
import subprocess
import sys
import time

import pytest
from project import RULES, change, digests, elsewhere, environment, new_project, planned, run, snakemake
from tiny import ROOT

SLURM = (
    "--profile", "profiles/slurm", "--set-resources", "finetune:gpu=0", "evaluate:gpu=0", "--max-threads", "2",
    "--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2", "--latency-wait", "10",
)  # fmt: skip


@pytest.fixture(scope="session")
def clustered(tmp_path_factory, base, image, slurm):
    """A tiny project built by `snakemake --profile profiles/slurm`, what it printed in `printed.txt`. Copy it to change it."""
    project = new_project(tmp_path_factory.mktemp("clustered") / "project", base)
    change(project, "all", container=image)
    done = run(project, "snakemake", *SLURM)
    assert done.returncode == 0, done.stdout
    (project / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return project


@pytest.fixture
def copy_of_clustered(clustered, tmp_path):
    target = tmp_path / "project"
    subprocess.run(["cp", "-a", clustered, target], check=True)
    return target


def jobs(printed: str) -> list[str]:
    """Slurm's job ids, in the order of submission."""
    return re.findall(r"submitted with SLURM jobid (\d+)", printed)


def test_every_rule_is_a_job_and_the_bytes_are_the_same(built, clustered):
    printed = (clustered / "printed.txt").read_text(encoding="utf-8")
    assert len(set(jobs(printed))) == len(RULES)
    assert elsewhere(digests(clustered)) == elsewhere(digests(built))
    assert planned(clustered, *SLURM) == set()
    assert printed.index("(Rule: rehearse)") < printed.index("rule finetune:"), (
        "training did not wait for the rehearsal"
    )
    for name in RULES:
        asked = re.search(rf"rule {name}:.*?resources: (.*?)\n", printed, re.S).group(1)
        assert re.search(r"mem_mb=\d+, ", asked), asked
        assert "gpu=1" not in asked


def test_a_cancelled_finetune_goes_on_in_the_next_job(copy_of_clustered, built, tmp_path):
    """scancel in the middle: a second job resumes from the checkpoint and ends in the bytes of an undisturbed run."""
    undisturbed = tmp_path / "undisturbed"
    subprocess.run(["cp", "-a", built, undisturbed], check=True)
    for project in (undisturbed, copy_of_clustered):
        change(project, "finetune", max_steps=120, save_steps=5, eval_steps=0)
    done = snakemake(undisturbed, "build/adapter")
    assert done.returncode == 0, done.stdout

    project = copy_of_clustered
    with open(tmp_path / "printed.txt", "w+") as printed:
        process = subprocess.Popen(
            ["snakemake", *SLURM, "build/adapter"],
            cwd=project,
            env=environment(),
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 600
            while not list((project / "build").glob("checkpoints/*/step-*/state.json")):
                assert process.poll() is None, (tmp_path / "printed.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            first = jobs((tmp_path / "printed.txt").read_text())[-1]
            subprocess.run(["scancel", first], check=True)
            assert process.wait(timeout=900) == 0, (tmp_path / "printed.txt").read_text()
        finally:
            process.kill()
    text = (tmp_path / "printed.txt").read_text()
    assert len(jobs(text)) == 2
    assert f"SLURM-job '{first}' failed, SLURM status is: 'CANCELLED'" in text
    assert "resumes from step" in (project / "logs" / "finetune.log").read_text()
    wanted, found = digests(undisturbed), digests(project)
    made = [name for name in wanted if name.startswith(("build/adapter/", "results/train_loss", "results/eval_loss"))]
    assert len(made) >= 4
    assert {name: found[name] for name in made} == {name: wanted[name] for name in made}


def little_memory(project) -> None:
    """Let `merge` ask for far too little."""
    snakefile = project / "Snakefile"
    text = snakefile.read_text(encoding="utf-8")
    assert "memory(4000, 2)" in text
    snakefile.write_text(text.replace("memory(4000, 2)", "memory(300)"), encoding="utf-8")


MERGE = ("--force", "build/merged", "--allowed-rules", "merge")


def test_out_of_memory_is_tried_again_with_more(copy_of_clustered, slurm):
    """A job that Slurm kills for its memory is submitted again with twice as much, until it fits."""
    little_memory(copy_of_clustered)
    done = run(copy_of_clustered, "snakemake", *SLURM, *MERGE)
    assert done.returncode == 0, done.stdout
    asked = [int(mb) for mb in re.findall(r"\bmem_mb=(\d+)", done.stdout)]
    assert asked[:2] == [300, 600]
    assert len(jobs(done.stdout)) >= 2
    # Whether the job itself still gets to print the reason is a race; the node's daemon always notes it.
    killed = rf"StepId={jobs(done.stdout)[0]}\.0 exceeded memory limit"
    assert re.search(killed, (slurm / "slurmd.log").read_text(encoding="utf-8"))


def test_out_of_memory_is_told(copy_of_clustered):
    """Rule, job id, reason, what to do and log stand in one line at the end."""
    little_memory(copy_of_clustered)
    done = run(copy_of_clustered, "snakemake", *SLURM, *MERGE, "--retries", "0")
    assert done.returncode != 0
    (job,) = jobs(done.stdout)
    log = copy_of_clustered / "logs" / "slurm" / "rule_merge" / f"{job}.log"
    why = "it was killed over its memory limit of 300 MB. Raise it: --set-resources merge:mem_mb=MB"
    assert f"error: rule merge, Slurm job {job}: {why}" in done.stdout
    assert f"Its log: {log}\n" in done.stdout
    assert log.is_file()


def failure(project, *arguments: str) -> str:
    """What a build prints that must fail."""
    done = run(project, "snakemake", *SLURM[:2], *arguments, "--retries", "0", "--force", "results/gates.json")
    assert done.returncode != 0
    assert "Error in rule gates" in done.stdout
    assert "logs/gates.log" in done.stdout
    return done.stdout


def test_a_partition_that_does_not_exist(copy_of_clustered):
    said = failure(copy_of_clustered, "--default-resources", "slurm_partition=nowhere", *SLURM[5:])
    assert "invalid partition specified: nowhere" in said


def test_a_gpu_that_is_not_there(copy_of_clustered):
    """Slurm hands out a GPU on a node without a driver: the job says so, with its id."""
    said = failure(copy_of_clustered, "--set-resources", "gates:gpu=1", *SLURM[5:])
    assert f"Slurm job {jobs(said)[0]} on" in said
    assert "was given a GPU (CUDA_VISIBLE_DEVICES=0), but no NVIDIA driver is there" in said


def test_out_of_time(copy_of_clustered):
    """A job over its time limit: rule, job id and log are named."""
    script = copy_of_clustered / "scripts" / "gates.py"
    text, start = script.read_text(encoding="utf-8"), "    parser = cli.parser(__doc__)\n"
    assert start in text
    script.write_text(text.replace(start, f"    __import__('time').sleep(600)\n{start}"), encoding="utf-8")
    said = failure(copy_of_clustered, "--set-resources", "gates:runtime=1", *SLURM[5:])
    assert f"SLURM-job '{jobs(said)[0]}' failed, SLURM status is: 'TIMEOUT'" in said
    why = "it ran over its time limit of 1 minutes. Raise it: --set-resources gates:runtime=MINUTES"
    assert f"error: rule gates, Slurm job {jobs(said)[0]}: {why}" in said


def test_tasks_of_srun_train_together(base, dataset, slurm, tmp_path):
    """The way of a job with several nodes, on the one node there is: srun starts the processes, and the bytes are those of `auto`'s."""
    from finetune_script import command
    from test_distributed import contents, tune_by_two

    tune_by_two(tmp_path / "pair", base, dataset)
    arguments = ["-m", "scripts.finetune", *command(tmp_path / "spread", base, dataset)]
    code = (
        "import sys; from slmake.training import distributed; distributed._srun(1, 2, [sys.executable, *sys.argv[1:]])"
    )
    script = f"PYTHONPATH={shlex.quote(str(ROOT))} " + shlex.join([sys.executable, "-c", code, *arguments])
    done = run(
        tmp_path, "sbatch", "--wait", "--ntasks=2", "--mem=4000", "--time=20", f"--wrap={script}", "--output=log"
    )
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert contents(tmp_path / "spread") == contents(tmp_path / "pair")
