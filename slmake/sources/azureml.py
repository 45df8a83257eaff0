"""Azure Machine Learning: files of a datastore, and models of a registry. Needs azure-ai-ml: `make azureml`."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from slmake import cli
from slmake.credentials import masked
from slmake.errors import UserError
from slmake.sources import blob
from slmake.sources.base import Source, check_plain

WORKSPACE = ("AZUREML_ARM_SUBSCRIPTION", "AZUREML_ARM_RESOURCEGROUP", "AZUREML_ARM_WORKSPACE_NAME")
_IN_WORKSPACE = (
    r"(?:subscriptions/([\w-]+)/resource[gG]roups/([\w.()-]+)/"
    r"(?:providers/Microsoft\.MachineLearningServices/)?workspaces/([\w-]+)/)?"
)


@dataclass(frozen=True, kw_only=True)
class RegistryModel(Source):
    """`azureml://registries/REGISTRY/models/NAME/versions/VERSION`; the version fixes the content."""

    kind = "registry"
    prefixes = ("azureml://registries/",)
    form = "azureml://registries/REGISTRY/models/NAME/versions/VERSION"
    pin_needed = False
    models_only = True

    name: str = ""  # of the registry; `path` is the model's name
    revision: str = ""  # the model's version

    @classmethod
    def parse(cls, text: str) -> Self:
        parts = re.fullmatch(r"azureml://registries/([\w-]+)/models/([\w.-]+)/versions/([\w.-]+)", text)
        if not parts:
            raise _neither(text)
        return cls(text=text, name=parts[1], path=parts[2], revision=parts[3])

    def pinned(self, job: cli.Job) -> str:
        return self.full

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        ml = client(self.text, registry=self.name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            ml.models.download(name=self.path, version=self.revision, download_path=str(folder))
        except Exception as error:
            raise blob.explain(error, self.text) from None
        root = folder / self.path
        inside = [path for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []
        path = inside[0] if len(inside) == 1 and inside[0].is_dir() else root
        return path, {"pin": {"version": self.revision}}


@dataclass(frozen=True, kw_only=True)
class Datastore(Source):
    """`azureml://datastores/NAME/paths/PATH`, with or without the workspace in front; read as the Azure Blob behind it."""

    kind = "datastore"
    prefixes = ("azureml://",)
    form = "azureml://datastores/NAME/paths/PATH"

    name: str = ""  # of the datastore
    account: str = ""  # subscription/resource group/workspace, where the URI names them

    @classmethod
    def parse(cls, text: str) -> Self:
        parts = re.fullmatch(rf"azureml://{_IN_WORKSPACE}datastores/([\w-]+)/paths/(\S+)", text)
        if not parts:
            raise _neither(text)
        workspace = "/".join(filter(None, parts.groups()[:3]))
        return cls(text=text, name=parts[4], path=check_plain(parts[5].strip("/"), text), account=workspace)

    def pinned(self, job: cli.Job) -> str:
        return f"{self.full}#etag={blob.etag_of(self.as_blob().entries('model')[2])}"

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        return self.as_blob().fetch(use, folder, job)

    def as_blob(self) -> blob.AzureBlob:
        """The Azure Blob source that the datastore's path stands for; errors name the datastore.

        Raises:
            UserError: no such datastore, not one of Azure Blob or Data Lake, or no access.
        """
        ml = client(self.text, self.account)
        try:
            store = ml.datastores.get(self.name)
        except Exception as error:
            raise blob.explain(error, self.text) from None
        container = getattr(store, "container_name", None) or getattr(store, "filesystem", None)
        if not container:
            raise UserError(
                f"{self.text}: the datastore {self.name} is of type {store.type}; Azure Blob and Data Lake Gen2 can be read."
            )
        return blob.AzureBlob(
            text=self.text, name=container, path=self.path, account=store.account_name, pin=self.pin, member=self.member
        )


def _neither(text: str) -> ValueError:
    return ValueError(f"`{masked(text)}` is neither {Datastore.form} nor {RegistryModel.form}")


def client(what: str, workspace: str = "", registry: str = ""):
    """An `azure.ai.ml.MLClient` for a workspace (or the environment's) or a registry; its telemetry is off.

    Args:
        what: the source's name, for errors.

    Raises:
        UserError: azure-ai-ml is not installed, or nothing says which workspace.
    """
    try:
        from azure.ai.ml import MLClient
    except ModuleNotFoundError:
        raise UserError(
            f"{what}: azureml:// sources need the package azure-ai-ml. Install it: `make azureml`."
        ) from None
    from azure.identity import DefaultAzureCredential

    for name in ("azure", "azure.ai.ml", "msrest"):
        logging.getLogger(name).setLevel(logging.ERROR)
    credential = DefaultAzureCredential()
    if registry:
        return MLClient(credential, registry_name=registry, enable_telemetry=False)
    address = workspace.split("/") if workspace else [os.environ.get(name, "") for name in WORKSPACE]
    if all(address):
        return MLClient(credential, *address, enable_telemetry=False)
    for file in (Path("config.json"), Path(".azureml/config.json")):
        if file.exists():
            return MLClient.from_config(credential, path=file, enable_telemetry=False)
    raise UserError(
        f"{what}: which workspace? Set {', '.join(WORKSPACE)}, download the workspace's config.json into this folder, or write "
        "the long form azureml://subscriptions/…/resourcegroups/…/workspaces/…/datastores/NAME/paths/PATH."
    )
