"""What `submit`, `status`, `download`, `register` and `cancel` do, through the Azure ML SDK."""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from slmake import cli, outputs, params
from slmake.azureml import errors, pipeline
from slmake.azureml.errors import translate_errors
from slmake.azureml.settings import REGISTRY, Cluster, Settings
from slmake.azureml.step import sums
from slmake.errors import UserError
from slmake.params.dataset_files import source_files
from slmake.platforms import dvc
from slmake.sources.schemes import parse

LAST = Path("build/azureml/job.json")  # the run that `submit` made last
ENDED = ("Completed", "Failed", "Canceled", "NotResponding")
POLL = (2, 30)  # seconds between two status requests, at first and at most
RETRIES = 20  # status requests in a row that may fail before --wait gives up; the run continues


def client(settings: Settings, registry: str | None = None):
    """An MLClient for the workspace, or for a registry; its telemetry is off.

    Raises:
        UserError: azure-ai-ml is not installed.
    """
    errors.quieten()
    try:
        from azure.ai.ml import MLClient
    except ModuleNotFoundError:
        raise UserError("the package azure-ai-ml is not installed: `make azureml`.") from None
    from azure.identity import DefaultAzureCredential

    credential = DefaultAzureCredential()
    if registry:
        return MLClient(credential, registry_name=registry, enable_telemetry=False)
    workspace = (settings.subscription_id, settings.resource_group, settings.workspace_name)
    ml = MLClient(credential, *workspace, enable_telemetry=False, show_progress=False)
    errors.quieten()  # the client makes its loggers talk
    return ml


def run(args, job: cli.Job) -> None:
    """One of the commands, with the arguments that tools/azureml.py read."""
    from slmake.azureml import settings

    if args.command == "submit":
        name = submit(args, job)
        loaded = settings.load(args.settings)
    else:
        loaded = settings.load(args.settings)
        loaded.refuse_blanks(args.settings)
        name = args.job or last_job()
    ml = client(loaded)
    if args.command in ("submit", "status"):
        if args.command == "status" or args.wait:
            follow(ml, name, job, args.wait)
    elif args.command == "download":
        download(ml, name, args.paths, job)
    elif args.command == "register":
        register(ml, loaded, name, job)
    else:
        with translate_errors(f"the run {name}"):
            ml.jobs.begin_cancel(name).result()
        job.say(f"{name}: to be stopped; `status` shows when it is.")


def last_job() -> str:
    """The run that `submit` made last in this folder."""
    try:
        return json.loads(LAST.read_text(encoding="utf-8"))["name"]
    except FileNotFoundError:
        raise UserError("nothing was submitted from this folder yet: `submit`, or name a run: --job NAME.") from None


def submit(args, job: cli.Job) -> str:
    """Compile, check and create what the run needs, start it; its name."""
    from slmake.azureml import settings

    loaded = settings.load(args.settings)
    loaded.refuse_blanks(args.settings)
    planned = pipeline.plan(loaded)
    pipeline.write_code(planned)
    args.output.write_text(pipeline.text(planned, loaded, args.output.parent), encoding="utf-8")
    ml = client(loaded)
    with translate_errors("workspace_name, resource_group, subscription_id", args.settings):
        ml.workspaces.get(loaded.workspace_name)
    for name, cluster in pipeline.clusters(loaded, planned).items():
        prepare_cluster(ml, name, cluster, args.settings, job)
    check_sources(ml, loaded, args.settings)
    from azure.ai.ml import load_job

    with errors.silent():
        described = load_job(str(args.output))
    described.tags = tags(params.load("params.yaml"), planned)
    with translate_errors("the pipeline", args.settings), errors.silent():
        created = ml.jobs.create_or_update(described)
    LAST.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_json(LAST, {"name": created.name, "studio": created.studio_url})
    job.say(f"{created.name}: {len(planned.rules)} steps. In the studio: {created.studio_url}")
    return created.name


