"""tools/azureml.py through the unmodified SDK, over real HTTPS, against the stand-in (aml_service.py) with a real blob server and jobs
that really run: a run from `submit --wait` to `register`, reuse, cancellation, and everything that can go wrong on the way."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pytest
import yaml
from aml_runner import THREADS
from aml_server import Fault, clean_environment, error
from aml_service import CONTAINERS, GROUP, STORE, SUBSCRIPTION, WORKSPACE, AzureML
from azurite import ACCOUNT, Azurite, program
from project import RULES, change, digests, new_project
from test_azure_doc import equip
from tiny import ROOT

from slmake import cli
from slmake.azureml import service, settings
from slmake.errors import UserError

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]
STEPS = tuple(rule for rule in RULES if rule != "rehearse")


@pytest.fixture(scope="module")
def aml(tmp_path_factory):
    """The stand-in, with Azurite behind its datastore."""
    if program() is None:
        pytest.skip("Azurite is not installed: `make azurite` (needs npm)")
    folder = tmp_path_factory.mktemp("aml")
    azurite = Azurite(folder / "azurite").start()
    made = AzureML(folder, azurite, ACCOUNT)
    yield made
    made.close()
    azurite.kill()


def fill_in(project: Path, **changes: object) -> Path:
    """The shipped settings, filled in."""
    content = yaml.safe_load((ROOT / "azureml" / "settings.yaml").read_text(encoding="utf-8"))
    content |= {"subscription_id": SUBSCRIPTION, "resource_group": GROUP, "workspace_name": WORKSPACE, **changes}
    file = project / "azureml" / "settings.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


STREAMS = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def environment(aml) -> dict[str, str]:
    """What leads to the stand-in, and to nothing else of Azure."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return clean_environment() | {"PATH": path, **THREADS, "HOME": str(aml.folder)} | aml.environment()


