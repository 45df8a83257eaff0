"""evaluate: the same answers from every runtime, the same bytes from every run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_script import export, make_dataset, merged_adapter, random_adapter, read_json, read_rows, run
from tiny import make_model, make_rows, write_params

from slmake import cli
from slmake.errors import UserError
from slmake.params.evaluate import AnswerSampling
from slmake.scoring import metrics as metrics_module
from slmake.scoring import onnx_runner
from slmake.scoring.questions import Questions
from slmake.scoring.transformers_runner import TransformersRunner

BENCHMARK = {"load_s", "score_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes"}
LATENCY = {"latency_ms_p50", "latency_ms_p95", "latency_ms_p99"}
METRICS = [
    *("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "macro_f1_low", "macro_f1_high", "outside_labels"),
    *("per_class", "confusion", "restricted_accuracy", "restricted_macro_f1", "answer_perplexity", "size_bytes"),
]


def refused(folder: Path, capsys, *arguments: object, **options: object) -> str:
    """The script's error; it exits with 1 and leaves nothing but the parameter file."""
    with pytest.raises(SystemExit) as caught:
        run(folder, *arguments, **options)
    assert caught.value.code == 1
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]
    message = capsys.readouterr().err
    return message[message.index("evaluate: error: ") :]


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory, base, taught, exported, dataset) -> Path:
    """Random base, taught model and its int4 export, scored once; do not write into it."""
    models = {"base": base, "merged": taught, "onnx": exported["int4"]}
    return run(tmp_path_factory.mktemp("scored") / "run", dataset, models=models)


def test_metrics_have_the_documented_fields_and_nothing_that_varies(scored, base, taught, exported, dataset):
    metrics = read_json(scored / "metrics.json")
    assert list(metrics) == ["test_rows", "base", "merged", "int4", "parity", "drop"]
    assert metrics["test_rows"] == len(Questions(dataset).rows)
    for name, folder in (("base", base), ("merged", taught), ("int4", exported["int4"])):
        assert list(metrics[name]) == METRICS
        assert metrics[name]["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        assert metrics[name]["accuracy_low"] <= metrics[name]["accuracy"] <= metrics[name]["accuracy_high"]
    assert metrics["base"]["accuracy"] == 0.0
    assert metrics["base"]["outside_labels"] == 1.0
    assert 0.0 < metrics["base"]["restricted_accuracy"] < 0.7  # one of four labels, by chance
    assert metrics["base"]["answer_perplexity"] > 50
    for name in ("merged", "int4"):
        assert metrics[name]["accuracy"] >= 0.9
        assert metrics[name]["restricted_accuracy"] >= 0.9
        assert metrics[name]["macro_f1"] >= 0.9
        assert 1.0 < metrics[name]["answer_perplexity"] < 2
    assert set(metrics["parity"]) == {"int4_vs_merged", "tokenizer"}
    agreement = metrics["parity"]["tokenizer"]
    assert agreement == {
        "rows": metrics["test_rows"],
        "encode_differ": 0,
        "decode_differ": 0,
        "hard_texts": 20,
        "hard_encode_differ": 1,
        "hard_decode_differ": 1,  # NUL ends a text for the runtime
    }
    parity = metrics["parity"]["int4_vs_merged"]
    assert parity["prompts"] == 64  # 24 test rows and 40 of eval and train
    assert 0 < parity["kl_mean"] < parity["kl_max"]
    assert parity["top1_agreement"] >= 0.8
    assert set(metrics["drop"]) == {"merged_vs_base", "int4_vs_merged", "int4_vs_base"}
    drop = metrics["drop"]["int4_vs_base"]
    assert drop["accuracy"] == pytest.approx(-metrics["int4"]["accuracy"])


def test_label_choice_and_likelihoods_are_those_of_whole_sequences(base, dataset):
    """The lazy search against brute force, on a random model, for which all labels compete."""
    from transformers import AutoModelForCausalLM

    questions = Questions(dataset, 12)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        brute = np.array(
            [
                [_log_likelihood(model, prompt, label) for label in questions.label_tokens]
                for prompt in questions.prompts
            ]
        )
    with cli.job("test") as job:
        run = TransformersRunner(base, 5).ask(questions, 4, job, "base")
    assert run.choices == brute.argmax(axis=1).tolist()
    expected = [questions.form["labels"].index(label) for label in questions.expected]
    assert run.choices != expected
    np.testing.assert_allclose(run.answer_nll, -brute[np.arange(12), expected], rtol=1e-4)


def _log_likelihood(model, prompt: np.ndarray, answer: list[int]) -> float:
    ids = torch.tensor([[*prompt, *answer]])
    logs = model(ids).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + k, token]) for k, token in enumerate(answer))


