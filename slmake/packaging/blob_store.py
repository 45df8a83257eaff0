"""Published models in Azure Blob: immutable folders by digest, and a pointer to the latest."""

import functools
import hashlib
import json
from pathlib import Path

from slmake import cli, outputs
from slmake.errors import UserError
from slmake.packaging.checksums import files_of
from slmake.sources import blob, download
from slmake.sources.blob import AzureBlob

POINTER = "latest.json"
MANIFEST = "manifest.json"  # beside the model's files, the same but for `previous`
RACES = 20  # how often the pointer may move under our hands


class Store:
    """A prefix in a container."""

    def __init__(self, source: AzureBlob):
        self.source = source
        self.fs = blob.filesystem(source.account)
        self.url = f"az://{source.name}/{source.path}"

    def client(self, name: str):
        """The Azure SDK's client of one blob below the prefix."""
        return self.fs.service_client.get_blob_client(self.source.name, f"{self.source.path}/{name}")

    def run(self, request, name: str = ""):
        """Wait for a request; its errors become UserErrors."""
        try:
            return blob.run(self.fs, request)
        except Exception as error:
            raise blob.explain(error, f"{self.url}/{name}".rstrip("/")) from None

    def sizes(self, digest: str) -> dict[str, tuple[int, str]]:
        """Size and uploaded SHA-256 of the blobs below a digest, by name."""

        async def walk():
            sizes, start = {}, f"{self.source.path}/{digest}/"
            container = self.fs.service_client.get_container_client(self.source.name)
            async for item in container.list_blobs(start, include=["metadata"], **blob.RETRIES):
                sizes[item.name.removeprefix(start)] = (item.size, (item.metadata or {}).get("sha256", ""))
            return sizes

        return self.run(walk)

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Content and ETag of a small blob; None if it is not there."""
        from azure.core.exceptions import ResourceNotFoundError

        async def get():
            try:
                stream = await self.client(name).download_blob(**blob.RETRIES)
                return await stream.readall(), stream.properties.etag
            except ResourceNotFoundError as error:
                if str(error.error_code) == "BlobNotFound":
                    return None
                raise

        return self.run(get, name)

    def upload(self, path: Path, name: str, sha256: str) -> None:
        """Upload one file; it appears when the last block is committed."""

        async def put():
            with open(path, "rb") as handle:
                await self.client(name).upload_blob(
                    handle, overwrite=True, metadata={"sha256": sha256}, max_concurrency=8, **blob.RETRIES
                )

        self.run(put, name)

    def swap(self, name: str, content: bytes, etag: str | None) -> bool:
        """Write a small blob if it is still the one with that ETag (None: if there is none); whether that was so."""
        from azure.core import MatchConditions
        from azure.core.exceptions import ResourceExistsError, ResourceModifiedError

        async def put():
            condition = {"etag": etag, "match_condition": MatchConditions.IfNotModified} if etag else {}
            try:
                await self.client(name).upload_blob(content, overwrite=bool(etag), **condition, **blob.RETRIES)
            except (ResourceModifiedError, ResourceExistsError):
                return False
            return True

        return self.run(put, name)


def as_bytes(value: dict) -> bytes:
    """Indented JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def describe(model: Path, metrics: Path | None) -> dict:
    """The manifest of a model folder: digest, metrics, and its files with sha256 and size in bytes.

    Raises:
        UserError: no such folder, nothing in it, or links and hidden files in it.
    """
    if not model.is_dir():
        raise UserError(f"{model}: no such folder. Build it with `snakemake --cores all {model}`.")
    names = files_of(model)
    if not names:
        raise UserError(f"{model}: an empty folder: nothing to publish.")
    files = {
        name: {"sha256": outputs.sha256(model / name), "size_bytes": (model / name).stat().st_size} for name in names
    }
    return {
        "digest": download.digest_of({name: file["sha256"] for name, file in files.items()}),
        "files": files,
        "metrics": json.loads(metrics.read_text(encoding="utf-8")) if metrics else None,
    }


