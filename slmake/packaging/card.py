"""The model card: README.md with Hugging Face metadata (https://huggingface.co/docs/hub/model-cards)."""

import json
import re

import yaml

from slmake import params
from slmake.scoring.gates import table
from slmake.scoring.metrics import held_out
from slmake.text import code_span, markdown, one_line, printable

NAMES = {"base": "base", "adapter": "base with adapter", "merged": "fine-tuned and merged"}
TRAINING = (  # the settings of finetune that a card shows
    *("method", "lora_r", "lora_alpha", "target_modules", "learning_rate", "lr_scheduler_type", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "qat", "seed"),
)


def percent(value: float) -> str:
    return f"{value:.1%}"


def prose(text: str) -> str:
    """Markdown that the user wrote, with its HTML shown as text (addresses in angle brackets stay links)."""
    return re.sub(r"<(?=[A-Za-z/!?])(?!https?://|mailto:)", "&lt;", printable(text))


def single_lines(value: object) -> object:
    """The value with every text on one line: a line break could end the YAML head, and start another."""
    if isinstance(value, dict):
        return {key: single_lines(item) for key, item in value.items()}
    if isinstance(value, list):
        return [single_lines(item) for item in value]
    return one_line(value) if isinstance(value, str) else value


def metrics_table(metrics: dict, models: list[str]) -> list[str]:
    """One row per model, with 95% intervals; without a dataset, its perplexity."""
    if not metrics["test_rows"]:
        lines = ["| model | perplexity | size |", "|---|---|---|"]
        return lines + [
            f"| {_shown(name, models)} | {metrics[name]['perplexity']:,.3f} | {metrics[name]['size_bytes'] / 1e6:,.1f} MB |"
            for name in models
        ]
    classes = "macro_f1" in metrics[models[-1]]
    second = "macro-F1 (95% interval) | outside the labels" if classes else "ROUGE-L"
    lines = [
        f"| model | accuracy (95% interval) | {second} | answer perplexity | size |",
        "|---|---|---|---|---|" + "---|" * classes,
    ]
    for name in models:
        scores = metrics[name]
        cells = [_shown(name, models)]
        cells.append(
            f"{percent(scores['accuracy'])} ({percent(scores['accuracy_low'])} to {percent(scores['accuracy_high'])})"
        )
        if classes:
            cells.append(f"{scores['macro_f1']:.3f} ({scores['macro_f1_low']:.3f} to {scores['macro_f1_high']:.3f})")
            cells.append(percent(scores["outside_labels"]))
        else:
            cells.append(f"{scores['rouge_l']:.3f}")
        cells += [f"{scores['answer_perplexity']:,.3f}", f"{scores['size_bytes'] / 1e6:,.1f} MB"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shown(name: str, models: list[str]) -> str:
    """A model's name in a table."""
    return NAMES.get(name, f"{name} ONNX (this package)" if name == models[-1] else name)


def class_table(scores: dict) -> list[str]:
    """Precision, recall and F1 of every label."""
    lines = ["| label | precision | recall | F1 | rows |", "|---|---|---|---|---|"]
    for label, row in scores["per_class"].items():
        lines.append(
            f"| {markdown(label)} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} | {row['rows']} |"
        )
    return lines


def parity_table(parity: dict) -> list[str]:
    """How far each model's answers lie from those of the one it was made from."""
    lines = [
        "| step | prompts | mean KL | largest KL | same first token | largest logit difference |",
        "|---|---|---|---|---|---|",
    ]
    for key, distance in parity.items():
        if key == "tokenizer":
            continue
        after, _, before = key.partition("_vs_")
        lines.append(
            f"| {before} to {after} | {distance['prompts']} | {distance['kl_mean']:.4f} | {distance['kl_max']:.4f} | "
            f"{percent(distance['top1_agreement'])} | {distance['logit_diff_max']:.3f} |"
        )
    return lines


def limited(facts: dict) -> bool:
    """Whether evaluate.max_samples left out answers."""
    scored = facts["metrics"]["test_rows"]
    return scored == facts["limit"] and scored < held_out(facts["dataset"])


def scored_on(facts: dict) -> str:
    """What the scores are of, in a paragraph."""
    metrics, quantize = facts["metrics"], facts["quantize"]
    if metrics["test_rows"]:
        chats = held_out(facts["dataset"]) != facts["dataset"]["rows"]["test"]
        scored = f"{'first ' * limited(facts)}{metrics['test_rows']} {'answers of the held-out rows' if chats else 'held-out rows'}"
        return f"On the {scored}. An answer counts as right if it is the expected one to the letter."
    calibrated = " The weights were calibrated with the same texts, so the figures flatter them." * (
        quantize["calibration"] == "gptq"
    )
    return (
        f"Without a dataset, on {metrics['texts']} fixed texts in several languages, code, tables and dialogue: the perplexity of a text "
        f"behind its opening.{calibrated}"
    )


def metadata(section, facts: dict, labels: list[str] | None) -> dict:
    """The YAML head that model hubs read."""
    source, metrics, last = facts["base"]["source"], facts["metrics"], facts["last"]
    head: dict = {
        "license": section.license.lower(),
        "language": list(section.language),
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-classification" if labels else "text-generation",
        "tags": ["onnx", "onnxruntime-genai", last, *section.tags],
    }
    if source.startswith("hf:"):
        head["base_model"] = source.removeprefix("hf:").partition("@")[0]
    if not metrics["test_rows"]:
        return head
    kinds = [("accuracy", "accuracy")] + ([("f1", "macro_f1")] if labels else [("rouge", "rouge_l")])
    results = [{"type": kind, "value": metrics[last][key], "name": key} for kind, key in kinds]
    task = {"type": head["pipeline_tag"]}
    data = {
        "name": section.name,
        "type": "part of the held-out test split" if limited(facts) else "held-out test split",
    }
    head["model-index"] = [{"name": section.name, "results": [{"task": task, "dataset": data, "metrics": results}]}]
    return head


def usage(form: dict, tuned: bool) -> list[str]:
    """How to run the package, and what it answers; `tuned`: it was trained here."""
    arguments = " ".join(f'"{field}"' for field in form["fields"] or ["text"])
    lines = ["## How to run it", "", "    pip install onnxruntime-genai", f"    python run.py {arguments}", ""]
    lines += ["Over HTTP, as OpenAI's API, with a page to try it:", ""]
    lines += ["    pip install onnxruntime-genai starlette uvicorn pydantic", "    python serve.py", ""]
    if form["prompt"] is not None and "texts" not in form:
        lines += [
            f"The prompt that it was {'trained on' if tuned else 'scored with'} is in prompt.json, and run.py fills it in:",
            "",
        ]
        lines += [f"    {printable(line)}" for line in re.split("\r\n|\r|\n", form["prompt"])] + [""]
    if form["labels"]:
        lines += [f"It answers with one of: {', '.join(map(markdown, form['labels']))}.", ""]
    return lines


def origin(record: dict) -> str:
    """Where a model or a split came from, with its digest if it has one."""
    return code_span(record["source"]) + (f", SHA-256 `{record['sha256']}`." if record.get("sha256") else ".")


def ingredients(facts: dict, tuned: bool) -> list[str]:
    """Base model, adapter and data; `tuned`: it was trained here."""
    rows, scored, answers = facts["dataset"]["rows"], facts["metrics"]["test_rows"], held_out(facts["dataset"])
    of = f" of their {answers} answers" * (answers != rows["test"])
    held = f"(the scores below are of the first {scored}{of})" if limited(facts) else "for the scores below"
    use = f"{rows['train']} to train on, {rows['eval']} for the loss during training"
    if not tuned:
        use = f"{rows['train']} in the train split and {rows['eval']} in the eval split, on which nothing was trained here"
    lines = ["## What it was made from", "", f"- Base model: {origin(facts['base'])}"]
    if facts["adapter"]:
        lines.append(f"- Adapter, made elsewhere: {code_span(facts['adapter']['source'])}.")
    lines += [f"- Data ({split}): {origin(source)}" for split, source in facts["dataset"]["source"].items()]
    return [
        *lines,
        f"- Rows: {use}, {rows['test']} held out {held}."
        if facts["dataset"]["source"]
        else "- No dataset: the model was not scored on a task.",
        "",
        "provenance.intoto.json has the digest of every input, script, parameter and environment; bom.cdx.json is the bill of materials.",
        "",
    ]


def training_part(settings: dict, trained: dict | None) -> list[str]:
    """The settings of a training, and how far it went.

    Args:
        settings: the section `finetune`.
        trained: `step` and `epoch` at its end.
    """
    # max_steps overrides the number of epochs.
    names = ("max_steps" if name == "num_train_epochs" and settings["max_steps"] else name for name in TRAINING)
    lines = ["## Training", "", *settings_table({name: settings[name] for name in names})]
    if trained:
        kept = settings["early_stopping_patience"] or settings["keep_best"]
        chosen = " The adapter with the best loss on the eval rows was kept." * bool(kept)
        epochs = f"{trained['epoch']:g} epoch{'s' * (trained['epoch'] != 1)}"
        lines += [f"It was trained for {trained['step']:.0f} steps, {epochs}.{chosen}", ""]
    return lines


def settings_table(settings: dict) -> list[str]:
    """One row per setting."""
    lines = ["| setting | value |", "|---|---|"]
    return [
        *lines,
        *(f"| `{key}` | {code_span(json.dumps(value, ensure_ascii=False))} |" for key, value in settings.items()),
        "",
    ]


def quantization(facts: dict) -> list[str]:
    """The options of the export; after a search, how they were chosen."""
    lines = ["## Quantization", ""]
    if search := facts["search"]:
        lines += [
            f"Candidate {search['winner']} of {len(search['candidates'])}: of those that passed the gates on {search['tuning_rows']} "
            f"tuning rows the {'smallest' if search['objective'] == 'size' else 'fastest'}.",
            "",
        ]
    return lines + settings_table({key: value for key, value in facts["quantize"].items() if key != "search"})


def held_answers(package: str | dict, evaluate: str | dict, scores: dict) -> str:
    """What to know of the scores of free answers where a package's answers are held to a form; empty where they are not.

    Args:
        package: what the package's answers are held to, and `evaluate` what those were held to that were scored so.
        scores: those of the package's model.
    """
    if package == "none":
        return ""
    scored = package == evaluate and "constrained_accuracy" in scores
    share = f"accuracy is {percent(scores['constrained_accuracy'])}" if scored else "they were not scored"
    return f"The answers above are free. run.py and serve.py hold theirs to {code_span(json.dumps(package))}; held so, {share}."


def gates_part(gates: list[dict]) -> list[str]:
    """The gates that the model passed, but not those on time: their figures differ from run to run, and the package must not."""
    if not gates:
        return ["No gate was set for this model.", ""]
    listed = [gate for gate in gates if gate["metric"] not in params.TIMINGS]
    lines = []
    if listed:
        lines += ["Gates that this model passed:", ""]
        lines += [*(f"    {line.strip()}" for line in table(listed).splitlines()), ""]
    if len(listed) < len(gates):
        passed = "also passed" if listed else "passed"
        lines += [f"It {passed} gates on time. They are not listed, because their figures differ from run to run.", ""]
    return lines


def scores(facts: dict, classes: bool, gates: list[dict]) -> list[str]:
    """What was measured on the held-out rows, or on the fixed texts, and the gates that it passed."""
    metrics, last = facts["metrics"], facts["last"]
    lines = ["## Scores", "", scored_on(facts), ""]
    if device := metrics.get("providers", {}).get(last):
        lines += [
            f"They were computed on {device['scored_on']}, because {device['exported_for']}, which this model was exported for, was not "
            "available there. Its latency was not measured.",
            "",
        ]
    lines += [*metrics_table(metrics, facts["models"]), ""]
    if facts["constrained"]:
        lines += [facts["constrained"], ""]
    if classes:
        accuracy = percent(metrics[last]["restricted_accuracy"])
        lines += [f"This package by label (choosing among the labels only, accuracy is {accuracy}):", ""]
        lines += [*class_table(metrics[last]), ""]
    if any(key != "tokenizer" for key in metrics.get("parity", {})):
        token = "first answer token" if metrics["test_rows"] else "next token"
        lines += [f"Step by step, over the distribution of the {token}:", ""]
        lines += [*parity_table(metrics["parity"]), ""]
    return lines + gates_part(gates)


def write(section, facts: dict, form: dict, training: dict | None, gates: list[dict]) -> str:
    """The whole card.

    Args:
        section: the section `package` of params.yaml.
        facts: `base`, `dataset`, `metrics`, `limit` (evaluate.max_samples), `last`, `models`, `adapter`, `trained` (see `training_part`),
            `licences`, `constrained` (see `held_answers`), `quantize` (the section as a dictionary, with the options that a search
            chose), `search` (search.json, or None).
        form: prompt.json.
        training: the section `finetune` as a dictionary; None without fine-tuning.
        gates: the judged gates.
    """
    head = single_lines(metadata(section, facts, form["labels"]))
    head = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=10**6)
    lines = ["---", head.rstrip(), "---", "", f"# {markdown(section.name)}", "", prose(section.intended_use), ""]
    lines += [*usage(form, bool(training)), *ingredients(facts, bool(training))]
    if training:
        lines += training_part(training, facts["trained"])
    lines += [*quantization(facts), *scores(facts, bool(form["labels"]), gates)]
    licences = ", ".join(map(markdown, sorted(set(facts["licences"]))))
    lines += ["## Limits", "", prose(section.limitations), "", "## Licence", ""]
    lines += [f"{markdown(section.license)}. The texts are in licenses/: {licences}.", ""]
    lines += ["## Check what you have", "", "    sha256sum --check SHA256SUMS", ""]
    return "\n".join(lines)
