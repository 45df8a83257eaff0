"""Families: every proven one exports right, and others are refused before anything is exported."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from slmake import params
from slmake.export import builder, builder_fixes, families
from slmake.generation import Exported
from slmake.scoring import onnx_runner

SIZES = tiny.SIZES | {"vocab_size": 520}
WIDE = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 128
PHI3 = {"original_max_position_embeddings": 512}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.01 * i for i in range(8)],
    "long_factor": [2 + 0.1 * i for i in range(8)],
}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
TWINS = {
    "llama": ("Llama", {"attention_bias": True, "rope_parameters": LLAMA3}),
    "llama-tied": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "max_position_embeddings": 16384}),
    "mistral-window": ("Mistral", {"sliding_window": 64}),
    "phi3-window": ("Phi3", {**PHI3, "sliding_window": 64}),
    "phi3-beyond": ("Phi3", {**PHI3, "sliding_window": 1024}),  # a window longer than the context
    "phi3-long": ("Phi3", {"original_max_position_embeddings": 128, "rope_parameters": LONG}),
    "phi4-mini": ("Phi3", {**PHI3, **WIDE, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "phi3-head": ("Phi3", {**PHI3, **WIDE, "vocab_size": 512}),  # q, k and v together have as many outputs as the head
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN, "max_position_embeddings": 16384}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 6}),
    "gemma3-linear": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 6, "rope_parameters": NESTED}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),  # the fourth layer has no rotary embedding
    "granite": ("Granite", {"attention_multiplier": 0.25, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    "ernie": ("Ernie4_5", {}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16}),
    "lfm2": ("Lfm2", {}),
}
# Longer than a window of 64, and than the original context of 128.
LENGTHS = (10, 100, 200)


def make_twin(name: str, folder: Path):
    """A small random model of a family, in `folder`; returns the transformers model."""
    import transformers

    kind, changes = TWINS[name]
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    tiny.make_tokenizer(folder)
    return model


def export(model: Path, folder: Path, **options: object) -> Path:
    folder.mkdir(parents=True)
    section = params.Quantize(**{"precision": "fp32", "algo_config": "rtn", "matmul_mixed_precision": None, **options})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.export(section, model, folder, folder.parent / "cache")
    return folder


def difference(model, folder: Path) -> float:
    """The largest difference of logits between transformers and the export, in spreads of the logits: after prompts of several
    lengths, and after three more tokens."""
    import onnxruntime_genai as og

    largest, exported = 0.0, og.Model(str(folder))
    for length in LENGTHS:
        settings = og.GeneratorParams(exported)
        settings.set_search_options(max_length=max(length + 8, 100))
        generator = og.Generator(exported, settings)
        generator.append_tokens(np.random.default_rng(length).integers(2, 500, length).astype(np.int32))
        steps = [np.array(generator.get_logits()).reshape(-1)]
        for _ in range(3):
            generator.generate_next_token()
            steps.append(np.array(generator.get_logits()).reshape(-1))
        ids = torch.tensor(np.array(generator.get_sequence(0))[: length + 3].astype(np.int64))[None]
        with torch.no_grad():
            expected = model(ids).logits[0, length - 1 :].numpy()
        largest = max(largest, float(np.abs(np.stack(steps)[: len(expected)] - expected).max() / expected.std()))
    return largest


@pytest.mark.parametrize("name", TWINS)
def test_logits_are_transformers(tmp_path, name):
    model = make_twin(name, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert families.unsupported(config) is None
    assert difference(model, export(tmp_path / "model", tmp_path / "onnx")) < 1e-3


@pytest.mark.parametrize(
    ("name", "whole"), [("llama", []), ("mistral-window", [100]), ("gemma3", [100]), ("lfm2", [10, 100])]
)
def test_other_answers_are_scored_where_the_runtime_cannot_rewind(tmp_path, monkeypatch, name, whole):
    """ONNX Runtime GenAI cannot for LFM2, nor behind a prompt that is longer than a sliding window."""
    model = make_twin(name, tmp_path / "model")
    exported = Exported(export(tmp_path / "model", tmp_path / "onnx"))
    read, again = exported.generator, []
    monkeypatch.setattr(exported, "generator", lambda prompt, *more: again.append(len(prompt)) or read(prompt, *more))
    for length in (10, 100):
        prompt = np.random.default_rng(length).integers(2, 500, length).tolist()
        row = onnx_runner.OnnxRow(exported, prompt, 6)
        tokens = exported.generate(prompt, 4, row.look, row.room)
        again.pop()
        for answer in ([9, 11, 13, 17, 19, 23], [30, 31, 32], [*tokens[:2], 40]):
            with torch.no_grad():
                expected = model(torch.tensor([prompt + answer[:-1]])).logits[0, length - 1 :].numpy()
            found = np.stack(row.logits(answer, tokens))
            assert np.abs(found - expected).max() / expected.std() < 1e-3
    assert sorted(set(again)) == whole


def test_every_proven_family_has_a_twin():
    import transformers

    kinds = {getattr(transformers, f"{kind}Config") for kind, _ in TWINS.values()}
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    assert {known[kind].__name__ for kind in kinds} == set(families.PROVEN)


# The twin that a fix is for, and what happens without it.
NEEDED = {
    "output_head": ("phi3-head", None),
    "uniform_window": ("mistral-window", "total_sequence_length must equal"),
    "long_window": ("phi3-beyond", r"must be at least local_window_size \(1024\)"),
    "layers_without_rope": ("smollm3", "KeyError: 'position_ids'"),
    "scaled_rope": ("llama-linear", None),
    "nested_rope": ("gemma3", "KeyError: 'rope_type'"),
}


@pytest.mark.parametrize("name", builder_fixes.FIXES)
def test_fix_is_needed(tmp_path, monkeypatch, name):
    """Without it the export fails, or its logits are wrong. Where this test fails, remove the fix."""
    others = [fix for fix in builder_fixes.FIXES if fix != name]
    monkeypatch.setattr(builder, "fixed", lambda module: builder_fixes.fixed(module, others))
    twin, message = NEEDED[name]
    model = make_twin(twin, tmp_path / "model")
    if message is None:
        assert difference(model, export(tmp_path / "model", tmp_path / "onnx")) > 1e-2
        return
    with pytest.raises(Exception, match=message):
        difference(model, export(tmp_path / "model", tmp_path / "onnx"))


def test_fixes_are_undone():
    from onnxruntime_genai.models import builder as module

    before = {fix: getattr(getattr(module, fix[0]), fix[1]) for fixes in builder_fixes.FIXES.values() for fix in fixes}

    def fail() -> None:
        with builder_fixes.fixed(module):
            assert all(getattr(getattr(module, fix[0]), fix[1]) is not method for fix, method in before.items())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(getattr(getattr(module, fix[0]), fix[1]) is method for fix, method in before.items())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "is a mixture of experts"),
        ({"architectures": ["PhimoeForCausalLM"], "num_local_experts": 16}, "is a mixture of experts"),
        ({"architectures": ["GptOssForCausalLM"], "num_local_experts": 32}, "is a mixture of experts"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "is a mixture of experts"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256}, "is a mixture of experts"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel was not proven"),
        ({"architectures": ["MadeUpForCausalLM"]}, "MadeUpForCausalLM was not proven"),
        ({"architectures": []}, "the architecture none was not proven"),
        ({"architectures": None}, "the architecture none was not proven"),
        ({"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "su"}}, "rope_type su cannot be exported"),
    ],
    ids=str,
)
def test_other_models_are_refused_in_one_line(config, reason):
    message = families.unsupported(config)
    assert reason in message
    assert "\n" not in message
