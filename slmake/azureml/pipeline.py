"""The Snakefile's graph as an Azure ML pipeline job: one command step per rule, and the code that each step is sent.

Rules, inputs and outputs are read from Snakemake, as for dvc.yaml, so that nothing is written twice. A step's command places
what is mounted where the rule looks for it and calls Snakemake for this rule alone (slmake/azureml/step.py).
"""

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import yaml

from slmake import outputs, params
from slmake.azureml.settings import LEFT_HERE, REGISTRY, Cluster, Environment, Settings
from slmake.azureml.step import ORIGINS_FILE
from slmake.errors import UserError
from slmake.params.dataset_files import source_files
from slmake.params.errors import Loader
from slmake.plan import SECTIONS
from slmake.platforms import dvc_yaml
from slmake.sources.base import Source
from slmake.sources.local import row_files
from slmake.sources.mounted import Origin
from slmake.sources.schemes import parse

HEADER = """\
# Generated from the Snakefile, params.yaml and azureml/settings.yaml by `python -m tools.azureml compile`; a test compares.
# One command step per rule; what a step runs stands in the Snakefile.
"""
SCHEMA = "https://azuremlschemas.azureedge.net/latest/pipelineJob.schema.json"
CODE = Path("build/azureml/code")  # what the steps are sent, one folder per rule
# What Snakemake and the step's check of its image read, whatever the rule.
ALWAYS = (
    "Snakefile",
    "rules",
    "scripts",
    "slmake",
    "tools",
    "profiles/default",
    "report",
    "envs/cpu.in",
    "envs/cuda.in",
)
RESUMES = "finetune"  # its checkpoints outlive a machine that is taken away


class Mount(NamedTuple):
    """Something outside the pipeline that a step reads: where the rule looks for it, and where it lies."""

    local: str  # path in the project's folder
    uri: str  # azureml:…, azureml://…, or a local path that the SDK uploads
    kind: str  # Azure ML's type of the input


class Plan(NamedTuple):
    """What `compile` works out before it writes anything."""

    rules: dict[str, dict[str, list[str]]]  # in order of execution, as dvc_yaml.rules returns them
    makers: dict[str, str]  # output path to the rule that makes it
    data: dict[str, Mount]  # pipeline input to the data file
    model: Mount | None  # the base model, where it is mounted
    sections: dict  # params.yaml
    origins: dict[str, Origin]  # what the steps read in place of sources of params.yaml

    @property
    def mounts(self) -> dict[str, Mount]:
        """What is mounted, by pipeline input."""
        return self.data | ({"model": self.model} if self.model else {})


def port(path: str) -> str:
    """The name of an input or output: `build/onnx-int4` is onnx_int4, `results/base.json` is results_base_json.

    None begins with another's whole name (base, base_json): the SDK downloads what begins with an output's path.
    """
    return re.sub(r"\W+", "_", path.removeprefix("build/")).lower()


def plan(settings: Settings) -> Plan:
    """Read the Snakefile's graph and decide what is mounted.

    Raises:
        UserError: params.yaml is not valid, or asks for what cannot be done on Azure ML.
    """
    everything = params.load("params.yaml")
    if everything.package.signing_key:
        raise UserError(
            "params.yaml: package.signing_key: a private key is not sent to Azure ML. Set it to null here, and sign after `download`."
        )
    graph = dvc_yaml.rules()
    rules = {name: graph[name] for name in dvc_yaml.in_order(graph) if name not in LEFT_HERE}
    for stage in rules.keys() & set(dvc_yaml.MEMBERS.values()):
        rules[stage]["output"].sort()  # its members' jobs are printed in any order
    sections = yaml.load(Path("params.yaml").read_text(encoding="utf-8"), Loader)
    data, origins = _data(everything, settings)
    model, origin = _model(everything, settings)
    makers = {path: name for name, rule in rules.items() for path in rule["output"]}
    return Plan(rules, makers, data, model, sections, origins | origin)


def _data(everything: params.Params, settings: Settings) -> tuple[dict[str, Mount], dict[str, Origin]]:
    """Data files by input name; and of those that lie on Azure, what takes their sources' place."""
    files = source_files(everything.prepare) if everything.prepare else {}
    named = settings.data if isinstance(settings.data, dict) else {"train": settings.data} if settings.data else {}
    if named and set(named) != set(files):
        raise UserError(
            f"azureml/settings.yaml: data names {', '.join(named)}, prepare.source in params.yaml names {', '.join(files) or 'nothing'}: name "
            "the same."
        )
    mounts, origins = {}, {}
    for split, text in files.items():
        source = parse(text)
        uri = named.get(split) or (source.text if source.kind == "datastore" else None)
        name = "data" if len(files) == 1 else f"data_{split}"
        if uri:
            _refuse_several(everything.prepare, source, uri, origins)
            # Files of several splits may have one name.
            folder = "data" if len(files) == 1 else f"data/mounted/{split}"
            local = f"{folder}/{(uri if '/paths/' in uri else source.path).rpartition('/')[2]}"
            mounts[name] = Mount(local, uri, "uri_file")
            origins[source.full] = Origin(text=uri, path=local, sha256=source.sha256)
        elif not source.remote:  # else the step reads it from where it is
            paths = row_files(_inside(source.path, "prepare.source"))
            names = [name] if paths == [source.path] else [f"{name}_{number}" for number in range(len(paths))]
            mounts |= {name: Mount(path, path, "uri_file") for name, path in zip(names, paths, strict=True)}
    return mounts, origins