@pytest.mark.parametrize("model", ["base", "taught"])
def test_both_runtimes_give_the_same_scores(tmp_path, base, taught, exported, dataset, model):
    """float32 in both: logits, label choices and likelihoods agree, for a random model too."""
    folder = {"base": base, "taught": taught}[model]
    onnx = export(base, tmp_path / "random", "fp32") if model == "base" else exported["fp32"]
    questions = Questions(dataset, 16)
    with cli.job("test") as job:
        torch_run = TransformersRunner(folder, 5, 4).ask(questions, 4, job, "merged")
        onnx_run = onnx_runner.OnnxRunner(onnx).ask(questions, 4, job, "fp32")
    np.testing.assert_allclose(np.stack(torch_run.logits), np.stack(onnx_run.logits), atol=2e-3)
    np.testing.assert_allclose(torch_run.answer_nll, onnx_run.answer_nll, atol=5e-3)
    assert torch_run.choices == onnx_run.choices
    assert metrics_module.parity(np.stack(torch_run.logits), np.stack(onnx_run.logits))["kl_max"] < 1e-4


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
        ("mistral", {"sliding_window": 4}),
    ],
)
def test_models_whose_caches_cannot_be_cut_are_scored_alike(tmp_path, dataset, architecture, sizes):
    """Convolutions, and windows shorter than the prompt: in both runtimes, with a prefix that all prompts share."""
    folder = make_model(tmp_path / "base", architecture, **sizes)
    onnx, questions = export(folder, tmp_path / "onnx", "fp32"), Questions(dataset, 16)
    assert min(map(len, questions.prompts)) > 4 + 16
    with cli.job("test") as job:
        runner = TransformersRunner(folder, 5, 4)
        torch_run = runner.ask(questions, 4, job, "merged")
        onnx_run = onnx_runner.OnnxRunner(onnx).ask(questions, 4, job, "fp32")
        sampled = runner.sample(questions, 4, AnswerSampling(n=2, temperature=1e-4), job, "merged")
    np.testing.assert_allclose(np.stack(torch_run.logits), np.stack(onnx_run.logits), atol=2e-3)
    np.testing.assert_allclose(torch_run.answer_nll, onnx_run.answer_nll, atol=5e-3)
    assert torch_run.choices == onnx_run.choices
    assert [text.strip() for text in torch_run.texts] == onnx_run.texts
    assert sampled == [torch_run.texts, torch_run.texts]


def test_labels_that_share_their_first_tokens(tmp_path, base):
    """`sad` and `sadly` start with the same token: whole sequences decide, in both runtimes alike."""
    names = ["tone one", "tone two", "tone one more"]
    rows = [{"phrase": row["phrase"], "tone": names[i % 3]} for i, row in enumerate(make_rows(96))]
    folder = make_dataset(tmp_path / "data", base, rows)
    questions = Questions(folder)
    first = {ids[0] for ids in questions.label_tokens}
    assert len(first) == 1
    onnx = export(base, tmp_path / "random", "fp32")
    with cli.job("test") as job:
        torch_run = TransformersRunner(base, 32).ask(questions, 6, job, "base")
        onnx_run = onnx_runner.OnnxRunner(onnx).ask(questions, 6, job, "fp32")
    assert torch_run.choices == onnx_run.choices
    assert set(torch_run.choices) <= {0, 1, 2}


