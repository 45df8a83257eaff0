"""publish on a real blob server: once, twice, two at a time, in the middle of faults; and --verify, which finds every changed byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import run_script, write_params

from slmake.cli import Job
from slmake.errors import UserError
from slmake.outputs import folder_digest
from slmake.packaging import blob_store
from slmake.sources import blob
from slmake.sources.schemes import parse

pytestmark = pytest.mark.real


def make_exported(folder: Path, text: str = "one") -> Path:
    """A folder that stands for an exported model: 5 MB of weights, a configuration, a file in a sub-folder."""
    (folder / "sub").mkdir(parents=True)
    (folder / "model.onnx.data").write_bytes(text.encode() * (5_000_000 // len(text)))
    (folder / "genai_config.json").write_text(json.dumps({"model": text}))
    (folder / "sub" / "tokenizer.json").write_text("{}")
    (folder / ".snakemake_timestamp").touch()
    return folder


def arguments(tmp_path: Path, container: str, model: Path, name: str = "published") -> list:
    params = write_params(tmp_path / f"{name}.yaml", publish={"url": f"az://{container}/models/tones"})
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"int4": {"accuracy": 0.75}}')
    return ["--params", params, "--model", model, "--metrics", metrics, "--output", tmp_path / f"{name}.json"]


def blobs(server, container: str) -> dict[str, tuple[str, object]]:
    """ETag and time of every blob."""
    names = server.client().get_container_client(container).list_blobs()
    return {blob.name: (blob.etag, blob.last_modified) for blob in names}


def pointer(server, container: str) -> dict:
    return json.loads(server.client().get_blob_client(container, "models/tones/latest.json").download_blob().readall())


def test_published_model_verifies_and_the_same_bytes_upload_nothing(tmp_path, blob_server, container):
    model = make_exported(tmp_path / "model")
    digest = folder_digest(model)
    done = run_script("publish", *arguments(tmp_path, container, model))
    assert done.returncode == 0, done.stderr
    receipt = json.loads((tmp_path / "published.json").read_text())
    assert receipt["url"] == f"az://{container}/models/tones/{digest}"
    assert receipt["account"] == "slmaketest"
    latest = pointer(blob_server, container)
    assert latest["digest"] == digest
    assert latest["previous"] is None
    assert latest["metrics"] == {"int4": {"accuracy": 0.75}}
    assert set(latest["files"]) == {"model.onnx.data", "genai_config.json", "sub/tokenizer.json"}
    before = blobs(blob_server, container)
    assert set(before) == {f"models/tones/{digest}/{name}" for name in [*latest["files"], "manifest.json"]} | {
        "models/tones/latest.json"
    }
    again = run_script("publish", *arguments(tmp_path, container, model, "again"))
    assert again.returncode == 0, again.stderr
    assert blobs(blob_server, container) == before
    for url in (f"az://{container}/models/tones", f"az://{container}/models/tones/latest.json", receipt["url"]):
        verified = run_script("publish", "--verify", url)
        assert verified.returncode == 0, verified.stderr
        assert "3 files, 5 MB: every byte is right" in verified.stderr


def test_the_same_model_with_other_scores_moves_the_pointer(tmp_path, blob_server, container):
    """The bytes were published before; what was measured since is said, and the chain stays."""
    model = make_exported(tmp_path / "model")
    for number, accuracy in enumerate((0.75, 0.5, 0.5)):
        command = arguments(tmp_path, container, model, str(number))
        path = tmp_path / "metrics.json"
        path.write_text(json.dumps({"int4": {"accuracy": accuracy}}))
        done = run_script("publish", *command)
        assert done.returncode == 0, done.stderr
        latest = pointer(blob_server, container)
        assert latest["metrics"] == {"int4": {"accuracy": accuracy}}
        assert latest["previous"] is None


def test_a_file_that_changes_while_it_is_published_is_not_published(tmp_path, blob_server, container):
    """Not even its blob stays: the next one who has these bytes would take it for theirs."""
    url, job = f"az://{container}/models/tones", Job("publish", sys.stderr, None)
    store = blob_store.Store(parse(url, must_pin=False))
    model = make_exported(tmp_path / "model")
    blob_store.publish(store, model, blob_store.describe(model, None), job)
    before = pointer(blob_server, container)
    (model / "model.onnx.data").write_bytes(b"two" * 30_000_000)  # of more than one block
    manifest = blob_store.describe(model, None)
    with open(model / "model.onnx.data", "r+b") as handle:
        handle.seek(80_000_000)
        handle.write(b"x")
    with pytest.raises(
        UserError, match=r"model.onnx.data was changed while publish read it; latest.json was not moved"
    ):
        blob_store.publish(store, model, manifest, job)
    assert pointer(blob_server, container) == before
    assert f"models/tones/{manifest['digest']}/model.onnx.data" not in blobs(blob_server, container)
    blob_store.publish(store, model, blob_store.describe(model, None), job)
    assert pointer(blob_server, container)["previous"] == before["digest"]
    blob_store.verify(store, job)


DAMAGE = {  # which blob, and what the message says of it
    **dict.fromkeys(("flip", "cut", "flip, with its metadata"), ("DIGEST/model.onnx.data", "model.onnx.data: ")),
    "delete": ("DIGEST/model.onnx.data", "model.onnx.data: missing"),
    "one more": ("DIGEST/sub/more.json", "sub/more.json: not among the files that were published"),
    "manifest": ("DIGEST/manifest.json", "manifest.json: not that of these files"),
    "pointer": ("latest.json", "the manifest is damaged; publish again"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_a_damaged_blob_and_publishing_again_mends_it(tmp_path, blob_server, container, damage):
    store, job = (
        blob_store.Store(parse(f"az://{container}/models/tones", must_pin=False)),
        Job("publish", sys.stderr, None),
    )
    model = make_exported(tmp_path / "model")
    manifest = blob_store.describe(model, None)
    blob_store.publish(store, model, manifest, job)
    place, said = DAMAGE[damage]
    path = f"models/tones/{place.replace('DIGEST', folder_digest(model))}"
    damaged = blob_server.client().get_blob_client(container, path)
    content = bytearray(b"{}" if damage == "one more" else damaged.download_blob().readall())
    content[len(content) // 2] ^= "flip" in damage
    if damage == "delete":
        damaged.delete_blob()
    else:
        metadata = damaged.get_blob_properties().metadata if "metadata" in damage else None  # as a disk flips it
        damaged.upload_blob(bytes(content[: None if "flip" in damage else -9]), overwrite=True, metadata=metadata)
    with pytest.raises(UserError) as refused:
        blob_store.verify(store, job)
    assert said in str(refused.value)
    if damage in ("one more", "flip, with its metadata"):
        assert "Delete the blobs that are named below; then publish again" in str(refused.value)
        damaged.delete_blob()
    blob_store.publish(store, model, manifest, job)
    assert blob_store.verify(store, job) == manifest | {"previous": None}


def test_two_publishers_at_once_lose_nothing(tmp_path, blob_server, container):
    """Both models are whole afterwards, the pointer names one, and the chain of `previous` leads to the other."""
    models = [make_exported(tmp_path / name, name) for name in ("first", "other")]
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "scripts.publish",
                *map(str, arguments(tmp_path, container, model, model.name)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for model in models
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    latest = pointer(blob_server, container)
    digests = {folder_digest(model) for model in models}
    assert {latest["digest"], latest["previous"]} == digests
    for digest in digests:
        assert run_script("publish", "--verify", f"az://{container}/models/tones/{digest}").returncode == 0


def test_an_upload_that_another_publisher_of_the_same_file_broke_says_so(tmp_path, blob_server, container, monkeypatch):
    """The server forgets the blocks of one as soon as the other's are a blob."""
    url, job = f"az://{container}/models/tones", Job("publish", sys.stderr, None)
    store, model = blob_store.Store(parse(url, must_pin=False)), make_exported(tmp_path / "model")
    (model / "model.onnx.data").write_bytes(b"two" * 30_000_000)  # of more than one block
    manifest, reads = blob_store.describe(model, None), []
    theirs = blob_server.client().get_blob_client(container, f"models/tones/{manifest['digest']}/model.onnx.data")

    class Slow(blob_store.Hashing):
        def read(self, size=-1):
            reads.append(content := super().read(size))
            if not content or self.handle.tell() == 90_000_000:
                with open(model / "model.onnx.data", "rb") as handle:
                    theirs.upload_blob(handle, overwrite=True)
            return content

    with monkeypatch.context() as patch:
        patch.setattr(blob_store, "Hashing", Slow)
        with pytest.raises(
            UserError, match=r"model.onnx.data: someone else changed it meanwhile. Run the same command"
        ):
            blob_store.publish(store, model, manifest, job)
    assert len(reads) > 1
    blob_store.publish(store, model, manifest, job)
    blob_store.verify(store, job)