def prepare_cluster(ml, name: str, cluster: Cluster, file: Path, job: cli.Job) -> None:
    """Check that a cluster is what the settings say; create it if it is missing and its size is given.

    Raises:
        UserError: it does not exist and cannot be created, or is of another kind.
    """
    from azure.core.exceptions import ResourceNotFoundError

    field = f"clusters.{name}"
    try:
        with translate_errors(f"{field}.name", file, but=ResourceNotFoundError):
            there = ml.compute.get(cluster.name)
    except ResourceNotFoundError:
        if not cluster.size:
            with translate_errors(f"{field}.name", file):
                known = ", ".join(sorted(compute.name for compute in ml.compute.list())) or "none"
            raise UserError(
                f"{file}: {field}.name: the workspace has no compute `{cluster.name}`; it has: {known}. Correct the name, or give "
                f"{field}.size to have it created."
            ) from None
        from azure.ai.ml.entities import AmlCompute

        wanted = AmlCompute(
            name=cluster.name,
            size=cluster.size,
            min_instances=0,
            max_instances=cluster.max_nodes,
            tier=cluster.tier,
            idle_time_before_scale_down=600,
        )
        job.say(f"creating the cluster {cluster.name} ({cluster.size}, {cluster.tier}, at most {cluster.max_nodes})")
        with translate_errors(f"{field}.size", file):
            there = ml.compute.begin_create_or_update(wanted).result()
    if cluster.instance_type and there.type.lower() != "kubernetes":
        raise UserError(
            f"{file}: {field}.instance_type: {cluster.name} is no Kubernetes but {there.type}. Remove instance_type, or name attached Kubernetes."
        )
    if getattr(there, "provisioning_state", "Succeeded") not in ("Succeeded", "Updating", "Creating"):
        raise UserError(
            f"{file}: {field}.name: {cluster.name} is not usable: {there.provisioning_state}. See it in the studio."
        )


def check_sources(ml, settings: Settings, file: Path) -> None:
    """Raise UserError if an asset or a registry's model that the settings name is not there, or of another type."""
    import re

    data = settings.data if isinstance(settings.data, dict) else {"": settings.data} if settings.data else {}
    for split, uri in data.items():
        field = f"data.{split}".rstrip(".")
        if uri.startswith("azureml://"):
            store = re.search(r"datastores/([\w-]+)/", uri)[1]
            with translate_errors(field, file):
                ml.datastores.get(store)
        else:
            name, version, label = errors.asset(uri)
            with translate_errors(field, file):
                ml.data.get(name, version=version, label=label)
    uri = settings.model or ""
    in_registry = re.fullmatch(REGISTRY, uri)
    if in_registry:
        _, _, _, registry, _, name, _, version = uri.split("/")
        with translate_errors("model", file):
            model = client(settings, registry).models.get(name, version=version)
    elif uri.startswith("azureml:") and not uri.startswith("azureml://"):
        name, version, label = errors.asset(uri)
        with translate_errors("model", file):
            model = ml.models.get(name, version=version, label=label)
    else:
        return
    if model.type != settings.model_type:
        readable = model.type in ("custom_model", "mlflow_model")
        raise UserError(
            f"{file}: model: {uri} is registered as {model.type}, model_type says {settings.model_type}. "
            + (
                f"Set model_type to {model.type}."
                if readable
                else "Read are custom_model and mlflow_model with safetensors."
            )
        )


def tags(everything: params.Params, planned: pipeline.Plan) -> dict[str, str]:
    """What a run can be found by later: base model, data and commit; `-changed` behind it says that what is sent is not as it has it."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    sent = {str(file) for rule in planned.rules for file in pipeline.code_files(planned, rule)}
    sent |= {"params.yaml", *pipeline.ALWAYS}
    read = {mount.local for mount in planned.mounts.values()}  # here, or what Azure reads in its place
    uploaded = {mount.local for mount in planned.mounts.values() if mount.uri == mount.local}
    changed = _in_git("status", "-z", "--porcelain", names=sent | read) or _changed(uploaded)
    commit = {"git_commit": done.stdout.strip() + "-changed" * bool(changed)} if done.returncode == 0 else {}
    fetched = planned.sections["fetch_model"]["source"]
    other = planned.origins.get(parse(fetched).full)  # a model of the hub
    source = planned.model.uri if planned.model else other["text"] if other else fetched
    data = ", ".join(mount.uri for mount in planned.data.values()) or ", ".join(
        source_files(everything.prepare).values() if everything.prepare else ["no dataset"]
    )
    return {"base_model": source, "data": data, **commit}


def _in_git(*command: str, names: set[str]) -> list[str]:
    """What a command of Git lists of some files."""
    done = subprocess.run(["git", *command, "--", *sorted(names)], capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name]


def _changed(data: set[str]) -> bool:
    """Whether data that Git ignores, or has as a link, is not known to be as the last commit has it: as the receipt of DVC there says."""
    places = {place for name in data for place in (Path(name), *Path(name).parents) if place.name}
    kept = {f"{place}.dvc" for place in places if Path(f"{place}.dvc").is_file()}
    linked = {name for name in data if Path(name).resolve() != Path.cwd().resolve() / name}
    ignored = _in_git("ls-files", "-z", "--others", "--ignored", "--exclude-standard", names=data) if data else []
    unkept = [name for name in (*ignored, *linked) if not any(Path(name).is_relative_to(file[:-4]) for file in kept)]
    return bool(unkept or (kept and (_in_git("status", "-z", "--porcelain", names=kept) or dvc.status(*sorted(kept)))))


def steps(ml, name: str) -> tuple[object, dict]:
    """A run and its steps by rule."""
    parent = ml.jobs.get(name)
    return parent, {child.display_name: child for child in ml.jobs.list(parent_job_name=name)}


def state(run) -> str:
    """A run's status as text (the SDK has it as text or as an enumeration)."""
    return str(getattr(run.status, "value", run.status))


