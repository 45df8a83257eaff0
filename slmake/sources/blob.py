"""Azure Blob: the source, the file system with its credentials, and what Azure's errors mean.

adlfs finds the account and the credentials: AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY
or AZURE_STORAGE_SAS_TOKEN (the Azure CLI's names, as DVC reads them), or else DefaultAzureCredential (`az login`, a managed
identity, AZURE_CLIENT_ID and its like). Its client of the Azure SDK is used directly where a request needs a condition.
"""

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from slmake import cli, credentials
from slmake.errors import UserError
from slmake.sources.base import Source, check_plain, not_of_form
from slmake.sources.download import PASSING, Broken, digest_of, download, number_of
from slmake.sources.fetching import model_files
from slmake.sources.pickles import PICKLES, pickle_advice

# The SDK waits 15 s and more before it tries again: `run` below and `download` do it sooner.
RETRIES = {"retry_total": 0}
CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
ATTEMPTS = 5
BLOCK = 16 * 2**20  # bytes of a request
PARALLEL = 4  # requests at a time; each keeps a block in memory


class BlobEntry(NamedTuple):
    """One blob of a listing."""

    name: str  # relative to the path that was listed
    path: str  # in its container
    size: int  # bytes
    etag: str  # without quotes


@dataclass(frozen=True, kw_only=True)
class AzureBlob(Source):
    """`az://container/path`, or `abfs://container@account.dfs.core.windows.net/path`; a blob, or a folder of them."""

    kind = "az"
    prefixes = ("az://", "abfs://", "abfss://")
    form = "az://container/path"

    name: str = ""  # of the container
    account: str = ""  # where the URI names it; else the environment does

    @classmethod
    def parse(cls, text: str) -> Self:
        try:
            url = urlsplit(text)
        except ValueError:
            raise not_of_form(cls, text) from None
        if url.query:
            raise ValueError(
                f"`{credentials.masked(text)}`: an az:// source takes no query: put a SAS into AZURE_STORAGE_SAS_TOKEN"
            )
        container, at, host = url.netloc.rpartition("@") if "@" in url.netloc else (url.netloc, "", "")
        if at and not re.fullmatch(r"[a-z0-9]+\.(dfs|blob)\.core\.[a-z.]+", host):
            raise ValueError(
                f"`{credentials.masked(text)}` does not name an account: {url.scheme}://CONTAINER@ACCOUNT.dfs.core.windows.net/path"
            )
        path = url.path.strip("/")
        if not re.fullmatch(r"[a-z0-9$](-?[a-z0-9])+", container) or not path:
            raise not_of_form(cls, text)
        return cls(text=text, name=container, path=check_plain(path, text), account=host.split(".")[0])

    def pinned(self, job: cli.Job) -> str:
        """The source with its ETag: of a folder, the SHA-256 over names and ETags of its files."""
        return f"{self.full}#etag={etag_of(self.entries('model')[2])}"

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        fs, container, entries = self.entries(use)
        etag = etag_of(entries)
        self.check_etag(etag)
        single = entries[0].path == self.path
        root = folder / etag[:40]  # a changed source is downloaded anew
        with job.progress(sum(entry.size for entry in entries), "B") as bar:
            for entry in entries:
                target = root / entry.name
                if target.exists() and target.stat().st_size == entry.size:
                    bar.update(entry.size)
                else:
                    what = self.text if single else f"{self.text}/{entry.name}"
                    download_blob(fs, container, entry, target, what, bar)
        return (root / entries[0].name if single else root), {"etag": etag}

    def entries(self, use: str) -> tuple[object, str, list[BlobEntry]]:
        """File system, container and the blobs that are read: one, or those of a model folder.

        Raises:
            UserError: nothing there, pickled weights only, or no access.
        """
        fs = filesystem(self.account)
        entries = listing(fs, self.name, self.path)
        if len(entries) == 1 and entries[0].path == self.path:
            return fs, self.name, entries
        if use == "dataset":
            raise UserError(f"{self.full}: a folder, not a dataset file. Check prepare.source.")
        names = set(model_files(entry.name for entry in entries))
        chosen = [entry for entry in entries if entry.name in names]
        for entry in chosen:
            try:
                check_plain(entry.name, entry.name)
            except ValueError as error:
                raise UserError(f"{self.full}: {error}.") from None
        if not any(entry.name.endswith(".safetensors") for entry in chosen):
            pickled = [entry.name for entry in entries if entry.name.endswith(PICKLES)]
            if pickled:
                raise UserError(f"{self.full}: weights are in {pickle_advice(pickled[0])}")
            raise UserError(f"{self.full}: no model there: no safetensors file among {len(entries)} files.")
        return fs, self.name, chosen


def etag_of(entries: list[BlobEntry]) -> str:
    """The ETag of one blob; of several, the SHA-256 over their names and ETags."""
    return entries[0].etag if len(entries) == 1 else digest_of({entry.name: entry.etag for entry in entries})


def filesystem(account: str = "", credential: object | None = None):
    """An `adlfs.AzureBlobFileSystem` for an account, or for the environment's.

    Raises:
        UserError: the environment names no account.
    """
    from adlfs import AzureBlobFileSystem

    logging.getLogger("azure").setLevel(logging.ERROR)
    connection = os.environ.get(CONNECTION)
    if connection and account and account_of(connection) != account:
        connection = None  # the URI names another account
    name = account or os.environ.get("AZURE_STORAGE_ACCOUNT") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not connection and not name:
        raise UserError(
            "Azure Blob: no account. Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY, "
            "AZURE_STORAGE_SAS_TOKEN or `az login`. docs/azure.md shows each."
        )
    kept = os.environ.pop(CONNECTION, None)  # adlfs would take it for this account all the same
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
    finally:
        if kept is not None:
            os.environ[CONNECTION] = kept


