"""Azure Blob: who we are there, what lies there, and what its errors mean.

adlfs finds the account and the credentials: AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY
or AZURE_STORAGE_SAS_TOKEN (the Azure CLI's names, as DVC reads them), or else DefaultAzureCredential (`az login`, a managed
identity, AZURE_CLIENT_ID and its like). Its client of the Azure SDK is used directly where a request needs a condition.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Coroutine
from typing import NamedTuple

from slmake.errors import UserError

RETRIES = {
    "retry_total": 0
}  # the SDK waits 15 s and more before it tries again: `run` below and `download` do it sooner
PASSING = (429, 500, 502, 503, 504)  # answers that another try may change
ATTEMPTS = 5


class Blob(NamedTuple):
    """One blob of a listing."""

    name: str  # relative to the path that was listed
    path: str  # in its container
    size: int  # bytes
    etag: str  # without quotes


def filesystem(account: str = "", credential: object | None = None):
    """An `adlfs.AzureBlobFileSystem` for an account, or for the environment's.

    Raises:
        UserError: the environment names no account.
    """
    from adlfs import AzureBlobFileSystem

    logging.getLogger("azure").setLevel(logging.ERROR)
    connection = os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    if connection and account and f"AccountName={account};" not in connection + ";":
        connection = None  # the URI names another account
    name = account or os.environ.get("AZURE_STORAGE_ACCOUNT") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not connection and not name:
        raise UserError(
            "Azure Blob: no account. Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY, "
            "AZURE_STORAGE_SAS_TOKEN or `az login`. docs/azure.md shows each."
        )
    try:
        return AzureBlobFileSystem(
            account_name=name,
            account_key=os.environ.get("AZURE_STORAGE_KEY") or None,
            connection_string=connection or None,
            credential=credential,
            anon=False,
            use_listings_cache=False,
            skip_instance_cache=True,
            max_concurrency=8,
        )
    except ValueError as error:
        raise UserError(f"Azure Blob: the credentials of the environment cannot be used: {scrub(str(error))}") from None


def run(fs, request: Callable[[], Coroutine], attempts: int = ATTEMPTS):
    """Wait for a request of `fs`'s clients, on the loop they live on; again, a bounded number of times, after what may pass."""
    from azure.core import exceptions as azure
    from fsspec.asyn import sync

    for attempt in range(1, attempts + 1):
        try:
            return sync(fs.loop, request)
        except azure.ClientAuthenticationError:
            raise
        except (azure.HttpResponseError, azure.ServiceRequestError, azure.ServiceResponseError) as error:
            passing = not isinstance(error, azure.HttpResponseError) or error.status_code in PASSING
            if not passing or attempt == attempts:
                raise
            time.sleep(max(wait_asked(error), 0.5 * 2**attempt))
    raise AssertionError


def wait_asked(error: BaseException) -> float:
    """Seconds that the server asked to wait (Retry-After), at most 30."""
    after = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(30.0, float(after)) if str(after).isdigit() else 0.0


def listing(fs, container: str, path: str) -> list[Blob]:
    """The blob at `path`, or all blobs below it, by name.

    Raises:
        UserError: there is nothing, or no container, or no access.
    """

    async def walk() -> list[Blob]:
        client, found = fs.service_client.get_container_client(container), []
        async for blob in client.list_blobs(name_starts_with=path, **RETRIES):
            folder = (blob.metadata or {}).get("hdi_isfolder") or blob.name.endswith("/")
            if not folder and (blob.name == path or blob.name.startswith(f"{path.rstrip('/')}/")):
                name = blob.name[len(path) :].strip("/") or path.rpartition("/")[2]
                found.append(Blob(name, blob.name, blob.size, blob.etag.strip('"')))
        return sorted(found)

    try:
        found = run(fs, walk)
    except Exception as error:
        raise explain(error, f"az://{container}/{path}") from None
    if exact := [blob for blob in found if blob.path == path]:
        return exact
    if not found:
        raise UserError(
            f"az://{container}/{path}: no such file or folder there. Check the path; names are case-sensitive."
        )
    return found


def scrub(text: str) -> str:
    """`text` without the credentials of the environment and without signatures of URLs."""
    for name in (
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
    ):
        value = os.environ.get(name, "")
        for part in {value, *re.findall(r"(?:AccountKey|SharedAccessSignature)=([^;]+)", value)}:
            if len(part) > 3:
                text = text.replace(part, "***")
    return re.sub(r"(?i)\b(sig|AccountKey|SharedAccessSignature|access_token)=[^&;\s'\"]+", r"\1=***", text)


def explain(error: BaseException, what: str) -> UserError:
    """What an error of the Azure SDK means for the user, and what to do; free of credentials."""
    from azure.core import exceptions as azure

    if isinstance(error, UserError):
        return error
    code = str(getattr(error, "error_code", "") or "")
    status = getattr(error, "status_code", None)
    container = what.split("://")[-1].split("/")[0]
    if code == "ContainerNotFound":
        why = f"there is no container `{container}`. Create it: `az storage container create --name {container}`, or correct the URL."
    elif code == "AuthorizationPermissionMismatch" or code == "AuthorizationFailure":
        why = "you are known there but may not do this. Ask for the role Storage Blob Data Contributor (Reader, to read only)."
    elif status in (401, 403) or isinstance(error, azure.ClientAuthenticationError):
        why = (
            "the credentials were refused. Check AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN "
            "(expired?), or log in again with `az login`."
        )
    elif isinstance(error, azure.ResourceNotFoundError):
        why = "no such blob. Check the path; names are case-sensitive."
    elif isinstance(error, azure.ResourceModifiedError) or status == 412:
        why = "it was changed by someone else meanwhile. Run the same command again."
    elif status in PASSING:
        why = f"the server answered {status} ({code or 'no reason given'}) again and again. Run the same command again later: it goes on where it stopped."
    elif isinstance(
        error, azure.ServiceRequestError | azure.ServiceResponseError | azure.IncompleteReadError | OSError
    ):
        why = (
            f"the server cannot be reached or the connection broke ({type(error).__name__}). Check the network and the account's name, "
            "then run the same command again: it goes on where it stopped."
        )
    else:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        why = f"{type(error).__name__}: {scrub(first)}"
    return UserError(f"{what}: {why}")