def _refuse_several(section: params.Prepare, source: Source, uri: str, origins: dict[str, Origin]) -> None:
    """Raise UserError where one file of Azure cannot take a source's place: it names several files, or is that of several splits."""
    whole = source.kind == "hf" and not source.path
    chosen = section.config or section.split or section.where or "/paths/" not in uri  # an asset's name has no ending
    if (whole and chosen) or (not source.remote and row_files(source.path) != [source.path]):
        raise UserError(
            f"prepare.source: {source.full} names several files, and data in azureml/settings.yaml one. Name one file, or take it out there."
        )
    if source.full in origins and origins[source.full]["text"] != uri:
        raise UserError(
            f"prepare.source: {source.full} stands for several splits, and data in azureml/settings.yaml names a file for each. Name "
            "different files in prepare.source, too."
        )


def _model(everything: params.Params, settings: Settings) -> tuple[Mount | None, dict[str, Origin]]:
    """The base model's mount, if it is mounted; and what takes its source's place, if it lies on Azure or the settings name another."""
    source = parse(everything.fetch_model.source)
    other = settings.model if settings.model != source.text else None
    pin = None if other else source.sha256
    if other and other.startswith("hf:"):
        return None, {source.full: Origin(text=other, path=None, sha256=None)}
    uri = other or (source.text if source.kind in ("datastore", "registry") else None)
    if uri:
        registered = re.fullmatch(REGISTRY, uri) or not uri.startswith("azureml://")
        file = uri.endswith((".gguf", ".whl"))
        kind = settings.model_type if registered else "uri_file" if file else "uri_folder"
        local = f"data/{Path(uri).name if file else 'model'}"
        return Mount(local, uri, kind), {source.full: Origin(text=uri, path=local, sha256=pin)}
    if source.remote:
        return None, {}
    path = _inside(source.path, "fetch_model.source")
    if not Path(path).exists():
        raise UserError(f"params.yaml: fetch_model.source: {path}: no such file or folder.")
    return Mount(path, path, "uri_folder" if Path(path).is_dir() else "uri_file"), {}


