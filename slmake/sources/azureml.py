"""Azure Machine Learning: where a datastore's files lie, and models of a registry. Needs azure-ai-ml: `make azureml`."""

import logging
import os
from pathlib import Path

from slmake.errors import UserError
from slmake.sources import blob
from slmake.sources.syntax import Source

WORKSPACE = ("AZUREML_ARM_SUBSCRIPTION", "AZUREML_ARM_RESOURCEGROUP", "AZUREML_ARM_WORKSPACE_NAME")


def client(source: Source):
    """An `azure.ai.ml.MLClient` for the workspace or registry of a source; its telemetry is off.

    Raises:
        UserError: azure-ai-ml is not installed, or nothing says which workspace.
    """
    try:
        from azure.ai.ml import MLClient
    except ModuleNotFoundError:
        raise UserError(
            f"{source.text}: azureml:// sources need the package azure-ai-ml. Install it: `make azureml`."
        ) from None
    from azure.identity import DefaultAzureCredential

    for name in ("azure", "azure.ai.ml", "msrest"):
        logging.getLogger(name).setLevel(logging.ERROR)
    credential = DefaultAzureCredential()
    if source.kind == "registry":
        return MLClient(credential, registry_name=source.name, enable_telemetry=False)
    place = source.account.split("/") if source.account else [os.environ.get(name, "") for name in WORKSPACE]
    if all(place):
        return MLClient(credential, *place, enable_telemetry=False)
    for file in (Path("config.json"), Path(".azureml/config.json")):
        if file.exists():
            return MLClient.from_config(credential, path=file, enable_telemetry=False)
    raise UserError(
        f"{source.text}: which workspace? Set {', '.join(WORKSPACE)}, download the workspace's config.json into this folder, or write "
        "the long form azureml://subscriptions/…/resourcegroups/…/workspaces/…/datastores/NAME/paths/PATH."
    )


def as_blob(source: Source) -> Source:
    """The `az` source that a datastore's path stands for.

    Raises:
        UserError: no such datastore, not one of Azure Blob or Data Lake, or no access.
    """
    ml = client(source)
    try:
        store = ml.datastores.get(source.name)
    except Exception as error:
        raise blob.explain(error, source.text) from None
    container = getattr(store, "container_name", None) or getattr(store, "filesystem", None)
    if not container:
        raise UserError(
            f"{source.text}: the datastore {source.name} is of type {store.type}; read are Azure Blob and Data Lake Gen2."
        )
    return source._replace(kind="az", name=container, account=store.account_name)


def from_registry(source: Source, folder: Path) -> Path:
    """Download a registry's model into `folder`; return where its files begin.

    Raises:
        UserError: no such model or version, or no access.
    """
    ml = client(source)
    try:
        ml.models.download(name=source.path, version=source.revision, download_path=str(folder))
    except Exception as error:
        raise blob.explain(error, source.text) from None
    place = folder / source.path
    inside = [path for path in place.iterdir() if not path.name.startswith(".")] if place.is_dir() else []
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else place
