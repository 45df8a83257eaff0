"""Sources on a real blob server: pinned, resumed, checked, and without a credential in anything that is written."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from azurite import ACCOUNT
from tiny import make_model, make_rows, run_script, write_params

from slmake.outputs import folder_digest
from slmake.sources import blob
from slmake.sources.schemes import parse

pytestmark = pytest.mark.real


def upload(server, container: str, path: Path, name: str) -> str:
    """Put a file or a folder under `name`; returns the ETag of the last blob."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        target = name if path.is_file() else f"{name}/{file.relative_to(path).as_posix()}"
        with open(file, "rb") as handle:
            etag = server.client().get_blob_client(container, target).upload_blob(handle, overwrite=True)["etag"]
    return etag.strip('"')


def pinned(source: str) -> str:
    """What tools/pin.py prints."""
    done = run_script("tools.pin", source)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fetch(tmp_path: Path, source: str, **fields: object):
    """Run fetch_model; returns the finished process, the model's folder and the report."""
    section = {"source": source, "sha256": None, "dtype": "auto", **fields}
    params = write_params(tmp_path / "params.yaml", fetch_model=section)
    out, report = tmp_path / "build" / "base", tmp_path / "results" / "base.json"
    arguments = [
        "--params",
        params,
        "--output",
        out,
        "--report",
        report,
        "--log",
        tmp_path / "logs" / "fetch_model.log",
    ]
    done = run_script("fetch_model", *arguments, "--downloads", tmp_path / "build" / "downloads-model")
    return done, out, json.loads(report.read_text()) if report.exists() else None


def written(folder: Path) -> bytes:
    """Every byte below a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_model_folder_in_azure_blob(tmp_path, blob_server, container, base):
    upload(blob_server, container, base, "models/tiny")
    (tmp_path / "notes.md").write_text("not read")
    upload(blob_server, container, tmp_path / "notes.md", "models/tiny/README.md")
    source = pinned(f"az://{container}/models/tiny")
    done, out, report = fetch(tmp_path, source)
    assert done.returncode == 0, done.stderr
    for path in base.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert report["source"] == f"az://{container}/models/tiny"
    assert report["pin"] == {"etag": source.partition("#etag=")[2]}
    assert report["sha256"] == folder_digest(base)
    assert set(report["files"]) == {path.name for path in base.iterdir()}
    assert report["size_bytes"] == sum(path.stat().st_size for path in base.iterdir())
    assert not (tmp_path / "build" / "downloads-model").exists()
    assert blob_server.key.encode() not in written(tmp_path)


def test_changed_blob_no_longer_matches_its_pin_and_both_are_shown(tmp_path, blob_server, container, base):
    upload(blob_server, container, base, "tiny")
    source = pinned(f"az://{container}/tiny")
    changed = tmp_path / "config.json"
    changed.write_bytes((base / "config.json").read_bytes() + b"\n")
    upload(blob_server, container, changed, "tiny/config.json")
    now = pinned(f"az://{container}/tiny")
    done, out, _ = fetch(tmp_path, source)
    assert done.returncode == 1
    assert f"etag {now.partition('=')[2]}, expected {source.partition('=')[2]}" in done.stderr
    assert not out.exists()
    done, _, _ = fetch(tmp_path, f"az://{container}/tiny#sha256={folder_digest(base)}")
    assert done.returncode == 1
    assert f"expected {folder_digest(base)}" in done.stderr


def test_pickled_weights_in_azure_blob_are_refused_before_any_download(tmp_path, blob_server, container, base):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    upload(blob_server, container, copy, "tiny")
    done, out, _ = fetch(tmp_path, f"az://{container}/tiny#sha256={'0' * 64}")
    assert done.returncode == 1
    assert "weights are in pytorch_model.bin, a pickle format" in done.stderr
    assert "safe_serialization=True" in done.stderr
    assert not out.exists()


def test_unpinned_source_is_refused_with_the_command_that_pins_it(tmp_path):
    done, _, _ = fetch(tmp_path, "az://data/tiny")
    assert done.returncode == 1
    assert "`az://data/tiny` is not pinned" in done.stderr
    assert "python -m tools.pin 'az://data/tiny'" in done.stderr


def test_mlflow_folder_of_a_registry(tmp_path, blob_server, container, base):
    """Laid out as Azure Machine Learning's registries do: MLmodel one level down, model and tokenizer apart."""
    root = tmp_path / "mlflow" / "mlflow_model_folder"
    for name in ("data/model", "data/tokenizer"):
        (root / name).mkdir(parents=True)
    for path in base.iterdir():
        place = "data/tokenizer" if "token" in path.name or path.name.endswith(".jinja") else "data/model"
        shutil.copyfile(path, root / place / path.name)
    (root / "MLmodel").write_text(
        "flavors:\n  hftransformersv2:\n    task_type: text-generation\n  python_function: {}\n"
    )
    upload(blob_server, container, tmp_path / "mlflow", "registry/tiny")
    done, out, report = fetch(tmp_path, pinned(f"az://{container}/registry/tiny"))
    assert done.returncode == 0, done.stderr
    for path in base.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert "mlflow_model_folder/data/model/model.safetensors" in report["files"]


