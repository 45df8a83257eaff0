"""adapters of every kind that PEFT's LoRA has, and of other trainers: the merge is `merge_and_unload`, bit for bit in float32."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from merge_script import edited, load, logits, refused, run, tensors_of
from safetensors.torch import load_file
from tiny import make_model

from slmake.merging import merge as merge_module

BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A Llama with a tied head, and a Qwen2 with an untied one and biases; do not write into them."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "tied": make_model(folder / "tied", tie_word_embeddings=True),
        "untied": make_model(folder / "untied", "qwen2", tie_word_embeddings=False),
    }


def trained(base: Path, folder: Path, rows: int | None = None, **config: object):
    """An adapter all of whose parameters differ from their first values, as training leaves them; returns PEFT's model."""
    from peft import LoraConfig, get_peft_model

    model = load(base)
    if rows:
        model.resize_token_embeddings(rows)
    torch.manual_seed(13)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"], **config}
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for value in peft.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape) * 0.05)
    peft.save_pretrained(folder)
    return peft


KINDS = {
    "rank stabilization": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "DoRA": {"use_dora": True},
    "DoRA, rank stabilization, patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
}
UNTIED = {
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "modules_to_save": {"modules_to_save": BOTH},
    "modules_to_save of many parts": {"modules_to_save": ["mlp", "layers.0.self_attn"], "target_modules": ["q_proj"]},
    "modules_to_save by the end of a name": {"modules_to_save": ["norm"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [3, 511], "lm_head": [3, 7, 100]}},
    "LoRA of embedding and head": {"target_modules": ["q_proj", *BOTH]},
    "DoRA of embedding and head": {"target_modules": ["q_proj", *BOTH], "use_dora": True},
    "resized vocabulary": {"modules_to_save": BOTH, "rows": 530},
    "smaller vocabulary": {"modules_to_save": BOTH, "rows": 500},
}
# The head stays tied: PEFT trains both as one.
TIED = {
    "trained tokens": {"trainable_token_indices": [3, 511]},
    "modules_to_save": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "resized vocabulary": {"rows": 530},
    "new tokens": {"rows": 530, "trainable_token_indices": [512, 513, 529]},
}
CASES = [(base, name, config) for base in ("tied", "untied") for name, config in KINDS.items()]
CASES += [("untied", name, config) for name, config in UNTIED.items()]
CASES += [("tied", name, config) for name, config in TIED.items()]


@pytest.mark.parametrize("piece", [merge_module.PIECE, 2500], ids=["whole", "by rows"])
@pytest.mark.parametrize(("base", "name", "config"), CASES, ids=[f"{base}: {name}" for base, name, _ in CASES])
def test_merge_equals_merge_and_unload_bit_for_bit(tmp_path, monkeypatch, bases, base, name, config, piece):
    monkeypatch.setattr(merge_module, "PIECE", piece)
    peft = trained(bases[base], tmp_path / "adapter", **config)
    before = logits(peft)
    folder = run(tmp_path, bases[base], tmp_path / "adapter")
    merged, expected = tensors_of(folder), peft.merge_and_unload().state_dict()
    assert merged.keys() == tensors_of(bases[base]).keys()
    for key, value in merged.items():
        assert torch.equal(value, expected[key]), key
    torch.testing.assert_close(logits(load(folder)), before, rtol=0, atol=1e-4)
    columns = min(512, before.shape[-1])
    assert (before[..., :columns] - logits(load(bases[base]))[..., :columns]).abs().max() > 0.01
    settings = json.loads((folder / "config.json").read_text())
    assert settings["vocab_size"] == config.get("rows", 512)
    assert settings["tie_word_embeddings"] == (base == "tied")


# Every product with a square weight, which fits both ways.
CONV = {
    "square": {"target_modules": ["attn.c_proj"]},
    "all": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "DoRA": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
}


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("config", CONV.values(), ids=CONV.keys())
def test_layers_of_gpt2_hold_their_weights_transposed_whatever_the_flag(tmp_path, bases, config, flag):
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4)).save_pretrained(base)
    for path in bases["tied"].glob("token*"):
        shutil.copyfile(path, base / path.name)
    peft = trained(base, tmp_path / "made", **config)
    adapter = edited(tmp_path / "made", tmp_path / "adapter", fan_in_fan_out=flag)
    merged, expected = tensors_of(run(tmp_path, base, adapter)), peft.merge_and_unload().state_dict()
    for key, value in merged.items():
        assert torch.equal(value, expected[key]), key


