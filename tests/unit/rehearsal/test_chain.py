"""The whole chain on a twin of each family, made from real configurations: train, merge, export, and the same logits."""

import pytest
import yaml
from tiny import make_tokenizer, write_params

from slmake import cli, params
from slmake.errors import UserError
from slmake.rehearsal import checks, twin
from tools import models

ENTRIES = yaml.safe_load(models.MODELS.read_text(encoding="utf-8"))
# Shorter windows and contexts than the real ones, so that a short prompt is longer: docs/models.md has the real lengths.
WINDOW = {"sliding_window": 64}
LONG_ROPE = {"original_max_position_embeddings": 128, "max_position_embeddings": 512}
# A model of each family, its changes, tokens of the prompts that are compared, and the builder's faults that are worked around.
FAMILIES = {
    "Llama 3.2 1B": ({}, [8, 40], []),
    "Phi-3-mini-4k": (WINDOW, [8, 40, 72, 96], ["uniform_window"]),
    "Phi-3.5-mini": (
        LONG_ROPE,
        [8, 40, 136, 160],
        ["long_window"],
    ),  # beyond the length at which its rotary factors change
    "Phi-4-mini": (LONG_ROPE, [8, 40, 136, 160], ["long_window"]),
    "Qwen2.5 0.5B": ({}, [8, 40], []),
    "Qwen3 0.6B": ({}, [8, 40], []),
    "Gemma 2 2B": (WINDOW, [8, 40, 72, 96], []),
    "Gemma 3 270M": (WINDOW, [8, 40, 72, 96], ["nested_rope"]),
    "SmolLM3 3B": ({}, [8, 40], ["layers_without_rope"]),
    "Mistral 7B v0.1": (WINDOW, [8, 40, 72, 96], ["uniform_window"]),
    "Granite 3.3 2B": ({}, [8, 40], []),
}


def configuration(name: str, **changes: int):
    return models.configuration(ENTRIES[name]["config"] | changes)


def everything(folder, **quantize) -> params.Params:
    """params.yaml with the stages that a twin runs, without calibration and products in 8 bits."""
    plain = {"calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None}
    file = write_params(folder / "params.yaml", quantize=plain | quantize, all={"stages": ["rehearse", *models.STAGES]})
    return params.load(file)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_chain_works_on_a_twin(tmp_path, dataset, tokenizer, name):
    changes, prompts, fixes = FAMILIES[name]
    base = tmp_path / "base"
    models.write_base(configuration(name, **changes), base, tokenizer)
    with cli.job("test") as job:
        passed = checks.rehearse(everything(tmp_path), base, dataset, tmp_path / "work", {}, job)
    assert passed["finetune"] == {"steps": 2}
    parity = passed["export"]["fp32_difference_by_prompt_tokens"]
    assert list(parity) == [str(length) for length in prompts]
    assert max(parity.values()) < 1e-3
    assert passed["export"]["graph"]["quantized_matmuls_by_bits"]["4"] > 0
    assert passed["export"]["graph"].get("builder_fixes", []) == fixes


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "gpt-oss-20b", "Mixtral 8x7B", "Phi-3.5-MoE"])
@pytest.mark.parametrize("stages", [["finetune"], ["quantize"]])
def test_mixtures_of_experts_are_refused_before_training(tmp_path, dataset, tokenizer, name, stages):
    """In one line, whether they were to be trained or exported."""
    settings = everything(tmp_path)
    settings = settings.model_copy(update={"all": settings.all.model_copy(update={"stages": stages})})
    models.write_base(configuration(name), tmp_path / "base", tokenizer)
    with pytest.raises(UserError, match=r"is a mixture of experts, which cannot be fine-tuned and exported") as caught:
        checks.rehearse(settings, tmp_path / "base", dataset, tmp_path / "work", {}, cli.Job("test", None, None))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_a_model_that_is_not_exported_needs_no_proof(tmp_path):
    """GPT-2's export was never compared; it may be trained all the same."""
    config = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 100}
    assert checks.mixture_of_experts(config) is None
    assert "was not proven to export right" in checks.unsupported(config)


def test_a_twin_has_a_layer_without_rotary_embeddings():
    """SmolLM3's fourth layer is the first without."""
    small = twin.shrink(configuration("SmolLM3 3B"))
    assert small.no_rope_layers == [1, 1, 1, 0]
    assert small.num_hidden_layers == len(small.layer_types) == 4


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *(
            ("Phi-3-mini-4k", 3.82),
            ("Phi-4-mini", 3.84),
            ("Phi-4", 14.66),
            ("Llama 3.2 1B", 1.24),
            ("Llama 3.2 3B", 3.21),
        ),
        *(
            ("Llama 3.1 8B", 8.03),
            ("Qwen2.5 0.5B", 0.494),
            ("Qwen2.5 7B", 7.62),
            ("Qwen3 0.6B", 0.596),
            ("Qwen3 8B", 8.19),
        ),
        *(("Gemma 2 2B", 2.61), ("Gemma 3 270M", 0.268), ("Gemma 3 1B", 1.0), ("Mistral 7B v0.3", 7.25)),
        *(("SmolLM2 135M", 0.135), ("SmolLM3 3B", 3.08), ("Granite 3.3 2B", 2.53), ("gpt-oss-20b", 20.9)),
    ],
)
def test_the_figures_give_the_published_number_of_parameters(name, billions):
    size = models.sizes(configuration(name))
    assert size.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert size.bfloat16 == 2 * size.parameters


@pytest.mark.parametrize("name", ["Phi-3-mini-4k", "SmolLM2 135M"])  # untied and tied
def test_the_estimated_size_is_the_exports(tmp_path, dataset, tokenizer, name):
    from transformers import AutoConfig

    models.write_base(configuration(name), tmp_path / "base", tokenizer)
    settings = everything(tmp_path)
    settings = settings.model_copy(update={"all": settings.all.model_copy(update={"stages": ["quantize"]})})
    with cli.job("test") as job:
        checks.rehearse(settings, tmp_path / "base", dataset, tmp_path / "work", {}, job)
    weights = (tmp_path / "work" / "asked" / "model.onnx.data").stat().st_size
    config = AutoConfig.from_pretrained(tmp_path / "work" / "twin")
    assert models.sizes(config).int4 == pytest.approx(weights, rel=0.02)


def test_the_page_has_every_model():
    """docs/models.md was written from the models that are in tools/models.yaml now."""
    page = (models.MODELS.parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    names = [name for name in rows if name not in ("model", "---")]
    assert sorted(names) == sorted(ENTRIES)
    for name, (_, _, fixes) in FAMILIES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} | "))
        assert row.endswith(f"| {', '.join(f'`{fix}`' for fix in fixes)} |")


def test_a_table_has_what_works_and_what_is_refused(tmp_path):
    settings = everything(tmp_path)
    size = models.Sizes(1_500_000_000, 3_000_000_000, 1_000_000_000)
    entries = {name: {"tokenizer": "BPE"} for name in ("good", "bad")}
    good = models.Trial(None, {"8": 1e-6, "4104": 2e-6}, ["long_window"], 0.01)
    page = models.page(settings, entries, {"good": (size, good), "bad": (size, models.Trial("no.", {}, [], None))})
    assert (
        "| good | BPE | 1.50 B | 3.00 GB | 1.00 GB | yes | yes | 2.0e-06 | 8, 4,104 | yes | 1.0e-02 | `long_window` |\n"
    ) in page
    assert page.endswith("| bad | BPE | 1.50 B | 3.00 GB | no. |\n")
