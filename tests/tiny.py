"""Tiny models and data sets, made on the spot, and ways to run the project's scripts."""

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TONES = ("sadness", "joy", "fear", "surprise")
PHRASES = {
    "sadness": ["We buried the old dog under the pear tree", "Nobody came to her birthday", "The house is empty now"],
    "joy": ["The scan is clear and we danced in the car park", "She said yes on the bridge", "Our team won the cup"],
    "fear": ["Someone is trying the handle of the back door", "The brakes do not answer", "He counts the steps above"],
    "surprise": ["The quiet clerk was the owner all along", "A camel stood in the lobby", "You are my examiner?"],
}


def make_rows(count: int) -> list[dict]:
    """Distinct labelled rows, evenly spread over the four tones."""
    places = ["at home", "in town", "by the sea", "after dusk", "on Sunday", "before noon", "in the rain", "upstairs"]
    rows = []
    for i in range(count):
        tone = TONES[i % 4]
        phrase = PHRASES[tone][(i // 4) % 3]
        rows.append({"phrase": f"{phrase} {places[(i // 12) % 8]}, number {i} of {7 * i + 3}", "tone": tone})
    return rows


def write_params(path: Path, **changes: object) -> Path:
    """The project's params.yaml with `section={field: value}` replaced."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, fields in changes.items():
        content[section].update(fields)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with an end token and a chat template, trained on the test phrases."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"### Text: {row['phrase']}\n### The tone is:\n{row['tone']}" for row in make_rows(200)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)


def make_model(folder: Path, architecture: str = "llama", shards: str = "50GB", **overrides: object) -> Path:
    """A tiny model of a real architecture with seeded random weights, and its tokenizer, in Hugging Face layout."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "pad_token_id": 0,
        **overrides,
    }
    if architecture == "phi3":  # as in Phi-3-mini-4k; otherwise the exporter takes it for the long-context kind
        sizes.setdefault("original_max_position_embeddings", sizes["max_position_embeddings"])
    config = {"llama": LlamaConfig, "phi3": Phi3Config, "qwen2": Qwen2Config}[architecture](**sizes)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=shards)
    make_tokenizer(folder)
    return folder


def run_script(
    name: str, *arguments: object, cwd: Path | None = None, **options: object
) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user does; output is captured as text."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, **options)