def test_adapter_is_scored_on_its_base_and_compared_with_merged(tmp_path, base, dataset):
    """An adapter and the merge of it differ by rounding only."""
    models = merged_adapter(base, tmp_path)
    metrics = read_json(run(tmp_path / "run", dataset, models=models, max_new_tokens=2) / "metrics.json")
    assert list(metrics) == ["test_rows", "base", "adapter", "merged", "parity", "drop"]
    found = metrics["parity"]["merged_vs_adapter"]
    assert found["top1_agreement"] == 1.0
    assert found["kl_max"] < 1e-5
    assert found["logit_diff_max"] < 1e-2
    assert metrics["adapter"]["answer_perplexity"] == pytest.approx(metrics["merged"]["answer_perplexity"], rel=1e-3)
    assert metrics["adapter"]["answer_perplexity"] != metrics["base"]["answer_perplexity"]
    with pytest.raises(SystemExit):
        run(tmp_path / "alone", dataset, models={"adapter": tmp_path / "adapter"})


@pytest.mark.parametrize("double_quant", [True, False])
def test_qlora_adapter_is_scored_on_its_own_4_bit_base(tmp_path, base, dataset, double_quant):
    """With `onto: dequantized`, adapter and merged are the same model again."""
    from scripts import merge

    random_adapter(base, tmp_path / "adapter")
    sections = {
        "finetune": {"method": "qlora", "double_quant": double_quant, "compute_dtype": "float32"},
        "merge": {"onto": "dequantized"},
    }
    file = write_params(tmp_path / "params.yaml", **sections)
    arguments = ["--params", file, "--base", base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    merge.main([str(argument) for argument in arguments])
    models = {"base": base, "adapter": tmp_path / "adapter", "merged": tmp_path / "merged"}
    metrics = read_json(run(tmp_path / "run", dataset, models=models, max_new_tokens=2, **sections) / "metrics.json")
    found = metrics["parity"]["merged_vs_adapter"]
    assert found["top1_agreement"] == 1.0
    assert found["kl_max"] < 1e-5
    plain = read_json(run(tmp_path / "plain", dataset, models=models, max_new_tokens=2) / "metrics.json")
    assert plain["parity"]["merged_vs_adapter"]["kl_max"] > 100 * max(found["kl_max"], 1e-6)
    assert metrics["base"] == plain["base"]


def test_benchmark_has_timings_of_every_model(scored):
    benchmark = read_json(scored / "benchmark.json")
    assert list(benchmark) == ["base", "merged", "int4"]
    assert set(benchmark["base"]) == BENCHMARK
    assert set(benchmark["merged"]) == BENCHMARK | LATENCY
    assert set(benchmark["int4"]) == BENCHMARK | LATENCY | {"generated_tokens_per_s"}
    assert all(value > 0 for values in benchmark.values() for value in values.values())
    times = benchmark["int4"]
    assert 0 < times["latency_ms_p50"] <= times["latency_ms_p95"] <= times["latency_ms_p99"]
    assert times["generated_tokens_per_s"] > 1


def test_predictions_are_every_answer_and_give_the_metrics(scored, dataset):
    metrics, rows = read_json(scored / "metrics.json"), read_rows(scored / "predictions.csv")
    questions = Questions(dataset)
    assert list(rows[0]) == ["row", "expected", "base", "merged", "int4", "prompt"]
    assert [int(row["row"]) for row in rows] == questions.rows
    assert [row["expected"] for row in rows] == questions.expected
    assert [row["prompt"] for row in rows] == questions.texts
    for name in ("base", "merged", "int4"):
        right = sum(row[name] == row["expected"] for row in rows)
        assert metrics[name]["accuracy"] == round(right / len(rows), 6)
        labels = set(questions.form["labels"])
        assert metrics[name]["outside_labels"] == round(sum(row[name] not in labels for row in rows) / len(rows), 6)


def test_two_runs_give_the_same_metrics_and_predictions(tmp_path, scored, base, taught, exported, dataset):
    models = {"base": base, "merged": taught, "onnx": exported["int4"]}
    again = run(tmp_path / "run", dataset, models=models)
    for name in ("metrics.json", "predictions.csv"):
        assert (again / name).read_bytes() == (scored / name).read_bytes(), name
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in scored.iterdir())


