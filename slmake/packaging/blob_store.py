"""Published models in Azure Blob: immutable folders by digest, and a pointer to the latest."""

import hashlib
import json
from pathlib import Path

from slmake import cli, outputs
from slmake.errors import UserError
from slmake.packaging.checksums import files_of
from slmake.sources import blob, download
from slmake.sources.blob import AzureBlob

POINTER = "latest.json"
MANIFEST = "manifest.json"  # beside the model's files, the pointer that was first set to them, without `previous`
RACES = 20  # how often the pointer may move under our hands
AGAIN = "publish again, where it was built: `.venv/bin/snakemake --cores all --force results/published.json`"


class Store:
    """A prefix in a container."""

    def __init__(self, source: AzureBlob):
        self.source = source
        self.fs = blob.filesystem(source.account)
        where = (
            f"abfs://{source.name}@{source.account}.dfs.core.windows.net" if source.account else f"az://{source.name}"
        )
        self.url = f"{where}/{source.path}"

    def client(self, name: str):
        """The Azure SDK's client of one blob below the prefix."""
        return self.fs.service_client.get_blob_client(self.source.name, f"{self.source.path}/{name}")

    def run(self, request, name: str = ""):
        """Wait for a request; its errors become UserErrors."""
        try:
            return blob.run(self.fs, request)
        except Exception as error:
            raise blob.explain(error, f"{self.url}/{name}".rstrip("/")) from None

    def sizes(self, folder: str) -> dict[str, tuple[int, str]]:
        """Size and uploaded SHA-256 of the blobs below a folder ("", or with `/` at its end), by name."""

        async def walk():
            sizes, start = {}, f"{self.source.path}/{folder}"
            container = self.fs.service_client.get_container_client(self.source.name)
            async for item in container.list_blobs(start, include=["metadata"], **blob.RETRIES):
                metadata = item.metadata or {}
                if not metadata.get("hdi_isfolder"):  # where the account has folders, they are listed, too
                    sizes[item.name.removeprefix(start)] = (item.size, metadata.get("sha256", ""))
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

    def content_of(self, name: str) -> tuple[int, str]:
        """Size and SHA-256 of all that a blob has, downloaded."""

        async def get():
            whole, size = hashlib.sha256(), 0
            stream = await self.client(name).download_blob(max_concurrency=4, **blob.RETRIES)
            async for chunk in stream.chunks():
                whole.update(chunk)
                size += len(chunk)
            return size, whole.hexdigest()

        return self.run(get, name)

    def upload(self, path: Path, name: str, sha256: str) -> None:
        """Upload one file; it appears when the last block is committed, and has its SHA-256 when what was sent is compared with it.

        Raises:
            UserError: out of reach, or the file has another content by now.
        """
        changed = f"{path} was changed while publish read it; {POINTER} was not moved. Run the same command again."

        async def put():
            with open(path, "rb") as handle:
                sent, blob_of = Hashing(handle), self.client(name)
                size = path.stat().st_size
                await blob_of.upload_blob(sent, length=size, overwrite=True, max_concurrency=8, **blob.RETRIES)
            if sent.sum.hexdigest() != sha256:
                await blob_of.delete_blob(**blob.RETRIES)
                return False
            await blob_of.set_blob_metadata({"sha256": sha256}, **blob.RETRIES)
            return True

        if not (path.is_file() and self.run(put, name)):
            raise UserError(changed)

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


class Hashing:
    """A file that is read once, from its start, and the SHA-256 of what was read."""

    def __init__(self, handle):
        self.handle, self.sum = handle, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        content = self.handle.read(size)
        self.sum.update(content)
        return content


def as_bytes(value: dict) -> bytes:
    """Indented JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_object(content: bytes) -> dict:
    """A JSON object; an empty one, if it is damaged."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def is_of(content: bytes, manifest: dict) -> bool:
    """Whether what is there is the manifest of the same files; they may have been measured again."""
    there = read_object(content)
    return all(there.get(key) == manifest[key] for key in ("digest", "files"))


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
    there = store.sizes(f"{digest}/")
    missing = [name for name, file in files.items() if there.get(name) != (file["size_bytes"], file["sha256"])]
    with job.progress(sum(files[name]["size_bytes"] for name in missing), "B") as bar:
        for name in missing:
            store.upload(model / name, f"{digest}/{name}", files[name]["sha256"])
            bar.update(files[name]["size_bytes"])
    now = store.read(f"{digest}/{MANIFEST}")
    whole = now and is_of(now[0], manifest)
    if not whole and not store.swap(f"{digest}/{MANIFEST}", as_bytes(manifest), now[1] if now else None):
        job.log("someone else wrote the manifest at the same moment")
    for _ in range(RACES):
        now = store.read(POINTER)
        pointer = read_object(now[0]) if now else {}
        if now and not pointer:
            job.say(f"{POINTER} is damaged: it is written anew, without the digest that was latest before")
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
        "account": store.source.account or blob.account_here(),
        "digest": digest,
        "files": len(files),
        "size_bytes": sum(file["size_bytes"] for file in files.values()),
    }


def verify(store: Store, job: cli.Job) -> dict:
    """Download what the pointer or manifest names and compare every byte's sum and every size. Returns the manifest.

    Raises:
        UserError: no pointer there, out of reach, or files that are missing, cut, changed or too many; all of them are named.
    """
    pointer = store.read(POINTER) or store.read(MANIFEST)
    if pointer is None:
        raise UserError(
            f"{store.url}: neither {POINTER} nor {MANIFEST} is there. Name what was published to, or its folder DIGEST."
        )
    manifest = read_object(pointer[0])
    try:
        digest, files = manifest["digest"], manifest["files"]
        right = {name: (file["size_bytes"], file["sha256"]) for name, file in files.items()}
        made = download.digest_of({name: sha256 for name, (_, sha256) in right.items()})
        total = sum(size for size, _ in right.values())
        folder = "" if store.source.path.endswith(digest) else f"{digest}/"
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{store.url}: the manifest is damaged; {AGAIN}.") from None
    bad = [] if made == digest else [f"the manifest's sums do not make its digest {digest}"]
    there = store.sizes(folder)
    kept = store.read(f"{folder}{MANIFEST}")
    if not (kept and is_of(kept[0], manifest)):
        bad.append(f"{MANIFEST}: not that of these files")
    bad += [f"{name}: not among the files that were published" for name in sorted(there.keys() - {*files, MANIFEST})]
    with job.progress(total, "B") as bar:
        for name, (size, sha256) in right.items():
            if name not in there:
                bad.append(f"{name}: missing")
                continue
            size_there, sha256_there = store.content_of(f"{folder}{name}")
            if (size_there, sha256_there) != (size, sha256):
                bad.append(f"{name}: {size_there} bytes with sha256 {sha256_there}, expected {size} with {sha256}")
            bar.update(size)
    if bad:
        lines = "\n".join(f"  {line}" for line in bad)
        raise UserError(
            f"{store.url}/{folder}: not what was published. Delete the blobs that are named below; then {AGAIN}.\n{lines}"
        )
    return manifest
