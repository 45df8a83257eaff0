"""Write dvc.yaml from the Snakefile: one stage per rule, each of which calls Snakemake for that rule alone.

    python -m slmake.platforms.dvc_yaml

Snakemake alone knows commands, environments and resources; DVC decides by content what is out of date. The rules, their
inputs and outputs are read from `snakemake -n -F`, so that nothing is written twice.

DVC compares bytes, and Snakemake compares code without comments and docstrings, and sections of params.yaml with their defaults. So the
stage `code` writes digests of every rule's code, command and sections into a file (`--digests`), and the other stages depend on these
files: after a comment `dvc repro` runs `code` alone.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import yaml

from slmake import outputs
from slmake.code_inputs import code, digest, modules, remember, rule_digest, snakefiles
from slmake.errors import UserError
from slmake.params import RULES, Params, load, sums
from slmake.plan import LOCKS, SECTIONS, Plan
from slmake.platforms.dvc import RELEASED, entries, outs, unreadable

HEADER = """\
# Generated from the Snakefile by `make docs`; a test compares the two. One stage per rule: DVC decides by content what is
# out of date, Snakemake knows how to build it. `dvc repro` rebuilds, `dvc push` and `dvc pull` share what was built.
# Stages that you add are kept, without their comments.
"""
MEMBERS = {"candidate": "search"}  # rules with wildcards: their jobs belong to the stage of the rule that gathers them
CODE, DIGESTS = "code", "build/code"  # the stage that is no rule, and what it writes
PUBLISH = "publish"  # no stage: DVC would publish each experiment, and nothing where it brings what was published back from its cache
BY_BYTES = "package"  # its provenance names every file of code by its bytes
PATH = 'PATH="$PWD/.venv/bin:$PATH"'  # the environment's own programs first, whether or not it is activated
NOTE = Path(".dvc/tmp/slmake.yaml.sha256")  # what dvc.yaml was last written from
METRICS = {"results/metrics.json"}  # small and the same in every run: kept in Git
TIMINGS = ["results/benchmark.json"]
CURVES = ["results/train_loss.csv", "results/eval_loss.csv"]
PREDICTIONS = "results/predictions.csv"
ABSENT = "options_of_absent_outputs"  # a variable of dvc.yaml
OUR_PLOT = re.compile("Loss$|Confusion of ")


class UnknownRule(UserError):
    """A rule that would run, and that no stage stands for: nothing could record it."""


def rules() -> dict[str, dict[str, list[str]]]:
    """Rule name to its inputs and outputs, in the Snakefile's order, as a forced dry run of Snakemake prints them.

    Raises:
        UserError: Snakemake refuses the Snakefile or params.yaml; or an UnknownRule.
    """
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--nocolor", "--printshellcmds"]
    variables = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    text = done.stdout + done.stderr
    if done.returncode:
        raise UserError(f"snakemake --dry-run failed:\n{text}")
    graph: dict[str, dict[str, list[str]]] = {}
    name = None
    for line in text.splitlines():
        if line.startswith(("rule ", "localrule ")) and line.endswith(":"):
            name = line.split()[1].rstrip(":")
            name = MEMBERS.get(name, name)
            graph.setdefault(name, {"input": [], "output": []})
        elif name and line.startswith(("    input: ", "    output: ")):
            key, _, value = line.strip().partition(": ")
            graph[name][key] = list(dict.fromkeys(graph[name][key] + value.split(", ")))
        elif not line.startswith("    "):
            name = None
    graph.pop("all", None)
    if unknown := [name for name in graph if name not in RULES]:
        raise UnknownRule(
            f"Snakefile: slmake does not know the rule {unknown[0]}, so nothing would record what it makes. Add it as "
            "docs/how-to/add-a-rule.md says, or make it a stage of your own, which stays in dvc.yaml: `.venv/bin/dvc stage add`."
        )
    for rule in graph.values():  # what the members of a stage make for each other
        rule["input"] = [path for path in rule["input"] if path not in rule["output"]]
    written = re.findall(r"^rule (\w+):", Path("Snakefile").read_text(encoding="utf-8"), re.M)
    return {name: graph[name] for name in written if name in graph}  # independent jobs are printed in any order


def in_order(graph: dict[str, dict[str, list[str]]]) -> list[str]:
    """Rule names, each after the rules whose outputs it needs."""
    makers = {path: name for name, rule in graph.items() for path in rule["output"]}
    done: list[str] = []

    def visit(name: str) -> None:
        for path in graph[name]["input"]:
            if path in makers and makers[path] not in done:
                visit(makers[path])
        if name not in done:
            done.append(name)

    for name in graph:
        visit(name)
    return done


def dvc_yaml(graph: dict[str, dict[str, list[str]]], metric_models: list[str], given: Collection[str]) -> dict:
    """The content of dvc.yaml.

    Args:
        graph: rules as `rules` returns them.
        metric_models: columns of the predictions, for the confusion matrices.
        given: sections and parameters (`section.name`) that params.yaml has; DVC refuses others.
    """
    stages: dict[str, dict] = {
        CODE: {
            "cmd": f"{PATH} python -m slmake.platforms.dvc_yaml --digests",
            "deps": ["Snakefile", "scripts", "slmake", *LOCKS],
            "params": [name for name in Params.model_fields if name in given],
            "outs": [DIGESTS],
        }
    }
    outputs: set[str] = set()
    for name in (name for name in in_order(graph) if name != PUBLISH):
        rule = graph[name]
        outputs |= set(rule["output"])
        members = [name, *(member for member, stage in MEMBERS.items() if stage == name)]
        target = "results/search.json" if name == "search" else rule["output"][0]
        stages[name] = {
            "cmd": f"{PATH} snakemake --cores all --quiet host progress --allowed-rules {' '.join(members)} -- {target}",
            "deps": dependencies(name, members, rule["input"]),
            "params": [*(part for part in SECTIONS.get(name, [name]) if part in given), "all.container"],
            "outs": [{path: {"cache": False}} if path in METRICS else path for path in rule["output"]],
        }
    plots: list[dict] = []
    if CURVES[0] in outputs:
        plots.append(
            {"Loss": {"x": "step", "y": dict.fromkeys(CURVES, "loss"), "y_label": "cross entropy per answer token"}}
        )
    if PREDICTIONS in outputs:
        for model in metric_models:
            plots.append(
                {f"Confusion of {model}": {"template": "confusion", "x": model, "y": {PREDICTIONS: "expected"}}}
            )
    document: dict = {"stages": stages}
    metrics = [path for path in [*METRICS, *TIMINGS] if path in outputs]
    if metrics:
        document["metrics"] = metrics
    if plots:
        document["plots"] = plots
    return document


def dependencies(stage: str, members: list[str], inputs: list[str]) -> list[str]:
    """What DVC watches for a stage: its rules' inputs, and digests, in the place of code and the environment's locks."""
    replaced = set() if stage == BY_BYTES else {*LOCKS, *(file for member in members for file in code(member))}
    return sorted([*set(inputs) - replaced, *map(digest_file, members)])


def digest_file(rule: str) -> str:
    """Where the stage `code` writes the digests of a rule."""
    return f"{DIGESTS}/{rule}"


def digests(plan: Plan, rule: str, named: dict[str, dict]) -> str:
    """What the stage `code` writes into the file of a rule; `named` are the stages of dvc.yaml."""
    stage = MEMBERS.get(rule, rule)
    # Their names: DVC does not see that one is gone.
    made = [path for path in named.get(stage, {}).get("deps", []) if not path.startswith(DIGESTS)]
    parts = {
        "code": digest([*code(rule), *LOCKS]),
        "inputs": hashlib.sha256("\0".join(made).encode()).hexdigest(),
        "rule": rule_digest(rule),
        "section": hashlib.sha256(plan.section(stage).encode()).hexdigest(),
    }
    return "".join(f"{name}: {value}\n" for name, value in parts.items())


def write_digests() -> None:
    """Write what the stage `code` writes; a file that is right already keeps its time.

    Raises:
        UserError: params.yaml is refused.
    """
    Path(DIGESTS).mkdir(parents=True, exist_ok=True)
    plan, named = Plan(load("params.yaml")), entries()
    for rule in scripts():
        path, text = Path(digest_file(rule)), digests(plan, rule, named)
        if not path.is_file() or path.read_text(encoding="ascii") != text:
            outputs.replace(path, text.encode())


def scripts() -> list[str]:
    """The rules that have a script."""
    return sorted(path.stem for path in Path("scripts").glob("[a-z]*.py"))


def scored_models() -> list[str]:
    """The columns of predictions.csv that params.yaml asks for; none where there is no dataset, so that nothing is right or wrong."""
    params = load("params.yaml")
    if params.prepare is None:
        return []
    names = {"onnx": params.quantize.precision}
    return [names.get(name, name) for name in Plan(params).scored if name in params.evaluate.models]


def with_added(document: dict, file: Path) -> dict:
    """The content of dvc.yaml with what users have added to the present one.

    That is stages, metrics, plots, keys that no rule needs, and options of outputs, such as `push: false`; those of outputs that
    params.yaml does not ask for now are kept among DVC's variables.

    Raises:
        UserError: the present one cannot be read, or a user's stage has the name of a rule that has a stage now.
    """
    from ruamel.yaml import YAML, YAMLError  # as DVC reads it: a key that is there twice is refused

    if not file.exists():
        return document
    try:
        present = dict(YAML(typ="safe").load(file.read_text(encoding="utf-8")) or {})
        every = present.pop("stages", None) or {}
        stages = {name: stage for name, stage in every.items() if not is_ours(name, stage)}
        variables = present.pop("vars", None) or []
        noted = [entry for entry in variables if isinstance(entry, dict) and ABSENT in entry]
        options = {path: kept for entry in noted for path, kept in (entry[ABSENT] or {}).items()}
        options |= options_of(stage for name, stage in every.items() if is_ours(name, stage))
        own = {
            name: stage | {"outs": with_options(stage["outs"], options)} for name, stage in document["stages"].items()
        }
        metrics = [path for path in present.pop("metrics", None) or [] if path not in (*METRICS, *TIMINGS)]
        plots = [plot for plot in present.pop("plots", None) or [] if not OUR_PLOT.match(next(iter(plot), ""))]
    except (ValueError, YAMLError, TypeError, AttributeError) as error:
        raise unreadable(error) from None
    if taken := [name for name in stages if name in document["stages"]]:
        raise UserError(
            f"{file}: the stage {taken[0]} is not as slmake writes it, and a rule has that name. Give yours another name, or remove it: "
            "`make` writes the rule's."
        )
    # Of outputs that no stage has now: a later build may have them again. DVC's variables cannot refer to others.
    made = {RELEASED, *(os.path.normpath(path) for stage in own.values() for path in outs(stage))}
    absent = {path: kept for path, kept in options.items() if kept and path not in made and "${" not in str(kept)}
    merged = {
        "vars": [entry for entry in variables if entry not in noted] + ([{ABSENT: absent}] if absent else []),
        "stages": own | stages,
        "metrics": document.get("metrics", []) + metrics,
        "plots": document.get("plots", []) + plots,
    }
    return {key: value for key, value in (merged | present).items() if value}


def options_of(stages: Iterable[dict]) -> dict[str, dict]:
    """What stands in dvc.yaml with the outputs of some stages, by path: `push`, `remote`, `desc`, but not `cache`: DVC must keep them."""
    entries = [out for stage in stages for out in stage.get("outs", []) if isinstance(out, dict)]
    given = [item for out in entries for item in out.items()]
    return {
        os.path.normpath(path): {name: value for name, value in (options or {}).items() if name != "cache"}
        for path, options in given
    }


def with_options(outs: list[str | dict], options: dict[str, dict]) -> list[str | dict]:
    """Outputs of a stage as in dvc.yaml, with options; those that slmake gives them itself stay."""
    given = [next(iter(out.items())) if isinstance(out, dict) else (out, {}) for out in outs]
    merged = [(path, options.get(path, {}) | own) for path, own in given]
    return [{path: kept} if kept else path for path, kept in merged]


def is_ours(name: str, stage: dict) -> bool:
    """Whether slmake writes this stage, given with its `cmd`; users may add stages of their own."""
    return name == CODE or "--allowed-rules" in str(stage.get("cmd"))


def text() -> str:
    """dvc.yaml as it should be now, with what users have added.

    Raises:
        UserError: Snakemake refuses params.yaml or the Snakefile, or a user's stage has the name of one of the rules'.
    """
    document = with_added(dvc_yaml(rules(), scored_models(), given(load("params.yaml"))), Path("dvc.yaml"))
    body = yaml.safe_dump(document, sort_keys=False, width=1000, allow_unicode=True)
    return HEADER + body


def given(checked: Params) -> set[str]:
    """Sections and parameters (`section.name`) that params.yaml has."""
    parameters = {f"{name}.{field}" for name, section in checked if section for field in section.model_fields_set}
    return checked.model_fields_set | parameters


def origin() -> str:
    """Digest of all that dvc.yaml depends on, and of itself."""
    files = [
        "dvc.yaml",
        *snakefiles(),
        *modules("slmake.plan"),
        *modules("slmake.platforms.dvc_yaml"),
    ]
    plan = Plan(load("params.yaml"))
    names = [*(name for rule in scripts() for name in code(rule)), *plan.files, *plan.materials()]
    parts = [digest(files, exact=True), *names, json.dumps(sums(plan.params)), *sorted(given(plan.params))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def update() -> None:
    """Bring dvc.yaml up to date with params.yaml, the Snakefile and the imports of scripts; quick where none of them changed.

    Raises:
        UserError: params.yaml or the Snakefile is refused.
    """
    if NOTE.is_file() and NOTE.read_text() == origin():
        return
    outputs.replace(Path("dvc.yaml"), text().encode())
    if Path(DIGESTS).is_dir():  # other inputs of a stage are another digest, so that DVC runs it again
        write_digests()
    if Path(".dvc").is_dir():
        _note_origin()
    remember()


def _note_origin() -> None:
    """Note that dvc.yaml is what parameters, Snakefile and code of now ask for."""
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    outputs.replace(NOTE, origin().encode())


def refuse_stale() -> None:
    """Raise UserError if DVC runs a rule by a dvc.yaml, or digests, of other parameters or code: its receipts would name others."""
    if "DVC_STAGE" not in os.environ:
        return
    if not (NOTE.is_file() and NOTE.read_text() == origin()):
        _refuse_other_entries()
        _note_origin()
    plan, named = Plan(load("params.yaml")), entries()
    for path in map(Path, named.get(os.environ["DVC_STAGE"], {}).get("deps", [])):
        if (
            path.parent == Path(DIGESTS)
            and path.is_file()
            and path.read_text(encoding="ascii") != digests(plan, path.name, named)
        ):
            raise UserError(
                f"{path} is of other code or parameters than those that are here now. `dvc repro {CODE}` writes it anew, and so does "
                "`dvc repro` without --single-item and --downstream."
            )


def _refuse_other_entries() -> None:
    """Raise UserError if a stage of dvc.yaml is not what parameters and Snakefile ask for."""
    present, right = entries(), yaml.safe_load(text())["stages"]
    ours = {name for name, stage in present.items() if is_ours(name, stage)}  # users may add stages of their own
    if differ := [name for name in right | dict.fromkeys(ours) if present.get(name) != right.get(name)]:
        raise UserError(
            f"dvc.yaml is of other parameters than params.yaml (stage {differ[0]}). `make docs` writes it anew (`make` does it by itself); "
            "for `dvc exp run`, change params.yaml and write dvc.yaml first."
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digests", action="store_true", help=f"write {DIGESTS}, the rules' digests, instead")
    args = parser.parse_args(argv)
    try:
        if args.digests:
            write_digests()
        else:
            update()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