def publish(store: Store, model: Path, manifest: dict, job: cli.Job) -> dict:
    """Upload what is missing, then move the pointer. Returns the receipt.

    Raises:
        UserError: no access, out of reach, or the pointer moved RACES times meanwhile.
    """
    digest, files = manifest["digest"], manifest["files"]
    there = store.sizes(digest)
    missing = [name for name, file in files.items() if there.get(name) != (file["size_bytes"], file["sha256"])]
    with job.progress(sum(files[name]["size_bytes"] for name in missing), "B") as bar:
        for name in missing:
            store.upload(model / name, f"{digest}/{name}", files[name]["sha256"])
            bar.update(files[name]["size_bytes"])
    content = as_bytes(manifest)
    if missing or MANIFEST not in there:
        whole = hashlib.sha256(content).hexdigest()
        if there.get(MANIFEST) != (len(content), whole) and not store.swap(f"{digest}/{MANIFEST}", content, None):
            job.log("the manifest is there already")
    for _ in range(RACES):
        now = store.read(POINTER)
        pointer = json.loads(now[0]) if now else {}
        before = pointer.get("digest")
        if before == digest:  # published before, perhaps with other scores
            before = pointer.get("previous")
        if pointer == manifest | {"previous": before}:
            break
        if store.swap(POINTER, as_bytes(manifest | {"previous": before}), now[1] if now else None):
            break
        job.say("someone else published at the same moment; looking again")
    else:
        raise UserError(
            f"{store.url}/{POINTER}: it moved {RACES} times meanwhile. The model is uploaded; run the same command again."
        )
    return {
        "url": f"{store.url}/{digest}",
        "digest": digest,
        "files": len(files),
        "size_bytes": sum(file["size_bytes"] for file in files.values()),
    }


def verify(store: Store, job: cli.Job) -> dict:
    """Download what the pointer or manifest names and compare every byte's sum and every size. Returns the manifest.

    Raises:
        UserError: no pointer there, or files that are missing, cut, changed or too many; all of them are named.
    """
    pointer = store.read(POINTER) or store.read(MANIFEST)
    if pointer is None:
        raise UserError(
            f"{store.url}: neither {POINTER} nor {MANIFEST} is there. Name what was published to, or its folder DIGEST."
        )
    try:
        manifest = json.loads(pointer[0])
        digest, files = manifest["digest"], manifest["files"]
        sums = {name: file["sha256"] for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{store.url}: the manifest is damaged. Publish again.") from None
    folder = "" if store.source.path.endswith(digest) else f"{digest}/"
    bad = [] if download.digest_of(sums) == digest else [f"the manifest's sums do not make its digest {digest}"]

    async def digest_of_blob(name: str) -> tuple[str, int]:
        whole, size = hashlib.sha256(), 0
        stream = await store.client(f"{folder}{name}").download_blob(max_concurrency=4, **blob.RETRIES)
        async for chunk in stream.chunks():
            whole.update(chunk)
            size += len(chunk)
        return whole.hexdigest(), size

    with job.progress(sum(file["size_bytes"] for file in files.values()), "B") as bar:
        for name, file in files.items():
            try:
                actual, size = store.run(functools.partial(digest_of_blob, name), name)
            except UserError as error:
                bad.append(str(error))
                continue
            if (actual, size) != (file["sha256"], file["size_bytes"]):
                bad.append(
                    f"{name}: {size} bytes with sha256 {actual}, expected {file['size_bytes']} with {file['sha256']}"
                )
            bar.update(file["size_bytes"])
    if bad:
        lines = "\n".join(f"  {line}" for line in bad)
        raise UserError(
            f"{store.url}: {len(bad)} of {len(files)} files are not what was published; publish again.\n{lines}"
        )
    return manifest