def test_fan_in_fan_out_over_linear_layers_is_ignored_as_in_peft(tmp_path, bases):
    """q_proj is square, so that both ways fit."""
    peft = trained(bases["tied"], tmp_path / "made")
    adapter = edited(tmp_path / "made", tmp_path / "adapter", fan_in_fan_out=True)
    merged, expected = tensors_of(run(tmp_path, bases["tied"], adapter)), peft.merge_and_unload().state_dict()
    for key, value in merged.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("shape", [(), (64,), (2, 2, 2)])
def test_saved_module_with_other_dimensions_is_refused(tmp_path, capsys, bases, shape):
    def reshape(tensors):
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(shape)

    trained(bases["untied"], tmp_path / "made", modules_to_save=BOTH)
    message = refused(tmp_path, capsys, bases["untied"], edited(tmp_path / "made", tmp_path / "adapter", reshape))
    assert f"the adapter's model.embed_tokens.weight has the shape {list(shape)}, the base's [512, 64]." in message


# An adapter on one of two tied matrices, or on each in another way: PEFT's sum goes to both.
UNTIES = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": BOTH},
    "LoRA of the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA of both": {"target_modules": ["q_proj", *BOTH]},
    "resized, head saved": {"modules_to_save": ["lm_head"], "rows": 530},
}


@pytest.mark.parametrize("config", UNTIES.values(), ids=UNTIES.keys())
@pytest.mark.parametrize("sharded", [False, True])
def test_a_tied_head_that_changes_in_another_way_gets_weights_of_its_own(tmp_path, bases, config, sharded):
    """The merged model is the base with the adapter, which `merge_and_unload` is not."""
    base = bases["tied"]
    if sharded:
        base = make_model(tmp_path / "base", shards="150KB", tie_word_embeddings=True)
    peft = trained(base, tmp_path / "adapter", **config)
    folder = run(tmp_path, base, tmp_path / "adapter")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    merged = tensors_of(folder)
    assert merged.keys() == tensors_of(base).keys() | {"lm_head.weight"}
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    torch.testing.assert_close(logits(load(folder)), logits(peft), rtol=0, atol=1e-4)
    if sharded:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == merged.keys()
        assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in merged.values())


def test_lora_on_tied_weights_that_peft_keeps_tied(tmp_path, bases):
    """`ensure_weight_tying`: the head's update is the embedding's, so it is added once."""
    config = {"target_modules": ["q_proj", *BOTH], "ensure_weight_tying": True}
    peft = trained(bases["tied"], tmp_path / "adapter", **config)
    folder = run(tmp_path, bases["tied"], tmp_path / "adapter")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    torch.testing.assert_close(logits(load(folder)), logits(peft), rtol=0, atol=1e-4)


def test_dora_over_a_bfloat16_base_is_summed_in_float32_and_rounded_once(tmp_path, bases):
    half = tmp_path / "half"
    load(bases["tied"]).bfloat16().save_pretrained(half)
    wide = tmp_path / "wide"
    load(half, torch.float32).save_pretrained(wide)
    peft = trained(wide, tmp_path / "adapter", use_dora=True)
    merged, expected = tensors_of(run(tmp_path, half, tmp_path / "adapter")), peft.merge_and_unload().state_dict()
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].bfloat16()), name


# -- folders of other trainers -----------------------------------------------------------------------------------------