def test_transformers_and_onnx_give_the_same_answers(tmp_path, base, taught, exported, dataset):
    """Batched with left padding there, row by row here: every answer of the float32 models is the same."""
    folder = run(tmp_path / "taught", dataset, "fp32", {"merged": taught, "onnx": exported["fp32"]})
    for row in read_rows(folder / "predictions.csv"):
        assert row["fp32"] == row["merged"]
    random = export(base, tmp_path / "random", "fp32")
    folder = run(tmp_path / "babble", dataset, "fp32", {"base": base, "onnx": random}, max_new_tokens=6)
    rows = read_rows(folder / "predictions.csv")
    assert sum(row["fp32"] == row["base"] for row in rows) >= 0.9 * len(rows)


@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_changes_no_answer(tmp_path, scored, taught, dataset, size):
    folder = run(tmp_path / "run", dataset, models={"merged": taught}, batch_size=size)
    assert [row["merged"] for row in read_rows(folder / "predictions.csv")] == [
        row["merged"] for row in read_rows(scored / "predictions.csv")
    ]


def test_max_samples_scores_so_many_rows(tmp_path, taught, dataset):
    folder = run(tmp_path / "five", dataset, models={"merged": taught}, max_samples=5)
    assert read_json(folder / "metrics.json")["test_rows"] == 5
    assert len(read_rows(folder / "predictions.csv")) == 5


