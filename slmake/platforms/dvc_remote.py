"""The default remote as Azure Blob has it: its address, and the objects that lie there; DVC itself does not look at their sizes."""

import configparser
import functools
import hashlib
import os
import re
from collections.abc import Callable

from slmake.credentials import holds_secret, masked
from slmake.errors import UserError, first_line
from slmake.platforms.dvc import cached

CONFIG = [".dvc/config", ".dvc/config.local"]


def is_address(url: str) -> bool:
    """Whether an address is of the form azure://container/path, without an account, query or SAS."""
    form = r"azure://[a-z0-9](-?[a-z0-9]){2,62}(/[^\s?#@;&=]+)?"
    return bool(re.fullmatch(form, url)) and not holds_secret(url)


def ensure_container(url: str) -> str:
    """Create the container where it is missing; says what was found.

    Raises:
        UserError: no access, or out of reach.
    """
    from slmake.sources import blob

    if not account_name():
        return "its container was not checked, because the environment names no account (docs/azure.md)"
    container = url.removeprefix("azure://").partition("/")[0]
    fs = blob.filesystem()

    async def create() -> str:
        client = fs.service_client.get_container_client(container)
        if await client.exists(**blob.RETRIES):
            return f"the container {container} is there"
        await client.create_container(**blob.RETRIES)
        return f"the container {container} was created"

    try:
        return blob.run(fs, create)
    except Exception as error:
        raise blob.explain(error, url) from None


def account_name() -> str | None:
    """The account that the environment names.

    Raises:
        UserError: it can be the name of none; it would stand in .dvc/config, and may have a credential in it.
    """
    from slmake.sources import blob

    found = blob.account_of(os.environ.get(blob.CONNECTION, ""))
    name = found or os.environ.get("AZURE_STORAGE_ACCOUNT")
    if name and not re.fullmatch("[a-z0-9]{3,24}", name):
        raise UserError(
            f"{'AccountName in AZURE_STORAGE_CONNECTION_STRING' if found else 'AZURE_STORAGE_ACCOUNT'} is no name of an account: 3 to 24 "
            "lower-case letters and digits, and nothing behind it but `;` and other parts of a connection string."
        )
    return name


def place() -> tuple[str, str, str]:
    """Account (or ""), container and path of the default remote.

    Raises:
        UserError: there is none, or it is not in Azure Blob; or DVC's settings cannot be read.
    """
    config = configparser.ConfigParser(interpolation=None)
    for file in CONFIG:
        try:
            config.read(file, encoding="utf-8")
        except (configparser.Error, ValueError) as error:
            raise UserError(
                f"{file} cannot be read: {first_line(error)}. Correct it, or bring back what Git has."
            ) from None
    name = config.get("core", "remote", fallback=None)
    section = f"'remote \"{name}\"'"
    if name is None or section not in config:
        raise UserError("no remote is set up. Name one: `make remote URL=azure://container/path`.")
    url = config[section].get("url", "")
    if not url.startswith("azure://"):
        raise UserError(f"the remote {name} is {masked(url)}, not in Azure Blob: use `dvc push` and `dvc pull`.")
    if re.search("[?#@;]", url) or holds_secret(url):
        raise UserError(
            f"the remote {name} is {masked(url)}, not of the form azure://container/path: an account, a query or a SAS does not belong into "
            "it. `make remote URL=azure://container/path` sets it anew; credentials come from the environment (docs/azure.md)."
        )
    container, _, path = url.removeprefix("azure://").partition("/")
    from slmake.sources import blob

    account, given = config[section].get("account_name", ""), blob.account_of(os.environ.get(blob.CONNECTION, ""))
    if account and given and given != account:  # DVC would take the environment's
        raise UserError(
            f"the remote {name} is of the account {account}, AZURE_STORAGE_CONNECTION_STRING of {given}. Unset it, or give that of {account}."
        )
    return account, container, path.strip("/")


def stored() -> dict[str, int]:
    """Bytes of every DVC object in the remote, by its MD5 (32 hex digits, `.dir` behind those of folders).

    Raises:
        UserError: no container, no access, or out of reach.
    """
    from slmake.sources import blob

    account, container, path = place()
    fs = blob.filesystem(account)
    prefix = f"{path}/files/md5/" if path else "files/md5/"

    async def walk() -> dict[str, int]:
        client = fs.service_client.get_container_client(container)
        return {
            one.name[len(prefix) :].replace("/", ""): one.size
            async for one in client.list_blobs(prefix, **blob.RETRIES)
        }

    try:
        return blob.run(fs, walk)
    except Exception as error:
        raise blob.explain(error, f"azure://{container}/{path}") from None


def each(names: list[str], send: Callable) -> list:
    """The results of `send` for each object, by MD5. `send` takes the Azure SDK's client of the object's blob, and the MD5."""
    from slmake.sources import blob

    account, container, path = place()
    fs = blob.filesystem(account)

    def client(name: str):
        target = "/".join(filter(None, [path, "files/md5", name[:2], name[2:]]))
        return fs.service_client.get_blob_client(container, target)

    try:
        return [blob.run(fs, functools.partial(send, client(name), name)) for name in names]
    except Exception as error:
        raise blob.explain(error, f"azure://{container}/{path}") from None


def listed(name: str) -> bytes | None:
    """A folder's list of files, by its MD5, as the remote has it; None where it is damaged there."""
    from slmake.sources import blob

    async def get(client, name: str) -> bytes:
        return await (await client.download_blob(**blob.RETRIES)).readall()

    [content] = each([name], get)
    return content if hashlib.md5(content).hexdigest() == name.removesuffix(".dir") else None


def upload(names: list[str]) -> None:
    """Upload objects of the cache, over what is there, by MD5; folders last."""
    from slmake.sources import blob

    async def put(client, name: str) -> None:
        with open(cached(name), "rb") as handle:
            await client.upload_blob(handle, overwrite=True, **blob.RETRIES)

    each(sorted(names, key=lambda name: name.endswith(".dir")), put)