TRAINERS = {
    "Unsloth": (
        {
            "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
            "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj)).*?",
            "base_model_name_or_path": "unsloth/tiny-bnb-4bit",
            "peft_version": "0.18.0",
        },
        {"README.md": "---\nbase_model: x\n---", "tokenizer.json": None, "tokenizer_config.json": None},
    ),
    "Axolotl": (
        {"qalora_group_size": 16, "eva_config": None, "corda_config": None, "lora_bias": False, "revision": None},
        {"config.json": "{}", "optimizer.pt": "pickle", "trainer_state.json": "{}", "training_args.bin": "pickle"},
    ),
    "TRL": (
        {"task_type": "CAUSAL_LM", "trainable_token_indices": None, "inference_mode": True, "use_qalora": False},
        {"chat_template.jinja": "{{ messages }}", "training_args.bin": "pickle", "tokenizer.json": None},
    ),
    "LLaMA-Factory": (
        {"loftq_config": {}, "megatron_config": None, "layers_pattern": None, "layer_replication": None},
        {"all_results.json": "{}", "trainer_log.jsonl": "{}", "training_loss.png": "", "adapter_model.bin": "pickle"},
    ),
}


@pytest.mark.parametrize("names", ["as PEFT writes them", "with the adapter's name"])
@pytest.mark.parametrize(("config", "files"), TRAINERS.values(), ids=TRAINERS.keys())
def test_folders_of_other_trainers_are_read(tmp_path, bases, config, files, names):
    peft = trained(bases["tied"], tmp_path / "plain")

    def rename(tensors):
        if names != "as PEFT writes them":
            for key in list(tensors):
                tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    adapter = edited(tmp_path / "plain", tmp_path / "adapter", rename, **config)
    for name, text in files.items():
        (adapter / name).write_text((bases["tied"] / name).read_text() if text is None else text)
    folder = run(tmp_path, bases["tied"], adapter)
    expected = peft.merge_and_unload().state_dict()
    for key, value in tensors_of(folder).items():
        assert torch.equal(value, expected[key]), key
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (folder / name).read_bytes() == (bases["tied"] / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in bases["tied"].iterdir())


def with_tokens(base: Path, folder: Path, *tokens: str) -> Path:
    """Write the base's tokenizer with more tokens into a folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


def test_tokenizer_of_a_resized_vocabulary_comes_with_it(tmp_path, bases):
    from transformers import AutoTokenizer

    trained(bases["tied"], tmp_path / "adapter", rows=530)
    with_tokens(bases["tied"], tmp_path / "adapter", "<|new|>")
    folder = run(tmp_path, bases["tied"], tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(folder)("<|new|>")["input_ids"] == [
        len(AutoTokenizer.from_pretrained(bases["tied"]))
    ]
    assert load(folder).get_input_embeddings().weight.shape == (530, 64)


@pytest.mark.parametrize("config", [{}, {"trainable_token_indices": [511]}, {"modules_to_save": BOTH}])
def test_new_tokens_in_spare_rows_are_refused(tmp_path, capsys, config):
    """The merged model has the base's tokenizer, which would cut them into pieces; a token for padding stands in no text."""
    base = make_model(tmp_path / "base", vocab_size=520)
    trained(base, tmp_path / "adapter", **config)
    tokenizer = with_tokens(base, tmp_path / "adapter", "<|pad|>") / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "pad_token": "<|pad|>"}))
    run(tmp_path, base, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "build" / "merged")
    with_tokens(base, tmp_path / "adapter", "<|tool|>")
    message = refused(tmp_path, capsys, base, tmp_path / "adapter")
    assert "has the token '<|tool|>' with the number " in message
    assert "the merged model would read it in pieces. Copy the adapter's tokenizer.json" in message


