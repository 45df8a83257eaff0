"""The model card: README.md with Hugging Face metadata (https://huggingface.co/docs/hub/model-cards)."""

import json
import re

import yaml

from slmake.text import code_span, markdown, one_line, printable

NAMES = {"base": "base", "adapter": "base with adapter", "merged": "fine-tuned and merged"}


def percent(value: float) -> str:
    return f"{value:.1%}"


def prose(text: str) -> str:
    """Markdown that the user wrote, with its HTML shown as text (addresses in angle brackets stay links)."""
    return re.sub(r"<(?=[A-Za-z/!?])(?!https?://|mailto:)", "&lt;", printable(text))


def setting(value: object) -> str:
    """A setting's value for a table."""
    return code_span(json.dumps(value, ensure_ascii=False))


def single_lines(value: object) -> object:
    """The value with every text on one line: a line break could end the YAML head, and start another."""
    if isinstance(value, dict):
        return {key: single_lines(item) for key, item in value.items()}
    if isinstance(value, list):
        return [single_lines(item) for item in value]
    return one_line(value) if isinstance(value, str) else value


def metrics_table(metrics: dict, models: list[str]) -> list[str]:
    """One row per model, with 95% intervals."""
    classes = "macro_f1" in metrics[models[-1]]
    second = "macro-F1 (95% interval) | outside the labels" if classes else "ROUGE-L"
    lines = [
        f"| model | accuracy (95% interval) | {second} | answer perplexity | size |",
        "|---|---|---|---|---|" + "---|" * classes,
    ]
    for name in models:
        scores = metrics[name]
        cells = [NAMES.get(name, f"{name} ONNX (this package)" if name == models[-1] else name)]
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


def metadata(section, base: dict, metrics: dict, last: str, labels: list[str] | None) -> dict:
    """The YAML head that model hubs read."""
    source = base["source"]
    head: dict = {
        "license": section.license.lower(),
        "language": list(section.language),
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-classification" if labels else "text-generation",
        "tags": ["onnx", "onnxruntime-genai", last, *section.tags],
    }
    if source.startswith("hf:"):
        head["base_model"] = source.removeprefix("hf:").partition("@")[0]
    kinds = [("accuracy", "accuracy")] + ([("f1", "macro_f1")] if labels else [("rouge", "rouge_l")])
    results = [{"type": kind, "value": metrics[last][key], "name": key} for kind, key in kinds]
    task = {"type": head["pipeline_tag"]}
    data = {"name": section.name, "type": "held-out test split"}
    head["model-index"] = [{"name": section.name, "results": [{"task": task, "dataset": data, "metrics": results}]}]
    return head


def write(section, facts: dict, form: dict, training: dict | None, gates: list[dict], table: str) -> str:
    """The whole card.

    Args:
        section: the section `package` of params.yaml.
        facts: `base`, `dataset`, `metrics`, `last`, `models`, `quantize` (the section as a dictionary, with the options that a search
            chose), `search` (search.json, or None).
        form: prompt.json.
        training: the section `finetune` as a dictionary; None without fine-tuning.
        gates: the judged gates, and `table` their text.
    """
    metrics, last, dataset, base = facts["metrics"], facts["last"], facts["dataset"], facts["base"]
    head = yaml.safe_dump(
        single_lines(metadata(section, base, metrics, last, form["labels"])),
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
    )
    rows = dataset["rows"]
    arguments = " ".join(f'"{field}"' for field in form["fields"] or ["text"])
    lines = ["---", head.rstrip(), "---", "", f"# {markdown(section.name)}", "", prose(section.intended_use), ""]
    lines += ["## How to run it", "", "    pip install onnxruntime-genai", f"    python run.py {arguments}", ""]
    lines += ["Over HTTP, as OpenAI's API, with a page to try it:", ""]
    lines += ["    pip install onnxruntime-genai starlette uvicorn pydantic", "    python serve.py", ""]
    if form["prompt"] is not None:
        lines += ["The prompt that it was trained on is in prompt.json, and run.py fills it in:", ""]
        lines += [f"    {printable(line)}" for line in re.split("\r\n|\r|\n", form["prompt"])] + [""]
    if form["labels"]:
        lines += [f"It answers with one of: {', '.join(map(markdown, form['labels']))}.", ""]
    lines += ["## What it was made from", ""]
    lines.append(
        f"- Base model: {code_span(base['source'])}" + (f", SHA-256 `{base['sha256']}`." if base.get("sha256") else ".")
    )
    if facts["adapter"]:
        lines.append(f"- Adapter, made elsewhere: {code_span(facts['adapter'])}.")
    for split, source in dataset["source"].items():
        lines.append(
            f"- Data ({split}): {code_span(source['source'])}"
            + (f", SHA-256 `{source['sha256']}`." if "sha256" in source else ".")
        )
    lines.append(
        f"- Rows: {rows['train']} to train on, {rows['eval']} for the loss during training, {rows['test']} held out for the scores below."
    )
    lines += [
        "",
        "provenance.intoto.json has the digest of every input, script, parameter and environment; bom.cdx.json is the bill of materials.",
        "",
    ]
    if training:
        keys = (
            "method",
            "lora_r",
            "lora_alpha",
            "target_modules",
            "learning_rate",
            "lr_scheduler_type",
            "num_train_epochs",
        )
        keys += ("per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "qat", "seed")
        lines += ["## Training", "", "| setting | value |", "|---|---|"]
        lines += [f"| `{key}` | {setting(training[key])} |" for key in keys] + [""]
    lines += ["## Quantization", ""]
    if search := facts["search"]:
        lines += [
            f"Candidate {search['winner']} of {len(search['candidates'])}: of those that passed the gates on {search['tuning_rows']} "
            f"tuning rows the {'smallest' if search['objective'] == 'size' else 'fastest'}.",
            "",
        ]
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| `{key}` | {setting(value)} |" for key, value in facts["quantize"].items() if key != "search"] + [""]
    lines += [
        "## Scores",
        "",
        f"On the {metrics['test_rows']} held-out rows. An answer counts as right if it is the expected one to the letter.",
        "",
    ]
    if device := metrics.get("providers", {}).get(last):
        lines += [
            f"They were computed on {device['scored_on']}, because {device['exported_for']}, which this model was exported for, was not "
            "available there. Its latency was not measured.",
            "",
        ]
    lines += [*metrics_table(metrics, facts["models"]), ""]
    if form["labels"]:
        scores = metrics[last]
        lines += [
            f"This package by label (choosing among the labels only, accuracy is {percent(scores['restricted_accuracy'])}):",
            "",
        ]
        lines += [*class_table(scores), ""]
    if any(key != "tokenizer" for key in metrics.get("parity", {})):
        lines += [
            "Step by step, over the distribution of the first answer token:",
            "",
            *parity_table(metrics["parity"]),
            "",
        ]
    lines += ["Gates that this model passed:" if gates else "No gate was set for this model.", ""]
    lines += [*(f"    {line.strip()}" for line in table.splitlines()), ""] if gates else []
    lines += ["## Limits", "", prose(section.limitations), "", "## Licence", ""]
    lines += [
        f"{markdown(section.license)}. The texts are in licenses/: {', '.join(map(markdown, sorted(set(facts['licences']))))}.",
        "",
    ]
    lines += ["## Check what you have", "", "    sha256sum --check SHA256SUMS", ""]
    return "\n".join(lines)
