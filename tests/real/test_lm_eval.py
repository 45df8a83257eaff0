"""The real lm-evaluation-harness on local task files: the same figures from every backend, gates on them, and what is refused."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from tiny import SIZES, make_tokenizer, write_params

from scripts import rehearse
from slmake import cli, params
from slmake.errors import UserError
from slmake.export import builder
from slmake.scoring import harness

pytestmark = pytest.mark.real
ROWS = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" joy", " fear of the dark", " surprise"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
OPEN = """\
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{['joy', 'fear', 'surprise'][label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A task of choices, one of open answers, and one of whole texts."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": f"The sun {'shines' if i % 2 else 'is gone'} on day {i}:", "label": i % 3} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("tones", CHOICE), ("spoken", OPEN), ("read", ROLLING)):
        start = ROWS.format(name=name, rows=folder / "rows.jsonl")
        (folder / f"{name}.yaml").write_text(start + text, encoding="utf-8")
    return {name: folder / f"{name}.yaml" for name in ("tones", "spoken", "read")}


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
    assert {"lm_eval.spoken.exact_match", "lm_eval.read.bits_per_byte"} <= mine.keys()


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ("max_gen_toks: 512", "ValueError: own: answers of 512 tokens, and the model reads 512 with the prompt"),
        (
            "max_new_tokens: 4, repetition_penalty: 1.2",
            "ValueError: own: generation_kwargs.repetition_penalty: an exported model cannot",
        ),
        ("max_gen_toks: 4, do_sample: true", "ValueError: own: generation_kwargs.do_sample without a temperature"),
        ("max_gen_toks: 4, do_sample: true, temperature: 0.7, top_k: 5, num_beams: 1", None),
        ("max_gen_toks: 4}\nunsafe_code: true\nmetadata: {", "ValueError: own: it runs code that a model wrote"),
        (
            "max_gen_toks: 4}\nnum_fewshot: 90\nfewshot_split: test\nmetadata: {",
            "ValueError: Sample larger than population",
        ),
        (
            "max_gen_toks: 4}\nfilter_list: [{name: x, filter: [{function: regex, regex_pattern: '(a'}]}]\nmetadata: {",
            r"error: missing \), unterminated",
        ),
        (
            "max_gen_toks: 4}\nfilter_list: [{name: x, filter: [{function: nosuch}]}]\nmetadata: {",
            "KeyError: Unknown filter 'nosuch'",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(tmp_path, files, kwargs, reason):
    text = files["spoken"].read_text(encoding="utf-8").replace("max_gen_toks: 4, do_sample: false", kwargs)
    (tmp_path / "own.yaml").write_text(text.replace("task: spoken", "task: own"), encoding="utf-8")
    if reason is None:
        assert "lm_eval.own.exact_match" in harness.rehearse([str(tmp_path / "own.yaml")], None, 512)
        return
    with pytest.raises(UserError, match=f"evaluate.lm_eval: own: {reason}"):
        harness.rehearse([str(tmp_path / "own.yaml")], None, 512)


def test_a_task_without_figures_is_refused_before_training(tmp_path, files):
    text = files["tones"].read_text(encoding="utf-8").replace("metric: acc", "metric: nosuch")
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="tones: ValueError: tones: it gives no figure; its metric_list names none"):
        harness.rehearse([str(files["spoken"]), str(tmp_path / "own.yaml")], None, 512)


def test_a_task_that_reads_more_of_answers_than_a_made_up_one_has_is_not_refused(tmp_path, files):
    (tmp_path / "read.py").write_text("def judge(doc, results): return {'ok': float(results[0].split(':')[1])}\n")
    text = files["spoken"].read_text(encoding="utf-8").replace("exact_match", "ok").replace("task: spoken", "task: own")
    (tmp_path / "own.yaml").write_text(text + "process_results: !function read.judge\n", encoding="utf-8")
    assert harness.rehearse([str(tmp_path / "own.yaml")], None, 512) == {}


def test_a_task_that_samples_gets_other_answers_each_time_and_the_same_in_each_run(exported):
    limits = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_k": 50}
    asked = [Instance("generate_until", {}, ("The sun shines", limits), number) for number in range(6)]
    first, again = (harness._backend(exported["whole"], True).generate_until(asked) for _ in range(2))
    assert first == again
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Lfm2", {}),  # ONNX Runtime GenAI takes no tokens back here,
        ("Mistral", {"sliding_window": 2}),  # nor behind a prompt that is longer than a sliding window,
        ("Mistral", {"sliding_window": 128}),  # and refuses a cache that is smaller than one
        ("Llama", {"max_position_embeddings": 16}),  # less than a prompt
        ("Llama", {"begin": True}),
    ],
)
def test_models_of_other_kinds_have_the_same_figures(tmp_path, files, kind, changes):
    torch.manual_seed(7)
    begin = changes.get("begin")
    sizes = SIZES | {name: value for name, value in changes.items() if name != "begin"}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(6.0)  # so that a token more or less tells
    model.float().save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    if begin:
        begin_with(tmp_path / "base", "<|start|>", SIZES["bos_token_id"])
    (tmp_path / "onnx").mkdir()
    section = params.Quantize(precision="fp32", matmul_mixed_precision=None)
    builder.export(section, tmp_path / "base", tmp_path / "onnx", tmp_path / "cache")
    models = {"base": tmp_path / "base", "fp32": tmp_path / "onnx"}
    figures = harness.run(models, "fp32", list(map(str, files.values())), None, job())
    assert figures["fp32"] == pytest.approx(figures["base"], abs=2e-6)
    special = transformers.AutoTokenizer.from_pretrained(tmp_path / "base").convert_ids_to_tokens(1)
    limits = {"until": ["e", special], "max_new_tokens": 6}  # the harness's other name for its own limit
    asked = [
        Instance("generate_until", {}, (text, limits), number)
        for number, text in enumerate(("The sun shines on day 4:", "It rains. " * 12))
    ]
    answers = [harness._backend(folder, folder.name == "onnx").generate_until(asked) for folder in models.values()]
    assert answers[0] == answers[1]
    assert 0 < figures["base"]["lm_eval.tones.acc"] < 1
    assert figures["base"]["lm_eval.read.bits_per_byte"] > 1