def follow(ml, name: str, job: cli.Job, wait: bool) -> None:
    """Say how a run stands; with `wait`, every change until it ends.

    Raises:
        UserError: no such run; it failed or was stopped (with the end of the failed step's log); or the service stays out of reach.
    """
    from azure.core.exceptions import AzureError

    reported: dict[str, str] = {}
    pause, lost, started = POLL[0], 0, time.monotonic()
    while True:
        try:
            with translate_errors(f"the run {name}", but=AzureError if wait or reported else ()):
                parent, children = steps(ml, name)
            lost = 0
        except AzureError as error:
            lost += 1
            if not errors.passes(error) or lost > RETRIES:
                raise errors.explain(error, f"the run {name}") from None
            if lost == 1:
                job.say("no answer from Azure ML; the run continues there. Retrying …")
            time.sleep(pause)
            continue
        for rule, child in children.items():
            now = state(child) + (" (taken from an earlier run)" if reused(child) else "")
            if reported.get(rule) != now:
                job.say(f"{rule:12} {now}")
                reported[rule] = now
                pause = POLL[0]
        if state(parent) in ENDED or not wait:
            break
        time.sleep(pause)
        pause = min(pause * 1.5, POLL[1])
    took = f", {time.monotonic() - started:.0f} s" if wait else ""
    job.say(f"{name}: {state(parent)}{took}. {parent.studio_url or ''}")
    if state(parent) in ENDED[1:] and wait:
        failed = [child for child in children.values() if state(child) in ("Failed", "NotResponding")]
        raise UserError("\n".join([f"the run ended as {state(parent)}.", *(end_of_log(ml, child) for child in failed)]))


def reused(child) -> bool:
    """Whether a step's result is that of an earlier run."""
    return str((child.properties or {}).get("azureml.isreused", "")).lower() == "true"


