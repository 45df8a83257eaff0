"""fetch_model: a damaged, foreign or hostile model gives one clear error and nothing on the disk."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
from fetch_script import change, fetch, refused
from tiny import write_gguf

# -- folders that are refused ------------------------------------------------------------------------------------------


def test_missing_folder_lists_the_kinds_of_sources(tmp_path, capsys):
    message = refused(tmp_path, capsys, tmp_path / "nowhere")
    assert f"{tmp_path}/nowhere: no such file or folder." in message
    assert "hf:ORG/NAME@REVISION" in message


def test_a_trainers_folder_that_has_only_checkpoints_names_them(tmp_path, capsys):
    for step in (100, 200):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{step}" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "run" / "logs").mkdir()
    message = refused(tmp_path, capsys, tmp_path / "run")
    assert "run: nothing that can be read is there. Name one of its folders: checkpoint-100, checkpoint-200." in message


def test_a_pipe_is_refused_unread(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", Path("/dev/zero")):
        assert f"{path}: a pipe or a device, not a file." in refused(tmp_path, capsys, path)


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
        b'{"__metadata__": null}',
        b'{"__metadata__": "pt"}',
        b'{"__metadata__": {"format": ["pt"]}}',
    ],
    ids=[
        *("text", "no offsets", "number", "not utf-8", "list", "no dtype", "other shape", "backwards"),
        *("no metadata", "metadata a text", "metadata of lists"),
    ],
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


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_quantized_weights_are_refused_by_their_method(tmp_path, capsys, broken, method, dtype):
    change(broken, "config.json", quantization_config={"quant_method": method})
    message = refused(tmp_path, capsys, broken, dtype=dtype)
    assert f"{broken}/config.json: quantization_config says that the weights are quantized ({method})" in message
    assert "the repository of the same name without -FP8" in message


def test_quantized_text_part_is_refused_and_an_empty_mark_is_not(tmp_path, capsys, broken):
    change(broken, "config.json", quantization_config=None)
    fetch(tmp_path, broken)
    change(broken, "config.json", text_config={"quantization_config": {}})
    (tmp_path / "again").mkdir()
    assert "(by an unnamed method)" in refused(tmp_path / "again", capsys, broken)


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


@pytest.mark.parametrize("rows", [None, 3])
def test_tensor_in_two_shards_is_refused(tmp_path, capsys, sharded, rows):
    """Of the same shape or another one."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    (name, value), *_ = load_file(first).items()
    save_file({**load_file(second), name: value[:rows].clone()}, second, metadata={"format": "pt"})
    message = refused(tmp_path, capsys, folder)
    assert f"{folder}: tensor {name} is in {first.name} and in {second.name}; which one belongs" in message


@pytest.mark.parametrize("kind", ["another shard", "no shard"])
def test_index_that_does_not_fit_its_shards_is_refused(tmp_path, capsys, sharded, kind):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, place = next(iter(content["weight_map"].items()))
    other = next(file for file in content["weight_map"].values() if file != place)
    if kind == "no shard":
        name, where = "model.lost.weight", "no shard has it"
    else:
        where = f"it is in {place}"
    content["weight_map"][name] = other
    index.write_text(json.dumps(content))
    message = refused(tmp_path, capsys, folder)
    assert f"{index}: it says that tensor {name} is in {other}, but {where}." in message


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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "notes/queue"])
@pytest.mark.timeout(10)
def test_a_pipe_within_a_model_folder_is_refused_unread(tmp_path, capsys, broken, name):
    (broken / "notes").mkdir()
    (broken / name).unlink(missing_ok=True)
    os.mkfifo(broken / name)
    assert f"{broken / name}: a pipe, a socket or a device, not a file." in refused(tmp_path, capsys, broken)


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


@pytest.mark.parametrize(
    "fields",
    [
        {"max_position_embeddings": 10**8},
        {"max_position_embeddings": float("inf")},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10**9}},
    ],
)
@pytest.mark.timeout(10)
def test_a_context_longer_than_any_models_is_refused_at_once(tmp_path, capsys, broken, fields):
    change(broken, "config.json", **fields)
    message = refused(tmp_path, capsys, broken)
    assert "position_embeddings is " in message
    assert "more than any model reads; at most 16,777,216 are accepted" in message


def test_the_longest_context_of_a_real_model_is_accepted(tmp_path, broken):
    change(broken, "config.json", max_position_embeddings=10_485_760)
    fetch(tmp_path, broken)


@pytest.mark.timeout(10)
def test_a_gguf_with_a_context_longer_than_any_models_is_refused(tmp_path, capsys, gguf_file):
    content, path = bytearray(gguf_file.read_bytes()), tmp_path / "long.gguf"
    at = content.index(b"llama.context_length") + len("llama.context_length") + 4  # behind the type
    content[at : at + 4] = struct.pack("<I", 10**8)
    path.write_bytes(content)
    assert f"{path}: llama.context_length is 100,000,000 tokens" in refused(tmp_path, capsys, path)


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