def begin_with(folder: Path, token: str, number: int) -> None:
    """Have a tokenizer write a begin token, as Llama's and Gemma's do."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    one = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {token: {"id": token, "ids": [number], "tokens": [token]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": one,
        "pair": [*one, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": known,
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    changed = json.loads(settings.read_text(encoding="utf-8")) | {"bos_token": token}
    settings.write_text(json.dumps(changed), encoding="utf-8")


def test_the_limit_takes_the_first_rows(base, files):
    figures = harness.run({"base": base, "adapter": base}, "int4", [str(files["tones"])], 3, job())
    assert set(figures) == {"base"}  # an adapter is merged's function
    assert figures["base"]["lm_eval.tones.acc"] in (
        0,
        pytest.approx(1 / 3, abs=1e-6),
        pytest.approx(2 / 3, abs=1e-6),
        1,
    )


def test_a_file_is_the_task_whatever_is_beside_it(tmp_path, base, files):
    """The harness looks through whole folders, and takes the first file that defines a name; it knows its own tasks by name, too."""
    (tmp_path / "archive").mkdir()
    text = files["tones"].read_text(encoding="utf-8").replace("task: tones", "task: hellaswag")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "archive" / "first.yaml").write_text(text.replace("{{text}}", "{{text}} It is"), encoding="utf-8")
    mine = harness.run({"base": base}, "int4", [str(tmp_path / "mine.yaml")], None, job())
    tones = harness.run({"base": base}, "int4", [str(files["tones"])], None, job())
    assert list(mine["base"].values()) == list(tones["base"].values())
    assert "lm_eval.hellaswag.acc" in mine["base"]
    for other in ("hellaswag", str(tmp_path / "archive" / "first.yaml")):
        with pytest.raises(UserError, match=r"two tasks have the name `hellaswag`\. Rename one"):
            harness.tasks([str(tmp_path / "mine.yaml"), other])


@pytest.mark.parametrize("form", ["files", "folder"])
def test_rows_are_those_that_a_file_holds_now(tmp_path, base, form):
    """`datasets` knows a local file by its name and time; `git checkout`, `cp -p` and tar may leave both as they were."""
    rows = tmp_path / "rows" / "rows.jsonl"
    rows.parent.mkdir()
    start = ROWS.format(name="own", rows=rows)
    if form == "folder":
        start = f"task: own\ndataset_path: {rows.parent}\ntest_split: train\n"
    (tmp_path / "own.yaml").write_text(start + CHOICE, encoding="utf-8")
    figures = []
    for label in (0, 1, 2):
        rows.write_text(json.dumps({"text": "The sun shines:", "label": label}) + "\n", encoding="utf-8")
        os.utime(rows, (10**9, 10**9))
        found = harness.run({"base": base}, "int4", [str(tmp_path / "own.yaml")], None, job())
        figures.append(found["base"]["lm_eval.own.acc"])
    assert sorted(figures) == [0, 0, 1]


def test_what_is_refused_before_any_model_is_asked(tmp_path, files):
    (tmp_path / "empty.yaml").write_text("group: x\n", encoding="utf-8")
    (tmp_path / "broken.yaml").write_text("task: [\n", encoding="utf-8")
    (tmp_path / "more.yaml").write_text("task: more\ninclude: gone.yaml\n", encoding="utf-8")
    wrong = {
        str(tmp_path / "broken.yaml"): "broken.yaml: while parsing a flow node. Correct the task's YAML file",
        str(tmp_path / "more.yaml"): "gone.yaml: no such file",
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
    file.write_text(ROWS.format(name="gone", rows=tmp_path / "absent.jsonl") + CHOICE, encoding="utf-8")
    message = r"evaluate.lm_eval: gone: \w+: .*Correct the task, or take it out"
    with pytest.raises(UserError, match=message):
        harness.run({"base": base}, "int4", [str(file)], None, job())
    asked = params.load(write_params(tmp_path / "params.yaml", evaluate={"lm_eval": [str(file)]}))
    with pytest.raises(UserError, match=message):  # before training
        rehearse.rehearse_tasks(asked, 512)


def test_rehearse_finds_that_a_task_or_the_harness_is_not_there(tmp_path, files, monkeypatch):
    def check(task: str, *stages: str) -> None:
        changes = {"evaluate": {"lm_eval": [task]}, "all": {"stages": ["finetune", "merge", *stages]}}
        file = write_params(tmp_path / "params.yaml", **changes)
        rehearse.rehearse_tasks(params.load(file), 512)

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