def _inside(path: str, field: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise UserError(
            f"params.yaml: {field}: {path} lies outside the project's folder, which steps do not have. Copy it into data/, or name it "
            "in azureml/settings.yaml as it lies on Azure."
        )
    return path


def before(planned: Plan, rule: str) -> set[str]:
    """A rule and all rules whose outputs it needs."""
    needed = {planned.makers[path] for path in planned.rules[rule]["input"] if path in planned.makers}
    return {rule}.union(*(before(planned, name) for name in needed))


def step_params(planned: Plan, rule: str) -> dict:
    """What a step gets of params.yaml: the sections that can change its result, and no other.

    Azure ML takes a step's earlier result when its code and inputs are the same; so a changed gate must not change the code that
    trains. Left-out sections have their defaults, which nothing in this step reads.
    """
    upstream = before(planned, rule)
    kept = {name for stage in upstream for name in SECTIONS.get(stage, [stage])}
    stages = upstream | ({"quantize"} & kept)  # `search` belongs to quantize
    sections = {name: value for name, value in planned.sections.items() if name in kept | {"fetch_model", "prepare"}}
    chosen = planned.sections.get("all", {}).get("stages", params.All().stages)
    return {"all": {"stages": [name for name in chosen if name in stages], "container": None}, **sections}


def code_files(planned: Plan, rule: str) -> list[Path]:
    """Every file of the project that a step is sent, but params.yaml and what takes its sources' place."""
    elsewhere = {mount.local for mount in planned.mounts.values()} | {*planned.origins}
    needed = [path for path in planned.rules[rule]["input"] if path not in planned.makers and path not in elsewhere]
    files = []
    for path in map(Path, [*ALWAYS, *needed]):
        files += [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sorted({file for file in files if "__pycache__" not in file.parts and file.suffix != ".sif"})


def write_code(planned: Plan, folder: Path = CODE) -> None:
    """Write each step's code folder anew."""
    outputs.remove(folder)
    for rule in planned.rules:
        target = folder / rule
        for file in code_files(planned, rule):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file)
        (target / "params.yaml").write_text(params.dumped(step_params(planned, rule)), encoding="utf-8")
        if planned.origins:
            (target / ORIGINS_FILE).parent.mkdir(exist_ok=True)
            outputs.write_json(target / ORIGINS_FILE, planned.origins)


def job(planned: Plan, settings: Settings, folder: Path) -> dict:
    """The pipeline job.

    Args:
        folder: where the file will lie: Azure ML's paths are relative to it.
    """
    paths = {port(path): path for path in planned.makers}
    return {
        "$schema": SCHEMA,
        "type": "pipeline",
        "display_name": "slmake",
        "experiment_name": settings.experiment_name,
        "settings": {"default_compute": f"azureml:{settings.cluster('default').name}", "force_rerun": False},
        "inputs": {
            name: {"type": mount.kind, "path": _relative(mount.uri, folder), "mode": "ro_mount"}
            for name, mount in planned.mounts.items()
        },
        "outputs": {
            **{name: _output(path) for name, path in paths.items()},
            **{f"receipt_{rule}": {"type": "uri_file", "mode": "upload"} for rule in planned.rules},
        },
        "jobs": {rule: step(planned, settings, rule, folder) for rule in planned.rules},
    }


def _output(path: str) -> dict:
    return {"type": "uri_file" if Path(path).suffix else "uri_folder", "mode": "upload"}


def step(planned: Plan, settings: Settings, rule: str, folder: Path) -> dict:
    """One rule's command step."""
    cluster, parts = settings.cluster(rule), planned.rules[rule]
    # The Snakefile wants to see every data file that params.yaml names, whatever the rule.
    inputs = {name: (mount.local, f"${{{{parent.inputs.{name}}}}}") for name, mount in planned.data.items()}
    if rule == "fetch_model" and planned.model:
        inputs["model"] = (planned.model.local, "${{parent.inputs.model}}")
    for path in parts["input"]:
        if path in planned.makers:
            inputs[port(path)] = (path, f"${{{{parent.jobs.{planned.makers[path]}.outputs.{port(path)}}}}}")
    results = {port(path): path for path in parts["output"]}
    command = [f"python -m tools.azureml step {rule}"]
    for name, (path, _) in inputs.items():
        if bad := re.search(r"[$`\"'\\=]", path):
            raise UserError(
                f"{path}: a step's command cannot name a file with {bad[0]} in its name, which a shell reads otherwise. Rename it."
            )
        # Where it is mounted, the file has its name, too; Azure ML's own word stands where no quotes are needed.
        mounted = f"${{{{inputs.{name}}}}}"
        command.append(f'--input "{path}={mounted}"' if shlex.quote(path) != path else f"--input {path}={mounted}")
    command += [f"--output {path}=${{{{outputs.{name}}}}}" for name, path in results.items()]
    command += [f"--receipt ${{{{outputs.receipt_{rule}}}}}"]
    bound = {name: f"${{{{parent.outputs.{name}}}}}" for name in [*results, f"receipt_{rule}"]}
    content: dict = {
        "type": "command",
        "display_name": rule,
        "code": _relative(str(CODE / rule), folder),
        "environment": _environment(cluster.environment or settings.environment, folder),
        "compute": f"azureml:{cluster.name}",
        "inputs": {name: binding for name, (_, binding) in inputs.items()},
        "outputs": bound,
    }
    if rule == RESUMES:
        command += ["--checkpoints ${{outputs.checkpoints}}"]
        bound["checkpoints"] = {"type": "uri_folder", "mode": "rw_mount"}
    if cluster.instance_type:
        content["resources"] = {"instance_type": cluster.instance_type, "instance_count": 1}
    return {"type": "command", "display_name": rule, "command": Folded(" ".join(command)), **content}


def _environment(environment: Environment, folder: Path) -> dict:
    if environment.build:
        return {
            "build": {
                "path": _relative(environment.build.context, folder),
                "dockerfile_path": environment.build.dockerfile,
            }
        }
    conda = {"conda_file": _relative(environment.conda_file, folder)} if environment.conda_file else {}
    return {"image": environment.image, **conda}


def _relative(path: str, folder: Path) -> str:
    return path if path.startswith("azureml:") else Path(os.path.relpath(path, folder)).as_posix()


class Folded(str):
    """Text that is written over several lines."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    Folded, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style=">")
)


def text(planned: Plan, settings: Settings, folder: Path) -> str:
    """pipeline.yml as it should be now."""
    return HEADER + yaml.dump(
        job(planned, settings, folder), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True
    )


def clusters(settings: Settings, planned: Plan) -> dict[str, Cluster]:
    """The clusters that this pipeline uses, by their names in the settings file."""
    used = {settings.compute.get(rule, settings.compute["default"]) for rule in planned.rules}
    return {name: cluster for name, cluster in settings.clusters.items() if name in used}
