"""A stand-in for Azure Machine Learning: its REST interface as far as `tools/azureml.py` and the SDK behind it use it.

Written from the published API description and from what the SDK sends and expects. Resources are kept as they were put; blobs are in a
real Azurite; jobs run for real (aml_runner), with the reuse of unchanged steps, failure and cancellation that Azure ML promises.
What it cannot show: whether Azure ML itself agrees.
"""

import datetime
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from pathlib import Path

from aml_runner import Runner
from aml_server import API, ARM, DOMAIN, REGISTRY, Server, error

from slmake.azureml.step import sums

SUBSCRIPTION, GROUP, WORKSPACE = "11111111-2222-3333-4444-555555555555", "group", "workspace"
PREFIX = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}/providers/Microsoft.MachineLearningServices/workspaces/{WORKSPACE}"
STORE = "workspaceblobstore"
LOGS = "workspaceartifactstore"
CONTAINERS = {STORE: "blobs", LOGS: "azureml"}


class AzureML:
    """One workspace. `resources` holds what was put, by path below the workspace; `jobs` the runs, `runs` the steps."""

    def __init__(self, folder: Path, azurite, account: str, image: str | None = None):
        self.azurite, self.account, self.folder = azurite, account, folder
        self.blobs = azurite.client()
        for name in CONTAINERS.values():
            self.blobs.create_container(name)
        self.runner = Runner(folder / "machines", image)
        self.resources: dict[str, dict] = {}
        self.jobs: dict[str, dict] = {}
        self.runs: dict[str, dict] = {}
        self.finished: dict[str, str] = {}  # what a step depends on to the run that did it
        self.assets: dict[str, str] = {}  # id of an output to its URI
        self.models: dict[str, dict] = {}  # of the registry `shared`
        self.lock = threading.RLock()
        self.server = Server(folder, self.answer, azurite.port, account)

    def environment(self) -> dict[str, str]:
        return self.server.environment()

    def close(self) -> None:
        for job in self.jobs.values():
            job["stop"].set()
        for job in self.jobs.values():
            job["thread"].join(60)
        self.server.close()

    # -- requests --------------------------------------------------------------------------------------------------

    def answer(self, method: str, host: str, path: str, query: dict, body: dict):
        with self.lock:
            if path == "/metadata/endpoints":
                return 200, [metadata()], {}
            if path == "/discovery":
                return 200, {"api": f"https://{API}", "history": f"https://{API}"}, {}
            if host == REGISTRY:
                return self.registry(path)
            if host == API:
                return self.dataplane(path.partition(f"workspaces/{WORKSPACE}")[2], body)
            if not path.lower().startswith(PREFIX.lower()):
                raise error(
                    404, "ResourceNotFound", f"The Resource '{path.partition('/providers/')[2]}' was not found."
                )
            return self.workspace(method, path[len(PREFIX) :], query, body)

    def workspace(self, method: str, path: str, query: dict, body: dict):
        if path == "":
            described = {
                "discoveryUrl": f"https://{API}/discovery",
                "friendlyName": WORKSPACE,
                "storageAccount": f"/storageAccounts/{self.account}",
                "workspaceId": SUBSCRIPTION,
            }
            return 200, self.resource("", described) | {"location": "westeurope", "name": WORKSPACE}, {}
        kind, _, rest = path.strip("/").partition("/")
        if kind == "datastores":
            return self.datastores(rest, query)
        if kind == "jobs":
            return self.job_request(method, rest, body)
        if kind == "codes" and rest.endswith("startPendingUpload"):
            return self.pending_upload(path)
        if method == "PUT":
            if kind == "computes":
                check_quota(body)
            filled = {"flavors": {}} if kind == "models" else {}  # what the service adds
            self.resources[path] = self.resource(path, filled | body["properties"]) | {
                key: body[key] for key in ("location", "tags") if key in body
            }
            return 201, self.resources[path], {}
        if kind == "codes" and rest.endswith("/versions"):
            wanted = query.get("hash", [""])[0]
            items = [item for resource, item in self.resources.items() if resource.startswith(path)]
            return 200, {"value": [item for item in items if wanted in item["properties"]["properties"].values()]}, {}
        if path in self.resources:
            return 200, self.resources[path], {}
        if kind == "models" and rest.endswith("/versions"):
            items = [item for resource, item in self.resources.items() if resource.startswith(f"{path}/")]
            if items:
                return 200, {"value": items}, {}
        if kind == "models" and "/versions" not in rest:
            numbers = [
                int(resource.rpartition("/")[2])
                for resource in self.resources
                if resource.startswith(f"/models/{rest}/versions/")
            ]
            if numbers:
                latest = {"latestVersion": str(max(numbers)), "nextVersion": str(max(numbers) + 1), "properties": {}}
                return 200, self.resource(path, latest), {}
        if path == "/computes":
            return (
                200,
                {"value": [item for resource, item in self.resources.items() if resource.startswith("/computes/")]},
                {},
            )
        if kind == "computes":
            raise error(404, "ResourceNotFound", f"The Compute with name {rest} was not found.")
        raise error(404, "UserError", f"The specified resource was not found: {path}")

    def resource(self, path: str, properties: dict) -> dict:
        parts = path.strip("/").split("/")
        now = datetime.datetime.now(datetime.UTC).isoformat()
        kind = "workspaces/" + "/".join(parts[0::2]) if path else "workspaces"
        return {
            "id": PREFIX + path,
            "name": parts[-1],
            "type": f"Microsoft.MachineLearningServices/{kind}",
            "properties": properties | {"provisioningState": "Succeeded"},
            "systemData": {"createdAt": now, "createdBy": "test", "createdByType": "User", "lastModifiedAt": now},
        }

    def datastores(self, rest: str, query: dict):
        name, _, action = rest.partition("/")
        if action == "listSecrets":
            return 200, {"secretsType": "Sas", "sasToken": self.sas(CONTAINERS[name])}, {}
        if name == "":
            return 200, {"value": [self.datastore(STORE)]}, {}
        if name not in CONTAINERS:
            raise error(404, "UserError", f"Could not find datastore with name: {name}")
        return 200, self.datastore(name), {}

    def datastore(self, name: str) -> dict:
        return self.resource(
            f"/datastores/{name}",
            {
                "datastoreType": "AzureBlob",
                "accountName": self.account,
                "containerName": CONTAINERS[name],
                "endpoint": DOMAIN,
                "protocol": "https",
                "isDefault": name == STORE,
                "credentials": {"credentialsType": "Sas"},
                "serviceDataAccessAuthIdentity": "None",
            },
        )

    def sas(self, container: str) -> str:
        from azure.storage.blob import ContainerSasPermissions, generate_container_sas

        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        may = ContainerSasPermissions(read=True, write=True, list=True, create=True, add=True)
        return generate_container_sas(self.account, container, account_key=self.azurite.key, permission=may, expiry=end)

    def pending_upload(self, path: str):
        container = f"code-{secrets.token_hex(8)}"
        self.blobs.create_container(container)
        uri = f"https://{self.account}.blob.{DOMAIN}/{container}"
        reference = {"blobUri": uri, "credential": {"credentialType": "SAS", "sasUri": f"{uri}?{self.sas(container)}"}}
        reference["storageAccountArmId"] = f"/storageAccounts/{self.account}"
        answer = {"pendingUploadId": secrets.token_hex(4), "pendingUploadType": "TemporaryBlobReference"}
        return 200, answer | {"blobReferenceForConsumption": reference}, {}

    def registry(self, path: str):
        if path.startswith("/registrymanagement/"):
            answer = {"registryName": "shared", "subscriptionId": SUBSCRIPTION, "resourceGroup": GROUP}
            return 200, answer | {"primaryRegionResourceProviderUri": f"https://{REGISTRY}/", "registryFqdns": {}}, {}
        name = path.partition("/models/")[2]
        if name not in self.models:
            raise error(404, "UserError", f"The model {name} was not found in the registry shared.")
        return 200, self.models[name], {}

    def dataplane(self, path: str, body: dict):
        if path == "/dataversion/batchGetResolvedUris":
            wanted = {asset: {"uri": self.assets[asset], "type": "uri_folder"} for asset in body["values"]}
            return 200, {"values": wanted}, {}
        if path.endswith("/rundata"):
            return 200, {"runMetadata": self.run(body["runId"])}, {}
        match = re.fullmatch(r"/runs/([^/]+)(/children|/details)?", path)
        if not match or match[2] == "/details":
            raise error(404, "UserError", f"not part of this stand-in: {path}")
        if match[2] == "/children":
            return 200, {"value": [self.run(name) for name in self.jobs[match[1]]["children"]]}, {}
        return 200, self.run(match[1]), {}

    def run(self, name: str) -> dict:
        record = self.runs.get(name) or self.jobs.get(name)
        if not record:
            raise error(404, "UserError", f"Run {name} was not found")
        return {
            "runId": name,
            "displayName": record["display"],
            "status": record["status"],
            "properties": record["properties"],
            "tags": {},
            "outputs": {key: {"assetId": value, "type": "uri_folder"} for key, value in record["outputs"].items()},
            "inputs": {},
            "createdUtc": "2026-01-01T00:00:00+00:00",
            "experimentId": "e",
            "services": {},
        }

    # -- jobs ------------------------------------------------------------------------------------------------------

    def job_request(self, method: str, rest: str, body: dict):
        name, _, action = rest.partition("/")
        if method == "PUT":
            self.jobs[name] = {
                "resource": body,
                "status": "NotStarted",
                "children": [],
                "outputs": {},
                "properties": {},
            }
            self.jobs[name] |= {"display": name, "stop": threading.Event()}
            self.jobs[name]["thread"] = threading.Thread(target=self.work, args=(name,), daemon=True)
            self.jobs[name]["thread"].start()
        if name in self.runs:  # Azure ML answers so for steps; the SDK then asks the run history
            return 200, self.resource(f"/jobs/{name}", {}) | {"properties": None}, {}
        if name not in self.jobs:
            raise error(404, "UserError", f"Run {name} was not found")
        if action == "cancel":
            self.jobs[name]["stop"].set()
            location = f"https://{ARM}{PREFIX}/jobs/{name}/canceled"
            return 202, None, {"Location": location, "Retry-After": "0"}
        if action == "canceled":
            return 200, None, {}
        job = self.jobs[name]
        studio = {"endpoint": f"https://ml.azure.{DOMAIN}/runs/{name}", "jobServiceType": "Studio"}
        properties = job["resource"]["properties"] | {"status": job["status"], "services": {"Studio": studio}}
        return 200, self.resource(f"/jobs/{name}", properties), {}

    def work(self, name: str) -> None:
        """Run a pipeline's steps in order, as far as they go."""
        job = self.jobs[name]
        steps = dict(job["resource"]["properties"]["jobs"])
        job["status"] = "Running"
        places: dict[str, tuple[Path, str]] = {}  # output to its content here, and its asset id
        try:
            for key, value in job["resource"]["properties"].get("inputs", {}).items():
                places[f"parent.inputs.{key}"] = self.mount(value["uri"])
            while steps and not job["stop"].is_set():
                rule = next(rule for rule, step in steps.items() if not waits(step, steps))
                if not self.step(name, rule, steps.pop(rule), places):
                    break
            else:
                job["status"] = "Canceled" if job["stop"].is_set() else "Completed"
                return
            job["status"] = "Canceled" if job["stop"].is_set() else "Failed"
        except Exception as problem:
            job["status"], job["problem"] = "Failed", repr(problem)
            raise

    def mount(self, uri: str) -> tuple[Path, str]:
        """The content of an `azureml://…/datastores/…/paths/…`, downloaded; its identity is its URI."""
        match = re.search(r"datastores/([\w-]+)/paths/(.+)", uri)
        target = self.runner.new_path("input")
        self.download(CONTAINERS[match[1]], match[2].rstrip("/"), target)
        return target, uri

    def step(self, parent: str, rule: str, step: dict, places: dict) -> bool:
        component = self.resources[step["componentId"][len(PREFIX) :]]["properties"]["componentSpec"]
        code = self.resources[component["code"].removeprefix("azureml:")[len(PREFIX) :]]["properties"]["codeUri"]
        run = f"{parent}-{rule.replace('_', '-')}"
        child = self.runs[run] = {"display": rule, "status": "Running", "properties": {}, "outputs": {}, "rule": rule}
        self.jobs[parent]["children"].append(run)
        inputs, identities = {}, {}
        for key, value in step.get("inputs", {}).items():
            inputs[key], identities[key] = places[value["value"].strip("${}")]
        outputs = {key: self.runner.new_path("output") for key in component["outputs"]}
        container, _, root = code.partition(f"{DOMAIN}/")[2].partition("/")
        snapshot = self.runner.new_path("code")
        self.download(container, root, snapshot)
        # What Azure ML compares to decide that a deterministic step was done before.
        depends = json.dumps(
            [sums(snapshot), component["command"], component["environment"], identities], sort_keys=True
        )
        key = hashlib.sha256(depends.encode()).hexdigest()
        if key in self.finished and component.get("is_deterministic", True):
            before = self.finished[key]
            outputs = self.runs[before]["places"]
            child |= {"places": outputs, "outputs": self.runs[before]["outputs"], "status": "Completed"}
            child["properties"] = {"azureml.isreused": "true", "azureml.reusedrunid": before}
        elif not self.execute(parent, run, snapshot, component["command"], inputs, outputs):
            return False
        else:
            self.finished[key] = run
        for output, path in outputs.items():
            asset = child["outputs"].get(output)
            places[f"parent.jobs.{rule}.outputs.{output}"] = (path, asset)
            bound = (step.get("outputs", {}).get(output) or {}).get("value", "").strip("${}")
            if bound:
                self.jobs[parent]["outputs"][bound.rpartition(".")[2]] = asset
        return True

    def execute(self, parent: str, run: str, snapshot: Path, command: str, inputs: dict, outputs: dict) -> bool:
        child, stop = self.runs[run], self.jobs[parent]["stop"]
        started = self.runner.step(snapshot, command, inputs, outputs, start=self.popen)
        output_of_step: list[str] = []
        reader = threading.Thread(target=lambda: output_of_step.append(started.stdout.read()), daemon=True)
        reader.start()
        while started.poll() is None:
            if stop.is_set():
                os.killpg(started.pid, signal.SIGKILL)
            time.sleep(0.1)
        reader.join()
        self.upload(LOGS, f"ExperimentRun/dcid.{run}/user_logs/std_log.txt", "".join(output_of_step).encode())
        child["exit"] = started.returncode
        if started.returncode:
            child["status"] = "Canceled" if stop.is_set() else "Failed"
            return False
        for output, path in outputs.items():
            target = f"azureml/{run}/{output}"
            if path.is_dir():
                for file in (item for item in path.rglob("*") if item.is_file()):
                    self.upload(STORE, f"{target}/{file.relative_to(path).as_posix()}", file.read_bytes())
            else:
                self.upload(STORE, target, path.read_bytes())
            asset = f"azureml://locations/westeurope/workspaces/{SUBSCRIPTION}/data/{run}_{output}/versions/1"
            place_of = f"subscriptions/{SUBSCRIPTION}/resourcegroups/{GROUP}/workspaces/{WORKSPACE}/datastores/{STORE}"
            self.assets[asset] = f"azureml://{place_of}/paths/{target}" + "/" * path.is_dir()
            child["outputs"][output] = asset
        child |= {"status": "Completed", "places": outputs}
        return True

    @staticmethod
    def popen(command, **options):
        return subprocess.Popen(command, start_new_session=True, **options)

    # -- blobs -----------------------------------------------------------------------------------------------------

    def upload(self, store: str, name: str, content: bytes) -> None:
        self.blobs.get_blob_client(CONTAINERS[store], name).upload_blob(content, overwrite=True)

    def download(self, container: str, name: str, target: Path) -> None:
        """One blob to a file, or all blobs below a name to a folder."""
        client = self.blobs.get_container_client(container)
        names = [blob.name for blob in client.list_blobs(name_starts_with=name)]
        single = names == [name]
        for blob_name in names:
            rest = blob_name[len(name) :].strip("/")
            file = target if single else target / rest
            if rest or single:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(client.download_blob(blob_name).readall())


def waits(step: dict, left: dict) -> bool:
    return any(f"parent.jobs.{rule}." in value["value"] for rule in left for value in step.get("inputs", {}).values())


def check_quota(body: dict) -> None:
    size = body["properties"].get("properties", {}).get("vmSize", "")
    if "ND96" in size:
        raise error(
            400,
            "ClusterCoreQuotaReached",
            "The specified subscription has a Standard ND vCPU quota of 0 and cannot accommodate 96 vCPUs.",
        )


def metadata() -> dict:
    """What Azure Resource Manager says about a cloud."""
    return {
        "name": "SlmakeTestCloud",
        "portal": f"https://portal.azure.{DOMAIN}/",
        "resourceManager": f"https://{ARM}/",
        "authentication": {"loginEndpoint": f"https://login.{DOMAIN}/"},
        "suffixes": {"storage": DOMAIN},
    }