def azureml(aml, project: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run tools/azureml.py as a user does; both streams in stdout."""
    variables = environment(aml)
    command = [preloaded.program("python", variables), "-m", "tools.azureml", *arguments]
    return subprocess.run(command, cwd=project, env=variables, **STREAMS, **options)


@pytest.fixture(scope="module")
def ran(aml, tmp_path_factory, base):
    """A tiny project after `submit --wait`, and what was printed. Copy it to change it."""
    project = new_project(tmp_path_factory.mktemp("azureml") / "project", base)
    fill_in(project)
    done = azureml(aml, project, "submit", "--wait")
    assert done.returncode == 0, done.stdout
    return project, done.stdout


@pytest.fixture
def project(ran, tmp_path) -> Path:
    """A private copy of the project that ran."""
    return Path(shutil.copytree(ran[0], tmp_path / "project"))


def last(project: Path) -> str:
    return json.loads((project / "build" / "azureml" / "job.json").read_text())["name"]


def test_submit_creates_what_is_missing_and_says_how_it_goes(aml, ran):
    project, printed = ran
    assert "creating the cluster cpu-cluster (Standard_D8s_v5, dedicated, at most 2)" in printed
    assert "creating the cluster gpu-cluster (Standard_NC4as_T4_v3, low_priority, at most 1)" in printed
    assert f"In the studio: https://ml.azure.slmake.test/runs/{last(project)}" in printed
    for rule in STEPS:
        assert re.search(rf"{rule} +Completed$", printed, re.M)
    assert f"{last(project)}: Completed" in printed
    created = aml.resources["/computes/gpu-cluster"]["properties"]["properties"]
    assert created["vmSize"] == "Standard_NC4as_T4_v3"
    assert created["vmPriority"] == "LowPriority"
    assert created["scaleSettings"]["minNodeCount"] == 0


def test_status(aml, project):
    done = azureml(aml, project, "status")
    assert done.returncode == 0, done.stdout
    assert len(re.findall("Completed", done.stdout)) == len(STEPS) + 1


def test_downloaded_results_are_those_of_a_local_build(aml, project, built):
    done = azureml(aml, project, "download")
    assert done.returncode == 0, done.stdout
    again = azureml(aml, project, "download", "build/onnx-int4", "results/metrics.json")
    assert again.returncode == 0, again.stdout
    assert "build/onnx-int4: is here already" in again.stdout
    shutil.rmtree(project / "build" / "azureml")
    expected = digests(built)
    assert expected.pop("results/rehearsal.json"), "a local build rehearses, Azure ML's steps do not"
    assert digests(project) == expected


def test_a_changed_blob_is_noticed_and_nothing_is_left(aml, project):
    run = f"{last(project)}-quantize"
    name = f"azureml/{run}/onnx_int4/genai_config.json"
    blob = aml.blobs.get_blob_client(CONTAINERS[STORE], name)
    before = blob.download_blob().readall()
    blob.upload_blob(before.replace(b"{", b"[", 1), overwrite=True)
    try:
        done = azureml(aml, project, "download", "build/onnx-int4")
    finally:
        blob.upload_blob(before, overwrite=True)
    assert done.returncode == 1
    assert "build/onnx-int4: not what the step wrote: genai_config.json differs" in done.stdout
    assert {path.name for path in (project / "build").iterdir()} == {"azureml"}
    done = azureml(aml, project, "download", "build/nothing")
    assert f"the run {last(project)} made no build/nothing. It made: build/base" in done.stdout


def test_register_once(aml, project):
    done = azureml(aml, project, "register")
    assert done.returncode == 0, done.stdout
    assert "registered as tone-of-phrases:1" in done.stdout
    model = aml.resources["/models/tone-of-phrases/versions/1"]["properties"]
    assert model["modelUri"].endswith(f"jobs/{last(project)}/outputs/package")
    tags = model["tags"]
    assert tags["job"] == last(project)
    assert re.fullmatch("[0-9a-f]{64}", tags["package_sha256"])
    assert re.fullmatch("[0-9a-f]{64}", tags["base_sha256"])
    assert {"base.accuracy", "merged.accuracy", "int4.accuracy", "int4.size_bytes", "base_model", "data"} <= set(tags)
    again = azureml(aml, project, "register")
    assert again.returncode == 0, again.stdout
    assert "tone-of-phrases:1 is this package already" in again.stdout
    assert "/models/tone-of-phrases/versions/2" not in aml.resources


def test_unchanged_steps_are_taken_from_an_earlier_run_through_faults(aml, project):
    """A changed gate runs the gates again and nothing before them; meanwhile servers are busy, fail, and hang up, and tokens expire."""
    change(project, "gates", max_accuracy_drop=0.9)
    faults = [
        [
            r"^PUT .*/jobs/",
            Fault(429, {"error": {"code": "TooManyRequests", "message": "slow down"}}, {"Retry-After": "1"}),
            2,
        ],
        [r"^GET .*/computes/cpu-cluster", error(500, "InternalServerError", "oops"), 1],
        [r"^GET .*/jobs/", Fault(None), 6],
        [r"^GET .*/children", Fault(503, {}, {"Retry-After": "0"}), 8],
    ]
    aml.server.faults[:], aml.server.lifetime = faults, 20
    try:
        done = azureml(aml, project, "submit", "--wait")
    finally:
        aml.server.faults.clear()
        aml.server.lifetime = 3600
    assert done.returncode == 0, done.stdout
    assert [entry[2] for entry in faults] == [0, 0, 0, 0], "every fault was made"
    reused = set(re.findall(r"(\w+) +Completed \(taken from an earlier run\)", done.stdout))
    assert {"fetch_model", "prepare", "finetune", "merge", "quantize", "evaluate"} <= reused
    assert "gates" not in reused
    done = azureml(aml, project, "download", "build/package")
    assert done.returncode == 0, done.stdout
    assert "build/package: every byte is right" in done.stdout


def test_a_failed_step_shows_the_end_of_its_log(aml, project):
    change(project, "gates", min_accuracy=1.0)
    done = azureml(aml, project, "submit", "--wait")
    assert done.returncode == 1
    assert re.search(r"^azureml: gates +Failed$", done.stdout, re.M)
    assert "the run ended as Failed" in done.stdout
    assert "gates, the end of its log:" in done.stdout
    assert "accuracy" in done.stdout.partition("the end of its log:")[2]
    done = azureml(aml, project, "register")
    assert done.returncode == 1
    assert "has no package (it is Failed): only what passed its gates is registered" in done.stdout


def test_cancel(aml, project):
    change(project, "finetune", learning_rate=0.009)
    done = azureml(aml, project, "submit")
    assert done.returncode == 0, done.stdout
    job = aml.jobs[last(project)]
    deadline = time.monotonic() + 300
    while f"{last(project)}-finetune" not in job["children"] and time.monotonic() < deadline:
        time.sleep(0.2)
    done = azureml(aml, project, "cancel")
    assert done.returncode == 0, done.stdout
    assert "to be stopped" in done.stdout
    job["thread"].join(60)
    assert job["status"] == "Canceled"
    done = azureml(aml, project, "status", "--wait")
    assert done.returncode == 1
    assert "the run ended as Canceled" in done.stdout


def test_who_asks_is_not_known(aml, project):
    aml.server.known = False
    try:
        done = azureml(aml, project, "status")
    finally:
        aml.server.known = True
    assert done.returncode == 1
    assert "Azure rejected the credentials" in done.stdout
    assert "az login" in done.stdout


def test_every_command_of_the_guide_as_written(aml, project):
    """docs/azureml.md, from the SDK's installation to a registered model (its steps are reused)."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "azureml.md").read_text(encoding="utf-8"), re.M | re.S)
    assert [block.splitlines()[0].rpartition(" ")[2] for block in blocks] == ["azureml", "compile", "--wait"]
    (project / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (project / ".git" / "info").mkdir(parents=True)
    equip(project)
    for block in blocks:
        done = subprocess.run(["bash", "-euxc", block], cwd=project, env=environment(aml), **STREAMS)
        assert done.returncode == 0, done.stdout
    assert "every byte is right" in done.stdout
    assert "is this package already" in done.stdout or "registered as" in done.stdout


def test_nothing_secret_is_written(aml, ran):
    """Neither a key, nor a signature, nor a token is in what was printed or written (scripts are not written here)."""
    project, printed = ran
    token = aml.server.token("r")["access_token"].partition(".")[0]
    written = [path for path in project.rglob("*") if path.is_file() and "scripts" not in path.parts]
    for content in [printed.encode(), *(path.read_bytes() for path in written)]:
        for secret in (aml.azurite.key.encode(), b"&sig=", token.encode()):
            assert secret not in content


# -- settings that Azure does not agree with ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(aml):
    """The environment of this process leads to the stand-in."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(clean_environment() | aml.environment())
    yield aml
    os.environ.clear()
    os.environ.update(before)


def check(tmp_path: Path, **changes: object) -> str:
    """What `submit` finds wrong about settings before anything is sent."""
    file = fill_in(tmp_path, **changes)
    loaded = settings.load(file)
    job = cli.Job("azureml", sys.stderr, None)
    ml = service.client(loaded)

    def submit() -> None:
        with service.translate_errors("workspace_name, resource_group, subscription_id", file):
            ml.workspaces.get(loaded.workspace_name)
        for name, one in loaded.clusters.items():
            service.prepare_cluster(ml, name, one, file, job)
        service.check_sources(ml, loaded, file)

    with pytest.raises(UserError) as caught:
        submit()
    return str(caught.value).removeprefix(f"{file}: ")


def cluster(**fields: object) -> dict:
    return {"clusters": {"gpu": fields}, "compute": {"default": "gpu"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workspace_name": "elsewhere"}, r"workspace_name, resource_group, subscription_id: not found: .*elsewhere"),
        (cluster(name="none"), r"clusters\.gpu\.name: the workspace has no compute `none`; it has: .*Correct the name, or give clusters\.gpu\.size"),
        (cluster(name="huge", size="Standard_ND96isr_H100_v5"), r"clusters\.gpu\.size: the subscription's quota does not allow it: .*96 vCPUs"),
        (cluster(name="cpu-cluster", instance_type="gpu"), r"clusters\.gpu\.instance_type: cpu-cluster is no Kubernetes but amlcompute"),
        ({"data": "azureml:phrases:9"}, r"data: not found"),
        ({"data": "azureml://datastores/none/paths/x.json"}, r"data: not found: .*Could not find datastore with name: none"),
        ({"model": "azureml://registries/shared/models/absent/versions/1"}, r"model: not found"),
        ({"model": "azureml://registries/shared/models/triton/versions/1"}, r"model: .* is registered as triton_model, model_type says custom_model\. Read are"),
        ({"model": "azureml://registries/shared/models/mlflow/versions/1"}, r"registered as mlflow_model, .* Set model_type to mlflow_model"),
    ],
)  # fmt: skip
def test_wrong_settings_name_the_field(ran, asked, tmp_path, changes, message):
    for kind in ("triton_model", "mlflow_model"):
        name = f"{kind.partition('_')[0]}/versions/1"
        properties = {
            "modelType": kind,
            "modelUri": f"azureml://registries/shared/models/{name}",
            "isAnonymous": False,
            "flavors": {},
        }
        asked.models[name] = asked.resource(f"/models/{name}", properties)
        asked.models[name]["id"] = f"azureml://registries/shared/models/{name}"
    assert re.search(message, check(tmp_path, **changes))


def test_no_right_to_create_a_cluster(asked, tmp_path):
    asked.server.faults[:] = [
        [r"^PUT .*/computes/", error(403, "AuthorizationFailed", "does not have authorization to perform action"), 9]
    ]
    try:
        message = check(tmp_path, **cluster(name="mine", size="Standard_D2"))
    finally:
        asked.server.faults.clear()
    assert message.startswith("clusters.gpu.size: permission denied")
    assert "AzureML Compute Operator" in message
