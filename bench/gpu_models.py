"""What `bench.cuda` works on, made from seeds: models with a tokenizer, tokenized rows, and the section `finetune`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slmake import params

RANK = 16
SPECIAL, END = 3, 2  # ids of padding, start and end come first
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Separate and fused projections, tied weights, norms of queries and keys, capped logits with sliding windows.
ARCHITECTURES = {
    "llama": SMALL,
    "phi3": SMALL | {"original_max_position_embeddings": 512},
    "qwen3": SMALL | {"tie_word_embeddings": True, "head_dim": 16},
    "gemma2": SMALL | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
}
# Phi-3-mini's shapes, without its sliding window of 2,047 tokens: rows of 4,596 are measured.
PHI3_MINI = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Workload:
    """Rows of one length to train on.

    Attributes:
        length: the largest number of tokens of a row, without the instruction; the smallest is three quarters of it.
        instruction: tokens that all rows begin with.
        batch: rows of a step.
    """

    length: int
    instruction: int
    batch: int

    @property
    def name(self) -> str:
        behind = f" behind {self.instruction} shared" if self.instruction else ""
        return f"rows of {self.length} tokens{behind}"


def workloads(lengths: list[int], instruction: int, tokens: int) -> list[Workload]:
    """Every length without and with an instruction, in steps of about `tokens` tokens; an instruction is shared by two rows or more."""
    plain = [Workload(length, 0, max(1, tokens // length)) for length in lengths]
    return plain + [Workload(length, instruction, max(2, tokens // (instruction + length))) for length in lengths]


def section(batch: int, steps: int, **changes: object) -> params.Finetune:
    """The section `finetune` of a run without evaluation or checkpoints of its own."""
    fields = {"lora_r": RANK, "lora_alpha": 2 * RANK, "per_device_train_batch_size": batch, "max_steps": steps}
    return params.Finetune(**fields | {"eval_steps": 0, "save_steps": 10**6} | changes)


def write_model(folder: Path, kind: str, sizes: dict, dtype, device) -> Path:
    """A model of random weights, made on the device, with a tokenizer of one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(7)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **sizes, **ids), dtype=dtype, trust_remote_code=False
        )
    model.save_pretrained(folder)
    words = models.WordLevel({f"w{number}": number for number in range(sizes["vocab_size"])}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0").save_pretrained(folder)
    return folder


def draw_rows(count: int, length: int, instruction: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of random rows; a quarter of a row's own tokens, at most 32, have a label."""
    draw = np.random.default_rng([7, length, instruction])
    shared = draw.integers(SPECIAL, vocabulary, instruction).tolist()
    rows = []
    for _ in range(count):
        own = draw.integers(SPECIAL, vocabulary, draw.integers(3 * length // 4, length + 1)).tolist()
        answer = max(1, min(32, len(own) // 4))
        rows.append((shared + own, [-100] * (instruction + len(own) - answer) + own[-answer:]))
    return rows


def _table(rows: list[tuple[list[int], list[int]]], **columns: list):
    """Rows as the pipeline's tokenized splits hold them."""
    import pyarrow

    kind = pyarrow.list_(pyarrow.int32())
    ids, labels = (pyarrow.array([row[part] for row in rows], kind) for part in (0, 1))
    return pyarrow.table({"row": list(range(len(rows))), "input_ids": ids, "labels": labels, **columns})


def write_dataset(folder: Path, rows: list[tuple[list[int], list[int]]]) -> Path:
    """Rows as the tokenized dataset that training reads, with an empty eval split."""
    import pyarrow.parquet

    folder.mkdir(parents=True)
    table = _table(rows)
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), folder / "eval.parquet")
    return folder


def write_questions(folder: Path, count: int, length: int, instruction: int, vocabulary: int) -> Path:
    """A test split of random prompts with an instruction that all share, and four labels of two tokens."""
    import pyarrow.parquet

    folder.mkdir(parents=True)
    labels = {f"w{number} w{number + 1}": [number, number + 1, END] for number in (10, 20, 30, 40)}
    names = [list(labels)[number % len(labels)] for number in range(count)]
    prompts = [ids for ids, _ in draw_rows(count, length, instruction, vocabulary)]
    rows = [(ids + labels[name], [-100] * len(ids) + labels[name]) for ids, name in zip(prompts, names, strict=True)]
    texts = [" ".join(f"w{token}" for token in ids) for ids in prompts]
    pyarrow.parquet.write_table(_table(rows, prompt=texts, answer=names), folder / "test.parquet")
    longest = max(map(len, labels.values()))
    form = {"prompt": "{text} ", "answer": "{label}", "fields": ["text", "label"], "labels": list(labels)}
    form |= {"end_token_id": END, "longest_answer_tokens": longest}
    (folder / "prompt.json").write_text(json.dumps(form), encoding="utf-8")
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