def test_tokens_without_an_embedding_are_refused(tmp_path, capsys, bases):
    trained(bases["tied"], tmp_path / "adapter")
    with_tokens(bases["tied"], tmp_path / "adapter", *(f"<|{i}|>" for i in range(300)))
    message = refused(tmp_path, capsys, bases["tied"], tmp_path / "adapter")
    assert "the adapter's tokenizer has the token " in message
    assert "the base's has 512 rows, and none is in the adapter." in message


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_pickled_adapter_is_refused(tmp_path, capsys, bases):
    trained(bases["tied"], tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    message = refused(tmp_path, capsys, bases["tied"], tmp_path / "adapter")
    assert "the weights are in adapter_model.bin, a pickle format, which can run code when it is read." in message


OTHER = {
    "width": (
        {"hidden_size": 96},
        {},
        "the adapter's update of model.layers.0.mlp.down_proj.weight is (64, 128), the weight is (96, 128)",
    ),
    "vocabulary": (
        {"vocab_size": 520},
        {"target_modules": ["embed_tokens"]},
        "the vocabulary has other sizes in the embedding and in the output head",
    ),
    "saved module": (
        {"hidden_size": 96},
        {"modules_to_save": BOTH},
        "lm_head.weight has the shape (512, 64), the base's (512, 96)",
    ),
    "trained tokens": (
        {"vocab_size": 500},
        {"trainable_token_indices": [511]},
        "the adapter's 1 trained tokens do not fit model.embed_tokens.weight with the shape (500, 64)",
    ),
    "layers": (
        {"num_hidden_layers": 1},
        {},
        "the base model has no tensor model.layers.1.mlp.down_proj.weight (3 of the",
    ),
}


@pytest.mark.parametrize(("sizes", "config", "text"), OTHER.values(), ids=OTHER.keys())
def test_adapter_of_another_base_is_refused_with_both_names(tmp_path, capsys, bases, sizes, config, text):
    trained(bases["untied"], tmp_path / "made", **config)
    adapter = edited(tmp_path / "made", tmp_path / "adapter", base_model_name_or_path="org/tiny")
    other = make_model(tmp_path / "other", "qwen2", tie_word_embeddings=False, **sizes)
    message = refused(tmp_path, capsys, other, adapter)
    assert text in message
    assert f"The adapter {adapter} was trained on org/tiny; {other} is of the type qwen2." in message


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}, {"use_dora": True}]
)
def test_adapter_with_nan_is_refused(tmp_path, capsys, bases, config):
    def spoil(tensors):
        name = next(name for name in tensors if "lora_A" not in name and "lora_B" not in name)
        tensors[name].view(-1)[3] = float("nan")

    trained(bases["untied"], tmp_path / "made", **config)
    adapter = edited(tmp_path / "made", tmp_path / "adapter", spoil)
    message = refused(tmp_path, capsys, bases["untied"], adapter)
    assert " values that are not finite" in message or " values are not finite" in message


def test_convolutions_are_refused(tmp_path, capsys, bases):
    trained(bases["tied"], tmp_path / "made")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    adapter = edited(
        tmp_path / "made", tmp_path / "adapter", lambda tensors: tensors.update({name: torch.zeros(4, 64, 1, 1)})
    )
    assert f"tensor {name} has the shape [4, 64, 1, 1]" in refused(tmp_path, capsys, bases["tied"], adapter)


def test_unknown_tensor_is_refused(tmp_path, capsys, bases):
    trained(bases["tied"], tmp_path / "made")
    adapter = edited(
        tmp_path / "made", tmp_path / "adapter", lambda tensors: tensors.update({"transformer.w": torch.zeros(4)})
    )
    assert "tensor transformer.w is of no kind that PEFT's LoRA writes" in refused(
        tmp_path, capsys, bases["tied"], adapter
    )


def test_quantized_adapter_is_refused(tmp_path, capsys, bases):
    trained(bases["tied"], tmp_path / "made")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    adapter = edited(
        tmp_path / "made",
        tmp_path / "adapter",
        lambda tensors: tensors.update({name: torch.zeros(4, 64, dtype=torch.int8)}),
    )
    assert f"tensor {name} is of type I8;" in refused(tmp_path, capsys, bases["tied"], adapter)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_saved_modules_of_another_type_are_cast_to_the_bases(tmp_path, bases, kind):
    trained(bases["untied"], tmp_path / "made", modules_to_save=BOTH)
    before = load_file(tmp_path / "made" / "adapter_model.safetensors")

    def cast(tensors):
        for name, value in tensors.items():
            tensors[name] = value.to(kind)

    adapter = edited(tmp_path / "made", tmp_path / "adapter", cast)
    merged = tensors_of(run(tmp_path, bases["untied"], adapter))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert merged[name].dtype == torch.float32
        assert torch.equal(merged[name], before[f"base_model.model.{name}"].to(kind).float())
