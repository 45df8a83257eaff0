"""Models are measured without a dataset, on the fixed texts: perplexity, parity, latency; what is written, and what gates read."""

import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tiny import make_model, write_params
from transformers import AutoModelForCausalLM

from scripts import evaluate, gates, prepare, quantize
from slmake.scoring import transformers_runner
from slmake.scoring.metrics import parity
from slmake.scoring.questions import Questions

KL, RATIO = {"metric": "kl_mean", "maximum": 1.0}, {"metric": "perplexity", "maximum_ratio": 1.5, "against": "base"}


def run(script, params, **arguments) -> None:
    script.main(
        ["--params", str(params), *(str(part) for item in arguments.items() for part in (f"--{item[0]}", item[1]))]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """A folder with params.yaml without a dataset, the texts in dataset/, and the tiny base in onnx/, scored."""
    folder = tmp_path_factory.mktemp("texts")
    params = write_params(
        folder / "params.yaml",
        prepare=None,
        all={"stages": ["quantize", "evaluate", "gates"]},
        quantize={"int8_nodes": ["*/attn/*"]},
        gates={"min_accuracy": None, "max_accuracy_drop": None, "checks": [KL, RATIO]},
    )
    run(prepare, params, base=base, output=folder / "dataset", report=folder / "dataset.json")
    run(quantize, params, model=base, dataset=folder / "dataset", output=folder / "onnx")
    score(folder, folder, base)
    return folder


def score(folder, target, base) -> None:
    names = {"metrics": "metrics.json", "benchmark": "benchmark.json", "predictions": "predictions.csv"}
    files = {argument: target / name for argument, name in names.items()}
    run(evaluate, folder / "params.yaml", dataset=folder / "dataset", base=base, onnx=folder / "onnx", **files)


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def expected(base, dataset) -> tuple[float, list[np.ndarray]]:
    """Perplexity and compared logits of the base, computed in a pass per text."""
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = pyarrow.parquet.read_table(dataset / "test.parquet").to_pylist()
    losses, logits = [], []
    for row in rows:
        start = sum(label == -100 for label in row["labels"])
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            before = model(ids[None]).logits[0, start - 1 : -1]
        losses += torch.nn.functional.cross_entropy(before, ids[start:], reduction="none").tolist()
        logits.append(before[np.linspace(0, len(before) - 1, 25).astype(int)].numpy())
    return float(np.exp(np.mean(losses))), logits


def test_figures_of_every_model(folder, base):
    metrics, (perplexity, _) = read(folder / "metrics.json"), expected(base, folder / "dataset")
    assert (metrics["test_rows"], metrics["texts"]) == (0, 20)
    assert metrics["base"].keys() == metrics["int4"].keys() == {"perplexity", "size_bytes"}
    assert metrics["base"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert metrics["int4"]["perplexity"] == pytest.approx(perplexity, rel=0.05)
    assert metrics["parity"]["int4_vs_base"]["prompts"] == 500
    assert 0 < metrics["parity"]["int4_vs_base"]["kl_mean"] < 0.05
    assert metrics["parity"]["tokenizer"]["rows"] == 20
    assert "drop" not in metrics
    timings = read(folder / "benchmark.json")
    assert timings["int4"]["latency_ms_p50"] > 0
    assert timings["base"]["latency_ms_p50"] > 0
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 20
    assert {"expected", "base", "int4", "prompt"} <= rows[0].keys()


def test_logits_of_texts_that_do_not_fit_into_one_pass_are_the_same(folder, base, monkeypatch):
    """A large vocabulary, a full sliding window or a recurrent state: a text is then read by itself."""
    wanted = np.vstack(expected(base, folder / "dataset")[1])
    questions = Questions(folder / "dataset")
    for chunk in (transformers_runner.CHUNK, 1):
        monkeypatch.setattr(transformers_runner, "CHUNK", chunk)
        answers = transformers_runner.TransformersRunner(base, 8).ask(questions, 4, Silent(), "base")
        assert np.abs(np.vstack(answers.logits) - wanted).max() < 1e-4
        assert parity(wanted, np.vstack(answers.logits))["kl_mean"] == 0.0


class Silent:
    """A job whose progress nobody reads."""

    def progress(self, *_):
        from tqdm import tqdm

        return tqdm(disable=True)


def test_metrics_are_the_same_in_every_run(folder, base, tmp_path):
    score(folder, tmp_path, base)
    for name in ("metrics.json", "predictions.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_gates_on_these_figures(folder, tmp_path, refused):
    files = {"metrics": folder / "metrics.json", "benchmark": folder / "benchmark.json"}
    run(gates, folder / "params.yaml", **files, output=tmp_path / "gates.json")
    judged = {gate["metric"]: gate for gate in read(tmp_path / "gates.json")["gates"]}
    assert judged.keys() == {"kl_mean", "perplexity", "tokenizer_differences"}
    assert judged["perplexity"]["against"] == "base"
    assert judged["perplexity"]["value"] == pytest.approx(1.0, abs=0.05)
    strict = write_params(
        tmp_path / "params.yaml",
        prepare=None,
        all={"stages": ["quantize", "evaluate", "gates"]},
        gates={"min_accuracy": None, "max_accuracy_drop": None, "checks": [KL | {"maximum": 0.0}]},
    )
    message = refused(run, gates, strict, **files, output=tmp_path / "strict.json")
    assert "1 of 2 gates missed" in message
    assert not (tmp_path / "strict.json").exists()


def test_damaged_metrics_are_refused(folder, tmp_path, refused):
    metrics = read(folder / "metrics.json")
    del metrics["texts"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    files = {"metrics": tmp_path / "metrics.json", "output": tmp_path / "gates.json"}
    assert "`metrics` has no `texts`" in refused(run, gates, folder / "params.yaml", **files)


def test_calibration_with_the_texts_differs_from_none(folder, base, tmp_path):
    """GPTQ on the texts changes 4-bit weights (that they are those it chose is checked by quantize itself)."""
    plain = write_params(
        tmp_path / "params.yaml",
        prepare=None,
        all={"stages": ["quantize"]},
        quantize={"int8_nodes": ["*/attn/*"], "calibration": "none"},
        gates={"min_accuracy": None, "max_accuracy_drop": None},
    )
    run(quantize, plain, model=base, output=tmp_path / "onnx")
    assert (tmp_path / "onnx/model.onnx.data").read_bytes() != (folder / "onnx/model.onnx.data").read_bytes()


def test_positions_are_spread_over_a_text(folder):
    questions = Questions(folder / "dataset")
    places = questions.positions(0)
    assert (len(places), places[0], places[-1]) == (25, 0, len(questions.answers[0]) - 1)
    assert places == sorted(set(places))
    before = len(questions.rows)
    questions.extend_for_parity(64)  # the train split has the same texts
    assert len(questions.rows) == before == questions.compared == 20


def test_a_model_with_a_begin_token(tmp_path_factory, tmp_path):
    """The runtime reads the tokens of training, the begin token included, although the chat template writes it itself."""
    from tokenizers.processors import TemplateProcessing

    from slmake.data.tokenize import load_tokenizer

    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    tokenizer = load_tokenizer(base)
    tokenizer.bos_token = "<|start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    tokenizer.save_pretrained(base)
    params = write_params(
        tmp_path / "params.yaml",
        prepare=None,
        all={"stages": ["quantize", "evaluate"]},
        quantize={"int8_nodes": ["*/attn/*"], "calibration": "none"},
        gates={"min_accuracy": None, "max_accuracy_drop": None},
    )
    run(prepare, params, base=base, output=tmp_path / "dataset", report=tmp_path / "dataset.json")
    run(quantize, params, model=base, output=tmp_path / "onnx")
    form = read(tmp_path / "dataset" / "prompt.json")
    assert form["texts"]["begin_token_ids"] == [1]
    assert "begin_token_ids" not in form
    score(tmp_path, tmp_path, base)
    agreement = read(tmp_path / "metrics.json")["parity"]["tokenizer"]
    assert (agreement["encode_differ"], agreement["decode_differ"]) == (0, 0)
