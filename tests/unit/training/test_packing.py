"""strategy packing: whole rows fill sequences, and the loss and gradients are those of the rows one by one."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tiny import make_rows, write_params

from scripts import finetune, prepare
from slmake.scoring.questions import Questions
from slmake.training import shared_prefix
from slmake.training.data import Data, by_length
from slmake.training.model import Head, loss_sum

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 16}
ARCHITECTURES = {  # class of the configuration, what it needs besides, and whether attention goes by layout
    "llama": ("LlamaConfig", {}, True),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 512}, True),
    "qwen3": ("Qwen3Config", HEADS, True),
    "smollm3": ("SmolLM3Config", {}, True),
    "gemma3": ("Gemma3TextConfig", {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 64}, True),
    "mistral with a short window": ("MistralConfig", {"sliding_window": 12}, False),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}, True),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, False),
}  # fmt: skip


def rows_of_all_lengths(count: int) -> list[dict]:
    """From a few tokens to the longest that fits 128."""
    rows = make_rows(count)
    return [
        {**row, "phrase": " ".join([row["phrase"]] * (1 + i % 5 // 4 * 2))[: 12 + 37 * (i % 7)]}
        for i, row in enumerate(rows)
    ]


def prepared(folder: Path, base: Path, strategy: str, count: int = 60, **fields: object) -> Path:
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows_of_all_lengths(count)), encoding="utf-8")
    section = {
        "source": str(folder / "rows.json"),
        "strategy": strategy,
        "max_seq_len": 128,
        "near_duplicate_threshold": 1.0,
    }
    section |= {"eval_fraction": 0.1, "test_fraction": 0.1, **fields}
    file = write_params(folder / "params.yaml", all={"stages": ["finetune"]}, prepare=section)
    paths = ["--params", file, "--base", base, "--output", folder / "dataset", "--report", folder / "report.json"]
    prepare.main([str(part) for part in paths])
    return folder / "dataset"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, base) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packing")
    return {name: prepared(folder / name, base, name) for name in ("line-by-line", "packing")}


def read(dataset: Path, split: str = "train") -> list[dict]:
    return pyarrow.parquet.read_table(dataset / f"{split}.parquet").to_pylist()


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_every_row_is_there_once_and_whole(datasets, split):
    """The same rows as line by line, in sequences that are nearly full; test stays line by line."""
    rows = {row["row"]: (row["input_ids"], row["labels"]) for row in read(datasets["line-by-line"], split)}
    sequences, seen = read(datasets["packing"], split), {}
    if split == "test":
        assert sequences == read(datasets["line-by-line"], split)
        return
    for sequence in sequences:
        assert sum(sequence["row_lengths"]) == len(sequence["input_ids"]) <= 128
        start = 0
        for number, length in zip(sequence["rows"], sequence["row_lengths"], strict=True):
            assert number not in seen
            seen[number] = tuple(sequence[name][start : start + length] for name in ("input_ids", "labels"))
            start += length
    assert seen == rows
    tokens = sum(len(ids) for ids, _ in rows.values())
    assert len(sequences) <= np.ceil(tokens / 128) + 1


def test_every_row_of_a_sequence_is_a_question(datasets):
    """evaluate and the quantization search ask the same rows as line by line, by the same tokens."""
    asked = {name: Questions(folder, None, ("train",)) for name, folder in datasets.items()}
    known = {
        row: (prompt.tolist(), answer, expected)
        for row, prompt, answer, expected in zip(
            *(getattr(asked["line-by-line"], name) for name in ("rows", "prompts", "answers", "expected")), strict=True
        )
    }
    packed = asked["packing"]
    assert sorted(packed.rows) == sorted(known)
    for i, row in enumerate(packed.rows):
        assert (packed.prompts[i].tolist(), packed.answers[i], packed.expected[i]) == known[row]
    assert len(Questions(datasets["packing"], 7, ("eval", "train")).rows) == 7


def test_packing_is_the_same_every_time(datasets, base, tmp_path):
    again = prepared(tmp_path / "again", base, "packing")
    assert (again / "train.parquet").read_bytes() == (datasets["packing"] / "train.parquet").read_bytes()


def model_of(kind: str, extra: dict):
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, kind)(**{**SIZES, **extra})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def one_by_one(model, dataset: Path) -> torch.Tensor:
    """The plain sum of cross entropies, row by row, without any of our code."""
    loss = torch.zeros((), dtype=torch.float64)
    for row in read(dataset):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
    return loss


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_rows_one_by_one(datasets, name):
    """In float64; also where the model must be given padded batches, since its layers look at neighbours or a short window."""
    kind, extra, by_layout = ARCHITECTURES[name]
    model = model_of(kind, extra)
    wanted = one_by_one(model, datasets["line-by-line"])
    wanted.backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    limit = shared_prefix.share(model)
    limit = limit if limit and shared_prefix.agrees(model, 512, torch.device("cpu")) else 0
    data = Data(datasets["packing"] / "train.parquet")
    assert (data.needed.max() <= limit) == by_layout
    chosen = np.arange(len(data.sequence_lengths))
    head, total, count = Head(model), 0.0, 0
    for batch in np.array_split(chosen, 3):
        loss, targets = loss_sum(model, head, data, batch, torch.device("cpu"), limit)
        loss.backward()
        total, count = total + loss.item(), count + targets
    assert count == sum(label != -100 for row in read(datasets["line-by-line"]) for label in row["labels"])
    if not by_layout:
        whole, _ = loss_sum(model, head, data, chosen, torch.device("cpu"), limit, one_pass=True)
        assert whole.item() == pytest.approx(wanted.item(), rel=1e-7)
    # transformers' norms round to float32 inside, whatever the model's type.
    assert total == pytest.approx(wanted.item(), rel=1e-7)
    for key, gradient in gradients.items():
        found = dict(model.named_parameters())[key].grad
        torch.testing.assert_close(found, gradient, rtol=0, atol=2e-6 * float(gradient.abs().max()), msg=key)


def test_join_is_another_loss(datasets, base, tmp_path):
    """Rows of `join` read those before them: what packing must not do."""
    model = model_of(*ARCHITECTURES["llama"][:2])
    alone = one_by_one(model, datasets["line-by-line"]).item()
    joined = Data(prepared(tmp_path / "join", base, "join") / "train.parquet")
    assert not joined.packed
    loss, _ = loss_sum(model, Head(model), joined, np.arange(len(joined)), torch.device("cpu"), 0)
    assert abs(loss.item() - alone) > 1e-4 * alone


def test_groups_of_similar_length():
    lengths = np.array([10, 100, 9, 70, 66, 3])
    assert [group.tolist() for group in by_length(lengths)] == [[1, 3], [4], [0, 2], [5]]
    assert [group.tolist() for group in by_length(np.array([4, 4]))] == [[0, 1]]


def test_training_counts_the_same_tokens(datasets, base, tmp_path):
    """A whole run over packed rows: steps by sequences, the loss falls, the curve is that of the answers' tokens."""
    section = {
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 4,
        "eval_steps": 0,
        "logging_steps": 1,
        "learning_rate": 5e-3,
    }
    file = write_params(tmp_path / "params.yaml", finetune=section, prepare={"strategy": "packing"})
    paths = {"params": file, "base": base, "dataset": datasets["packing"], "output": tmp_path / "adapter"}
    paths |= {
        "train-loss": tmp_path / "train.csv",
        "eval-loss": tmp_path / "eval.csv",
        "checkpoints": tmp_path / "checkpoints",
    }
    finetune.main([str(part) for name, path in paths.items() for part in (f"--{name}", path)])
    lines = (tmp_path / "train.csv").read_text(encoding="utf-8").splitlines()[1:]
    sequences = len(read(datasets["packing"]))
    assert len(lines) == 3 * int(np.ceil(sequences / 4))
    losses = [float(line.split(",")[2]) for line in lines]
    assert losses[-1] < 0.95 * losses[0]


def test_questions_of_packed_rows(datasets):
    """Parity asks the last row of a packed sequence alone."""
    questions = Questions(datasets["packing"])
    questions.extend_for_parity(20)
    rows = {
        tuple(row["input_ids"]) for split in ("train", "eval", "test") for row in read(datasets["line-by-line"], split)
    }
    assert len(questions.rows) > questions.scored
    for prompt, answer in zip(questions.prompts, questions.answers, strict=True):
        assert (*prompt.tolist(), *answer) in rows


def test_packing_needs_no_padding(base, tmp_path, refused):
    message = refused(prepared, tmp_path / "run", base, "packing", pad_to_max_len=True)
    assert "pad_to_max_len goes without strategy packing, whose sequences are not padded" in message
