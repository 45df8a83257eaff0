# What Snakemake needs and no reader of the pipeline does: parameters, checks before anything runs, containers, messages.

import atexit
import json
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

from slmake import cli, params, planned
from slmake.code_inputs import code, remember
from slmake.errors import UserError
from slmake.outputs import break_readonly_hardlinks
from slmake.plan import LOCKS, Plan, when
from slmake.platforms import building
from slmake.platforms import container as containers
from slmake.platforms import dvc, dvc_yaml, named_files, origins, slurm
from slmake.platforms.slurm import memory

if config:
    raise WorkflowError(f"--config and --configfile are not used here (got {', '.join(config)}): edit params.yaml.")

# The rules' `python` is the one that runs Snakemake, also when its environment is not activated.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))

# A rule ends when Snakemake is killed (slmake/cli.py). Its `python` takes the place of the shell, and gets the signals for it.
os.environ[cli.ENGINE] = cli.engine()
shell.prefix("exec ")
atexit.register(remember)
atexit.register(building.release)

try:
    # DVC links single files read-only to its cache, too, and Snakemake refuses to replace a file that may not be written.
    # (`make pull` sets the times of what it pulled, on both ends of the link: on a copy they would be lost when DVC links again.)
    if origins.PULLED not in os.environ:
        break_readonly_hardlinks()
        origins.date_results()
    if workflow.is_main_process:
        os.environ.pop(cli.PLANNED, None)
        os.environ.pop(cli.SOURCES, None)
    PLAN = Plan(params.load("params.yaml"), Path(workflow.main_snakefile))
    os.environ[cli.PLANNED] = json.dumps(params.sums(PLAN.params))  # every rule refuses other values (params.load)
    STAGES = PLAN.stages
    CONTAINER = PLAN.params.all.container
    # With profiles/container or profiles/slurm, rules run in this image; without a profile or an image, in this environment.
    IMAGE = containers.image(CONTAINER)
    IN_CONTAINERS = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
    named_files.refuse_unusable_date(PLAN)
    # DVC, Azure ML and Snakemake's own jobs run one rule alone and have the inputs of that rule only.
    if "--allowed-rules" not in sys.argv:
        if problem := PLAN.missing():
            raise UserError(problem)
        named_files.refuse_unusable(PLAN)
    os.environ.setdefault(cli.SOURCES, planned.write({rule: PLAN.given(rule) for rule in PLAN.rules}))
    if workflow.is_main_process:
        origins.refuse_other_sources(PLAN)
        dvc_yaml.refuse_stale()
        origins.refuse_other_than_pulled(PLAN)
    if CONTAINER and IN_CONTAINERS:
        containers.prepare(CONTAINER, PLAN.files, online=PLAN.online)
    if not workflow.is_main_process:
        slurm.refuse_missing_gpu(CONTAINER if IN_CONTAINERS else None)
    PLAN.candidates  # refused here, if none is possible
except UserError as error:
    raise WorkflowError(str(error)) from None
except OSError as error:
    raise WorkflowError(cli.explain_os_error(error)) from None


def code_of(rule):
    """Code, a user's own metrics and tasks included, and environment's locks, compared by content (see `built_from`)."""
    own = PLAN.named(rule) if rule in ("rehearse", "candidate", "evaluate") else []
    return ancient([*code(rule), *own, *LOCKS])


def built_from(rule):
    """Params that make a rule run again when they differ, its sections of params.yaml and the digest of the files that it reads."""

    def section(wildcards):  # a function, because Snakemake would take the braces of a text for wildcards
        return PLAN.candidate_section(wildcards.candidate) if rule == "candidate" else PLAN.section(rule)

    return {"section": section, "sources": PLAN.digest(rule)}


def optional(*names):
    """The options `--name FILE` for inputs that a rule has under a condition only, and no text for those that it has not."""
    return lambda wildcards, input: " ".join(f"--{name} {input[name]}" for name in names if input[name])


report: "../report/workflow.rst"


container: lambda wildcards: IMAGE  # a function, because there may be none


localrules:
    all,


mark = report  # at the start of a line Snakemake would take `report` for a keyword
REPORT = [
    mark(f"build/report/{file}", caption=f"report/{Path(file).stem}.rst", category=category, labels={"figure": title})
    for file, category, title in PLAN.figures
]


onstart:
    for folder in ("build", "results", "logs", "benchmarks"):
        if Path(folder).exists() and not os.access(folder, os.W_OK):  # Snakemake would end in a traceback
            raise WorkflowError(
                f"cannot write to {folder}/: it is read-only here. Check its owner, its permissions and how it is mounted; "
                "what was built is untouched."
            )
    try:
        # --touch is the user's own claim, and `make pull` has compared.
        if workflow.is_main_process and not workflow.touch:
            jobs = list(workflow.dag.needrun_jobs())
            origins.refuse_future({str(path) for job in jobs for path in job.input})
            rebuilt = {str(path) for job in jobs for path in job.output}
            made_of = origins.inputs_of((job.rule.name, job.input) for job in workflow.dag.jobs)
            if not workflow.dag_settings.allowed_rules:  # DVC and Azure ML run one rule and compare for themselves
                origins.refuse_replaced(PLAN, made_of, rebuilt)
            elif "DVC_STAGE" in os.environ:
                made_of = origins.inputs_by_dvc(dvc.entries())
            running = {job.rule.name for job in jobs}
            origins.refuse_other_upstream(PLAN, made_of, running, rebuilt, IMAGE if IN_CONTAINERS else None)
            if not workflow.dag_settings.allowed_rules and Path(".dvc").is_dir():
                building.hold(dvc.made())
        if CONTAINER and IN_CONTAINERS:
            containers.check(CONTAINER)
    except UserError as error:
        raise WorkflowError(str(error)) from None
    if IN_CONTAINERS and not CONTAINER and workflow.local_exec:
        raise WorkflowError(
            "all.container in params.yaml names no image. `make image sif` builds one and prints the line."
        )
    if CONTAINER and not IN_CONTAINERS and "SLMAKE_MACHINE" not in os.environ:
        print(f"note: not in {IMAGE}: that takes --profile profiles/container.", file=sys.stderr)


onsuccess:
    building.release()
    try:
        params.load("params.yaml")  # still as planned: what DVC or tools.record note beside the outputs
    except UserError as error:
        raise WorkflowError(str(error)) from None


onerror:
    building.release()
    if gone := dvc.lost():
        print(
            f"note: {gone[0]} of the last recorded build is not here any more. Undo what you changed, then `make restore` brings it back "
            "from DVC's cache.",
            file=sys.stderr,
        )
    if not workflow.local_exec:
        for reason in slurm.reasons(Path(log[0]).read_text(encoding="utf-8")):
            print(f"error: {reason}", file=sys.stderr)