def end_of_log(ml, child, count: int = 40) -> str:
    """The last lines that a step wrote."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with errors.silent():
                ml.jobs.download(child.name, download_path=folder)
        except Exception as error:
            return f"{child.display_name}: its log cannot be read ({type(error).__name__}); see it in the studio."
        logs = sorted(Path(folder).rglob("std_log*.txt"))
        lines = logs[0].read_text(encoding="utf-8", errors="replace").rstrip().splitlines() if logs else []
    return "\n".join([f"{child.display_name}, the end of its log:", *(f"  {line}" for line in lines[-count:])])


def fetch(ml, name: str, output: str, folder: Path) -> Path:
    """Download one output of a run below `folder`; the file or folder itself.

    Raises:
        UserError: the run has no such output.
    """
    with translate_errors(f"the run {name}"), errors.silent():
        ml.jobs.download(name, download_path=folder, output_name=output)
    path = folder / "named-outputs" / output
    if not path.exists():
        raise UserError(f"the run {name} has no output `{output}`. `status` shows how its steps stand.")
    return path


def receipts(ml, name: str, rules: list[str], folder: Path) -> dict[str, dict[str, str]]:
    """What the steps wrote down: output path to the SHA-256 of its files."""
    digests = {}
    for rule in rules:
        path = fetch(ml, name, f"receipt_{rule}", folder)
        file = path if path.is_file() else next(inner for inner in path.rglob("*") if inner.is_file())
        digests |= json.loads(file.read_text(encoding="utf-8"))["outputs"]
    return digests


def bring(ml, name: str, path: str, wanted: dict[str, str], folder: Path) -> Path:
    """Download what became of `path`, and check every byte.

    Raises:
        UserError: a file is missing, is too many, or is not what the step wrote.
    """
    fetched = fetch(ml, name, pipeline.port(path), folder)
    if "." in wanted and fetched.is_dir():
        files = [file for file in fetched.rglob("*") if file.is_file()]
        if len(files) != 1:
            raise UserError(f"{path}: {len(files)} files came instead of one. Nothing was changed here; try again.")
        fetched = files[0]
    actual = sums(fetched)
    if actual != wanted:
        wrong = sorted({file for file in actual.keys() | wanted.keys() if actual.get(file) != wanted.get(file)})
        raise UserError(
            f"{path}: not what the step wrote: {', '.join(wrong[:5])} differ{'s' * (len(wrong) == 1)}. Nothing was changed here. Download again; if it "
            "stays so, the storage was changed after the run."
        )
    return fetched


def download(ml, name: str, paths: list[str], job: cli.Job) -> None:
    """Bring outputs of a run here; each appears whole and checked, or not at all."""
    with translate_errors(f"the run {name}"):
        status, children = steps(ml, name)
    done = [rule for rule, child in children.items() if state(child) == "Completed"]
    if not done:
        raise UserError(f"the run {name} has no finished step yet: it is {state(status)}.")
    build = Path("build")
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build, prefix=".azureml-") as scratch:
        known = receipts(ml, name, done, Path(scratch))
        unknown = [path for path in paths if path.rstrip("/") not in known]
        if unknown:
            raise UserError(f"the run {name} made no {unknown[0]}. It made: {', '.join(known)}.")
        for path in [path.rstrip("/") for path in paths] or list(known):
            target = Path(path)
            if target.exists() and sums(target) == known[path]:
                job.say(f"{path}: is here already")
                continue
            fetched = bring(ml, name, path, known[path], Path(scratch))
            is_folder = fetched.is_dir()
            with outputs.written(target if is_folder else None, [] if is_folder else [target]) as (partial,):
                outputs.remove(partial)
                fetched.rename(partial)
            job.say(f"{path}: every byte is right")


def register(ml, settings: Settings, name: str, job: cli.Job) -> None:
    """Register the package of a finished run as a model, from where it lies on Azure; the same package only once."""
    from azure.ai.ml.entities import Model
    from azure.core.exceptions import ResourceNotFoundError

    everything = params.load("params.yaml")
    with translate_errors(f"the run {name}"):
        parent, children = steps(ml, name)
    if "package" not in children or state(children["package"]) != "Completed":
        raise UserError(
            f"the run {name} has no package (it is {state(parent)}): only what passed its gates is registered."
        )
    with tempfile.TemporaryDirectory() as scratch:
        known = receipts(ml, name, ["package", "evaluate", "fetch_model", "prepare"], Path(scratch))
        file = bring(ml, name, "results/metrics.json", known["results/metrics.json"], Path(scratch))
        metrics = json.loads(file.read_text(encoding="utf-8"))
        about = {
            report: json.loads(
                bring(ml, name, f"results/{report}.json", known[f"results/{report}.json"], Path(scratch)).read_text()
            )
            for report in ("base", "dataset")
        }
    digest = errors.digest(known["build/package"])
    with translate_errors("package.name", Path("params.yaml"), but=ResourceNotFoundError):
        try:
            for model in ml.models.list(name=everything.package.name):
                if (model.tags or {}).get("package_sha256") == digest:
                    job.say(f"{model.name}:{model.version} is this package already")
                    return
        except ResourceNotFoundError:
            pass  # the first of its name
    lineage = {**(parent.tags or {}), "job": name, "package_sha256": digest, **sources(about)}
    model = Model(
        name=everything.package.name,
        path=f"azureml://jobs/{name}/outputs/package",
        type="custom_model",
        description=everything.package.intended_use,
        tags=lineage | figures(metrics),
    )
    with translate_errors("package.name", Path("params.yaml")), errors.silent():
        registered = ml.models.create_or_update(model)
    job.say(f"registered as {registered.name}:{registered.version}")


def figures(metrics: dict) -> dict[str, str]:
    """The scores worth a tag: accuracy, macro-F1 and size of every model that was scored."""
    return {
        f"{model}.{figure}": f"{values[figure]:.6g}"
        for model, values in metrics.items()
        if isinstance(values, dict)
        for figure in ("accuracy", "macro_f1", "size_bytes")
        if isinstance(values.get(figure), int | float)
    }


def sources(about: dict) -> dict[str, str]:
    """SHA-256 of base model and data, where the reports have one."""
    digests = {"base_sha256": about["base"].get("sha256")}
    return {key: str(value) for key, value in digests.items() if value}