def test_dataset_in_azure_blob(tmp_path, blob_server, container, base):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(96)), encoding="utf-8")
    etag = upload(blob_server, container, rows, "data/rows.jsonl")
    source = pinned(f"az://{container}/data/rows.jsonl")
    assert source == f"az://{container}/data/rows.jsonl#etag={etag}"
    params = write_params(tmp_path / "params.yaml", prepare={"source": source})
    report = tmp_path / "dataset.json"
    done = run_script(
        "prepare", "--params", params, "--base", base, "--output", tmp_path / "dataset", "--report", report
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["source"]["train"] == {
        "source": f"az://{container}/data/rows.jsonl",
        "pin": {"etag": etag},
        "etag": etag,
        "sha256": hashlib.sha256(rows.read_bytes()).hexdigest(),
        "size_bytes": rows.stat().st_size,
    }


@pytest.mark.parametrize(
    ("connection", "reason"),
    [
        (lambda server: server.connection(key="d3Jvbmcga2V5" * 7 + "d3Jv"), "the credentials were refused"),
        (lambda server: server.connection(port=9), "the server cannot be reached or the connection broke"),
        (lambda server: "", "Azure Blob: no account. Set AZURE_STORAGE_CONNECTION_STRING"),
    ],
    ids=["wrong key", "no server", "no account"],
)
def test_what_is_wrong_with_the_account_is_told(tmp_path, blob_server, container, monkeypatch, connection, reason):
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection(blob_server))
    done, out, _ = fetch(tmp_path, f"az://{container}/tiny#etag=0x1")
    assert done.returncode == 1
    assert reason in done.stderr
    assert not out.exists()
    key = dict(part.partition("=")[::2] for part in connection(blob_server).split(";")).get("AccountKey", "no key")
    assert key not in done.stderr + (tmp_path / "logs" / "fetch_model.log").read_text()


def test_missing_container_and_missing_path_are_told(tmp_path, container):
    done, _, _ = fetch(tmp_path, "az://nowhere-at-all/tiny#etag=0x1")
    assert (
        "there is no container `nowhere-at-all`. Create it: `az storage container create --name nowhere-at-all`"
        in done.stderr
    )
    done, _, _ = fetch(tmp_path, f"az://{container}/tiny#etag=0x1")
    assert f"az://{container}/tiny: no such file or folder there." in done.stderr


def test_download_that_broke_for_good_goes_on_where_it_stopped(tmp_path, blob_server, container, proxy, monkeypatch):
    """The line is cut again and again after the first block: an error, what came is kept, and the next call brings only the rest."""
    model = make_model(tmp_path / "model")
    weights = model / "model.safetensors"
    upload(blob_server, container, weights, "w.safetensors")
    monkeypatch.setattr("slmake.sources.blob.BLOCK", 65536)
    monkeypatch.setattr("slmake.sources.download.ATTEMPTS", 2)
    monkeypatch.setattr("slmake.sources.blob.RETRIES", {"retry_total": 0})
    source = parse(f"az://{container}/w.safetensors", must_pin=False)

    class Bar:
        done = 0

        def update(self, count):
            self.done += count

    fs = blob.filesystem()
    (entry,) = blob.listing(fs, container, source.path)
    sizes = []
    original = proxy._strike
    proxy._strike = lambda: original() if len(sizes) else False
    target = tmp_path / "got" / "w.safetensors"
    target.parent.mkdir()
    (tmp_path / "got" / "w.safetensors.partial").write_bytes(weights.read_bytes()[: 3 * 65536])
    bar = Bar()
    blob.download_blob(fs, container, entry, target, "w", bar)
    assert bar.done == entry.size
    assert target.read_bytes() == weights.read_bytes()
    assert blob.etag_of([entry]) == entry.etag
    assert ACCOUNT