def test_pointer_that_moved_meanwhile_is_read_again(tmp_path, blob_server, container, monkeypatch):
    """Exactly between reading and writing, somebody else's pointer appears: the condition fails, and theirs becomes `previous`."""
    model = make_exported(tmp_path / "model")
    store = blob_store.Store(parse(f"az://{container}/models/tones", must_pin=False))
    theirs, swaps = {"digest": "f" * 64}, []
    original = store.swap

    def swap(name, content, etag):
        if name == blob_store.POINTER:
            swaps.append(etag)
            if len(swaps) == 1:
                blob_server.client().get_blob_client(container, "models/tones/latest.json").upload_blob(
                    json.dumps(theirs)
                )
        return original(name, content, etag)

    monkeypatch.setattr(store, "swap", swap)
    blob_store.publish(store, model, blob_store.describe(model, None), Job("publish", sys.stderr, None))
    assert swaps[0] is None
    assert len(swaps) == 2
    assert pointer(blob_server, container)["previous"] == "f" * 64


def test_cut_in_the_middle_leaves_the_old_pointer_and_the_next_run_finishes(tmp_path, blob_server, container, proxy):
    old, new = make_exported(tmp_path / "old", "old"), make_exported(tmp_path / "new", "new")
    assert run_script("publish", *arguments(tmp_path, container, old)).returncode == 0
    proxy.cut_up = 1_000_000
    failed = run_script("publish", *arguments(tmp_path, container, new, "new"))
    assert failed.returncode == 1
    assert "it resumes where it stopped" in failed.stderr
    # Bounded: each of our attempts sends the PUT twice, because aiohttp repeats an idempotent request once by itself when
    # the connection breaks (aiohttp/client.py, "retry_persistent_connection"; RFC 9112, 9.3.1).
    assert proxy.hits == 2 * blob.ATTEMPTS
    assert blob_server.key not in failed.stderr
    assert not (tmp_path / "new.json").exists()
    assert pointer(blob_server, container)["digest"] == folder_digest(old)
    proxy.well()
    done = run_script("publish", *arguments(tmp_path, container, new, "new"))
    assert done.returncode == 0, done.stderr
    assert pointer(blob_server, container)["digest"] == folder_digest(new)
    assert pointer(blob_server, container)["previous"] == folder_digest(old)
    assert run_script("publish", "--verify", f"az://{container}/models/tones").returncode == 0


def test_publish_without_a_place_is_refused(tmp_path):
    done = run_script(
        "publish", "--params", write_params(tmp_path / "p.yaml"), "--model", tmp_path, "--output", tmp_path / "o.json"
    )
    assert done.returncode == 1
    assert "publish.url in params.yaml says nowhere to publish to" in done.stderr
