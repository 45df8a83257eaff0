"""The real lm-evaluation-harness on local task files: the same figures from every backend, gates on them, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import SIZES, make_tokenizer, write_params

from scripts import rehearse
from slmake import cli, params
from slmake.errors import UserError
from slmake.export import builder
from slmake.scoring import harness

pytestmark = pytest.mark.real
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" joy", " fear of the dark", " surprise"]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
OPEN = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{['joy', 'fear', 'surprise'][label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A task of choices and a task of open answers."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": f"The sun {'shines' if i % 2 else 'is gone'} on day {i}:", "label": i % 3} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("tones", CHOICE), ("spoken", OPEN)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, rows=folder / "rows.jsonl"), encoding="utf-8")
    return {name: folder / f"{name}.yaml" for name in ("tones", "spoken")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, base) -> dict[str, Path]:
    """The tiny base in float32 with and without the pruned head."""
    folders = {}
    for pruned in (True, False):
        section = params.Quantize(precision="fp32", matmul_mixed_precision=None, prune_lm_head=pruned)
        folder = tmp_path_factory.mktemp("export") / "model"
        folder.mkdir()
        builder.export(section, base, folder, folder.parent / "cache")
        folders["pruned" if pruned else "whole"] = folder
    return folders


def job() -> cli.Job:
    import sys

    return cli.Job("evaluate", sys.stderr, None)


def expected_accuracy(base: Path, file: Path) -> float:
    """Accuracy of the choice task, computed with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    right = []
    for line in (file.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        context = tokenizer(row["text"])["input_ids"]
        totals = []
        for choice in (" joy", " fear of the dark", " surprise"):
            tokens = tokenizer(row["text"] + choice)["input_ids"]
            logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            totals.append(sum(logits[i - 1, tokens[i]].item() for i in range(len(context), len(tokens))))
        right.append(totals.index(max(totals)) == row["label"])
    return sum(right) / len(right)


def test_every_backend_gives_the_same_figures(base, exported, files):
    entries = [str(file) for file in files.values()]
    figures = {
        name: harness.run({"base": base, "fp32": folder}, "fp32", entries, None, job())
        for name, folder in exported.items()
    }
    assert figures["pruned"] == figures["whole"]
    assert figures["whole"]["fp32"] == figures["whole"]["base"]
    mine = figures["whole"]["base"]
    assert mine["lm_eval.tones.acc"] == pytest.approx(expected_accuracy(base, files["tones"]), abs=1e-6)
    assert 0 < mine["lm_eval.tones.acc"] < 1
    error = (mine["lm_eval.tones.acc"] * (1 - mine["lm_eval.tones.acc"]) / 29) ** 0.5
    assert mine["lm_eval.tones.acc_high"] - mine["lm_eval.tones.acc"] == pytest.approx(1.959964 * error, abs=1e-5)
    assert "lm_eval.spoken.exact_match" in mine


@pytest.mark.parametrize(("kind", "changes"), [("Lfm2", {}), ("Mistral", {"sliding_window": 2})])
def test_choices_are_scored_where_the_runtime_cannot_rewind(tmp_path, files, kind, changes):
    """ONNX Runtime GenAI cannot for LFM2, nor behind a prompt that is longer than a sliding window."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    (tmp_path / "onnx").mkdir()
    section = params.Quantize(precision="fp32", matmul_mixed_precision=None)
    builder.export(section, tmp_path / "base", tmp_path / "onnx", tmp_path / "cache")
    models = {"base": tmp_path / "base", "fp32": tmp_path / "onnx"}
    figures = harness.run(models, "fp32", [str(files["tones"])], None, job())
    assert figures["fp32"] == figures["base"]
    assert 0 < figures["base"]["lm_eval.tones.acc"] < 1


def test_the_limit_takes_the_first_rows(base, files):
    figures = harness.run({"base": base, "adapter": base}, "int4", [str(files["tones"])], 3, job())
    assert set(figures) == {"base"}  # an adapter is merged's function
    assert figures["base"]["lm_eval.tones.acc"] in (
        0,
        pytest.approx(1 / 3, abs=1e-6),
        pytest.approx(2 / 3, abs=1e-6),
        1,
    )


def test_what_is_refused_before_any_model_is_asked(tmp_path, files):
    (tmp_path / "empty.yaml").write_text("group: x\n", encoding="utf-8")
    wrong = {
        "no_such_task_anywhere": "the harness has no task `no_such_task_anywhere`",
        str(tmp_path / "absent.yaml"): "no such file",
        str(tmp_path / "empty.yaml"): "defines no task",
    }
    for entry, message in wrong.items():
        with pytest.raises(UserError, match=message):
            harness.tasks([str(files["tones"]), entry])
    assert harness.tasks([str(files["tones"]), "hellaswag"])[0] == ["tones", "hellaswag"]


def test_a_task_whose_rows_are_gone(tmp_path, base):
    file = tmp_path / "gone.yaml"
    file.write_text(CHOICE.format(name="gone", rows=tmp_path / "absent.jsonl"), encoding="utf-8")
    message = r"evaluate.lm_eval: gone: \w+: .*Correct the task, or take it out"
    with pytest.raises(UserError, match=message):
        harness.run({"base": base}, "int4", [str(file)], None, job())
    asked = params.load(write_params(tmp_path / "params.yaml", evaluate={"lm_eval": [str(file)]}))
    with pytest.raises(UserError, match=message):  # before training
        rehearse.refuse_what_is_not_there(asked, {"labels": None})


def test_rehearse_finds_that_a_task_or_the_harness_is_not_there(tmp_path, files, monkeypatch):
    def check(task: str, *stages: str) -> None:
        changes = {"evaluate": {"lm_eval": [task]}, "all": {"stages": ["finetune", "merge", *stages]}}
        file = write_params(tmp_path / "params.yaml", **changes)
        rehearse.refuse_what_is_not_there(params.load(file), {"labels": None})

    check(str(files["tones"]), "evaluate")
    check("no_such_task")
    with pytest.raises(UserError, match="the harness has no task `no_such_task`"):
        check("no_such_task", "evaluate")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"the harness is not installed here\. Run `make lm-eval`"):
        check(str(files["tones"]), "evaluate")


def test_gates_take_its_figures(tmp_path):
    gate = {"metric": "lm_eval.tones.acc", "minimum": 0.5, "interval": "best"}
    settings = {"evaluate": {"lm_eval": ["tones.yaml"]}, "gates": {"checks": [gate]}}
    assert params.load(write_params(tmp_path / "params.yaml", **settings)).gates.checks[0].metric == gate["metric"]
    settings["evaluate"] = {"lm_eval": []}
    with pytest.raises(UserError, match=r"unknown metric `lm_eval\.tones\.acc`"):
        params.load(write_params(tmp_path / "params.yaml", **settings))