@pytest.mark.parametrize("count", [1, 3])
def test_max_new_tokens_bounds_the_answers_of_both_runtimes(tmp_path, base, exported, dataset, count):
    """The random model never stops by itself; the longest answer of the data is the bound otherwise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {"base": base, "onnx": exported["int4"]}
    folder = run(tmp_path / "run", dataset, models=models, max_new_tokens=count)
    for row in read_rows(folder / "predictions.csv"):
        for name in ("base", "int4"):
            assert len(tokenizer(row[name])["input_ids"]) <= count, (name, row)


def test_message_shows_every_accuracy(tmp_path, taught, dataset, capsys):
    run(tmp_path / "run", dataset, models={"merged": taught}, max_samples=4)
    assert "evaluate: accuracy on 4 test rows: merged " in capsys.readouterr().err


def test_bfloat16_model_is_scored_in_its_own_type(tmp_path, taught, dataset):
    from transformers import AutoModelForCausalLM

    half = Path(shutil.copytree(taught, tmp_path / "half"))
    AutoModelForCausalLM.from_pretrained(taught, dtype=torch.bfloat16).save_pretrained(half)
    metrics = read_json(run(tmp_path / "run", dataset, models={"merged": half}) / "metrics.json")
    assert metrics["merged"]["accuracy"] >= 0.9
    assert metrics["merged"]["size_bytes"] < sum(path.stat().st_size for path in taught.iterdir())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_empty_test_split(tmp_path, base, taught, capsys):
    folder = make_dataset(tmp_path / "data", base, make_rows(40), test_fraction=0.0)
    message = refused(tmp_path / "run", capsys, folder, models={"merged": taught})
    assert f"{folder}: the test split is empty, so nothing can be scored." in message
    assert "Raise prepare.test_fraction, or name a test file." in message


def test_no_model_to_score(tmp_path, dataset, capsys):
    message = refused(tmp_path / "run", capsys, dataset)
    assert "nothing to score: give --base, --adapter, --merged or --onnx." in message


def test_missing_dataset_names_the_command_that_makes_it(tmp_path, taught, capsys):
    message = refused(tmp_path / "run", capsys, tmp_path / "no", models={"merged": taught})
    assert f"{tmp_path}/no/prompt.json: no such file. Build it with `snakemake --cores all {tmp_path}/no`." in message


@pytest.mark.parametrize("name", ["base", "merged", "onnx"])
def test_missing_model_is_named(tmp_path, dataset, capsys, name):
    message = refused(tmp_path / "run", capsys, dataset, models={name: tmp_path / "no"})
    assert f"{tmp_path}/no" in message
    assert "snakemake" in message


def test_damaged_export_is_named(tmp_path, exported, dataset, capsys):
    damaged = Path(shutil.copytree(exported["int4"], tmp_path / "damaged"))
    (damaged / "model.onnx.data").write_bytes(b"")
    message = refused(tmp_path / "run", capsys, dataset, models={"onnx": damaged})
    assert f"{damaged}: ONNX Runtime cannot load this model: " in message
    assert "Build it again: remove the folder and run snakemake." in message


def test_export_behind_symbolic_links(tmp_path, exported):
    """As a bare `dvc checkout` makes them, which has each file in a folder of its own."""
    for number, file in enumerate(exported["int4"].iterdir()):
        (tmp_path / "linked").mkdir(exist_ok=True)
        (tmp_path / str(number)).mkdir()
        (tmp_path / "linked" / file.name).symlink_to(shutil.copy(file, tmp_path / str(number)))
    with pytest.raises(UserError, match=r"linked: ONNX Runtime cannot load this model: .*dvc checkout --relink"):
        onnx_runner.load(tmp_path / "linked")


def test_existing_outputs_are_refused(tmp_path, scored, taught, dataset, capsys):
    folder = Path(shutil.copytree(scored, tmp_path / "run"))
    (folder / "metrics.json").unlink()
    before = (folder / "predictions.csv").read_bytes()
    with pytest.raises(SystemExit):
        run(folder, dataset, models={"merged": taught})
    assert "already exists" in capsys.readouterr().err
    assert not (folder / "metrics.json").exists()
    assert (folder / "predictions.csv").read_bytes() == before


def test_an_answer_that_was_generated_is_not_computed_again():
    """onnxruntime-genai leaves out the end token; the logits that chose it are there all the same."""
    row = onnx_runner.OnnxRow(None, [1, 2, 3], 4)
    row.steps = list(np.random.default_rng(1).normal(size=(3, 8)))
    row.generator = None  # using it would fail
    logs = [step - np.log(np.exp(step).sum()) for step in row.steps]
    for answer in ([5, 6, 2], [5, 6, 7], [5, 6], [4]):
        expected = sum(logs[k][token] for k, token in enumerate(answer))
        assert row.score(answer, [5, 6]) == pytest.approx(expected, abs=1e-9)
    for answer in ([5, 4, 2], [5, 6, 2, 1]):
        with pytest.raises(AttributeError):
            row.score(answer, [5, 6])


def test_metrics_of_ones_own_reach_metrics_json(tmp_path, taught, base, dataset):
    """A function that repeats exact match has accuracy's figures, drop and intervals."""
    (tmp_path / "mine.py").write_text(
        "def same(prompt, expected, answer):\n    return expected == answer and expected in answer\n"
    )
    wanted = [f"{tmp_path}/mine.py:same", {"regex": "sadness|joy|fear|surprise"}]
    models = {"base": base, "merged": taught}
    figures = read_json(run(tmp_path / "run", dataset, models=models, metrics=wanted) / "metrics.json")
    for entry in (figures["base"], figures["merged"], figures["drop"]["merged_vs_base"]):
        for end in ("", "_low", "_high"):
            assert entry[f"same{end}"] == entry[f"accuracy{end}"]
    assert figures["base"]["regex"] == round(1 - figures["base"]["outside_labels"], 6)
    assert figures["merged"]["regex"] == round(1 - figures["merged"]["outside_labels"], 6)


def test_a_metric_that_fails_leaves_nothing(tmp_path, taught, dataset, capsys):
    (tmp_path / "mine.py").write_text(
        "def same(prompt, expected, answer):\n    return 1 / len(prompt.split('###')[9])\n"
    )
    message = refused(
        tmp_path / "run", capsys, dataset, models={"merged": taught}, metrics=[f"{tmp_path}/mine.py:same"]
    )
    assert "same on row " in message
    assert "IndexError: list index out of range. Correct the function." in message