def account_of(connection: str) -> str:
    """The account that a connection string is known to be of, or ""; one of an own host's name, or of an emulator, may be any."""
    named = re.search(r"(?i)(?:^|;)AccountName=([^;]+)", connection)
    hosted = re.search(r"(?i)BlobEndpoint=https?://([a-z0-9]+)(?:-secondary)?\.(?:[a-z0-9-]+\.)*blob\.", connection)
    return (found[1] if (found := named or hosted) else "").lower()


def account_here() -> str:
    """The account that the environment names, or ""; what can be the name of none may have a credential in it."""
    if connection := os.environ.get(CONNECTION):
        name = account_of(connection)
    else:
        name = os.environ.get("AZURE_STORAGE_ACCOUNT") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or ""
    return name if re.fullmatch("[a-z0-9]{3,24}", name) else ""


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
    headers = getattr(getattr(error, "response", None), "headers", {})
    return min(30.0, number_of(headers.get("Retry-After")) or 0.0)


def listing(fs, container: str, path: str) -> list[BlobEntry]:
    """The blob at `path`, or all blobs below it, by name.

    Raises:
        UserError: there is nothing, or no container, or no access.
    """

    async def walk() -> list[BlobEntry]:
        client, entries = fs.service_client.get_container_client(container), []
        async for blob in client.list_blobs(name_starts_with=path, **RETRIES):
            folder = (blob.metadata or {}).get("hdi_isfolder") or blob.name.endswith("/")
            if not folder and (blob.name == path or blob.name.startswith(f"{path.rstrip('/')}/")):
                name = blob.name[len(path) :].strip("/") or path.rpartition("/")[2]
                entries.append(BlobEntry(name, blob.name, blob.size, blob.etag.strip('"')))
        return sorted(entries)

    try:
        entries = run(fs, walk)
    except Exception as error:
        raise explain(error, f"az://{container}/{path}") from None
    if exact := [entry for entry in entries if entry.path == path]:
        return exact
    if not entries:
        raise UserError(
            f"az://{container}/{path}: no such file or folder there. Check the path; names are case-sensitive."
        )
    return entries


def download_blob(fs, container: str, entry: BlobEntry, target: Path, what: str, bar: cli.Progress) -> None:
    """Download one blob, PARALLEL blocks at a time, on the condition that its ETag stays what the listing said."""
    import asyncio

    from azure.core import MatchConditions
    from azure.core import exceptions as azure

    client = fs.service_client.get_blob_client(container, entry.path)

    async def block(start: int) -> bytes:
        stream = await client.download_blob(
            offset=start,
            length=min(BLOCK, entry.size - start),
            etag=f'"{entry.etag}"',
            match_condition=MatchConditions.IfNotModified,
            **RETRIES,
        )
        return await stream.readall()

    async def blocks(start: int) -> list[bytes | BaseException]:
        starts = range(start, min(entry.size, start + PARALLEL * BLOCK), BLOCK)
        return await asyncio.gather(*map(block, starts), return_exceptions=True)

    def read(start: int) -> Iterator[bytes]:
        while start < entry.size:
            for received in run(fs, functools.partial(blocks, start)):
                if isinstance(received, azure.ResourceModifiedError):
                    raise UserError(f"{what}: it was changed while it was read. Run the same command again.")
                if isinstance(received, azure.HttpResponseError) and received.status_code not in (*PASSING, 200, 206):
                    raise explain(received, what)
                if isinstance(received, azure.AzureError | OSError):
                    raise Broken(f"the connection broke ({type(received).__name__})", wait_asked(received))
                if isinstance(received, BaseException):
                    raise received
                yield received
                start += len(received)

    download(read, target, entry.size, what, bar)


def scrub(text: str) -> str:
    """`text` without the credentials of the environment and without those of URLs."""
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
    return credentials.scrub(text)


def explain(error: BaseException, what: str) -> UserError:
    """What an error of the Azure SDK means for the user, and what to do; free of credentials."""
    from azure.core import exceptions as azure

    if isinstance(error, UserError):
        return error
    code = getattr(error, "error_code", "") or ""
    code = getattr(code, "value", code)  # of some errors it is an enumeration, of some its text
    status = getattr(error, "status_code", None)
    container = what.split("://")[-1].split("/")[0]
    if code == "ContainerNotFound":
        why = f"there is no container `{container}`. Create it: `az storage container create --name {container}`, or correct the URL."
    elif code == "AuthorizationPermissionMismatch":
        why = "you are known there but may not do this. Ask for the role Storage Blob Data Contributor (Reader, to read only)."
    elif status in (401, 403) or isinstance(error, azure.ClientAuthenticationError):
        why = (
            "the credentials were refused. Check AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN "
            "(expired?), or log in again with `az login`."
        )
    elif isinstance(error, azure.ResourceNotFoundError):
        why = "no such blob. Check the path; names are case-sensitive."
    elif isinstance(error, azure.ResourceModifiedError) or status == 412 or code == "InvalidBlockList":
        why = "someone else changed it meanwhile. Run the same command again."
    elif status in PASSING:
        why = f"the server answered {status} ({code or 'no reason given'}) again and again. Run the same command again later: it resumes where it stopped."
    elif isinstance(
        error, azure.ServiceRequestError | azure.ServiceResponseError | azure.IncompleteReadError | OSError
    ):
        why = (
            f"the server cannot be reached or the connection broke ({type(error).__name__}). Check the network and the account's name, "
            "then run the same command again: it resumes where it stopped."
        )
    else:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        why = f"{type(error).__name__}: {scrub(first)}"
    return UserError(f"{what}: {why}")
