"""params.yaml: every knob that can change a result, one section per rule.

`load` reads and validates the whole file and reports every error in it at once; `section` gives one rule its own
part. The models of the sections are the single source of names, bounds, defaults and descriptions: the JSON Schema
(docs/params.schema.json) and the reference page (docs/params.md) are generated from them (slmake/params/docs.py).
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import get_args

import yaml
from pydantic import Field, ValidationError

from slmake.cli import PLANNED
from slmake.errors import UserError
from slmake.params.adapter import Adapter
from slmake.params.all import All, Stage
from slmake.params.base import Model, Section
from slmake.params.errors import ParamsLoader, lines, models_in, yaml_problem
from slmake.params.evaluate import Evaluate
from slmake.params.fetch_model import FetchModel
from slmake.params.finetune import Finetune
from slmake.params.gates import OF_ROWS, OF_TEXTS, Gates
from slmake.params.merge import Merge
from slmake.params.metrics import parse
from slmake.params.package import Package
from slmake.params.prepare import Prepare
from slmake.params.publish import Publish
from slmake.params.quantize import Quantize
from slmake.params.rehearse import Rehearse
from slmake.params.report import Report


class Params(Section):
    """The whole file."""

    all: All = Field(default_factory=All)
    fetch_model: FetchModel
    prepare: Prepare | None = None  # null, or absent: no dataset
    rehearse: Rehearse = Field(default_factory=Rehearse)
    adapter: Adapter = Field(default_factory=Adapter)
    finetune: Finetune = Field(default_factory=Finetune)
    merge: Merge = Field(default_factory=Merge)
    quantize: Quantize = Field(default_factory=Quantize)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    gates: Gates = Field(default_factory=Gates)
    package: Package = Field(default_factory=Package)
    report: Report = Field(default_factory=Report)
    publish: Publish = Field(default_factory=Publish)

    @property
    def stages(self) -> list[str]:
        """The stages to build: those of `all.stages`, and evaluate behind quantize where no dataset shows what quantization changed."""
        chosen = set(self.all.stages) | (
            {"evaluate"} if self.prepare is None and "quantize" in self.all.stages else set()
        )
        return [stage for stage in get_args(Stage) if stage in chosen] if self.prepare is None else self.all.stages


def between_sections(data: dict) -> list[str]:
    """Mistakes between sections, one line each, in a file whose other fields may be wrong too."""

    def value(section: str, field: str) -> object:
        given = data.get(section)
        default = models_in(Params.model_fields[section].annotation)[0].model_fields[field].default
        return given.get(field, default) if isinstance(given, dict) else default

    mistakes = []
    if value("merge", "onto") == "dequantized" and value("finetune", "method") == "lora":
        mistakes.append("merge.onto: dequantized goes with finetune.method: qlora.")
    source = value("prepare", "source")
    named = [part for part in (source, value("prepare", "split")) if isinstance(part, dict) and part.get("eval")]
    eval_rows = named or value("prepare", "eval_fraction") != 0 or value("prepare", "eval_samples")
    for field, use, off in (
        ("early_stopping_patience", "when to stop", "0"),
        ("keep_best", "which adapter is the best", "false"),
    ):
        if value("finetune", field) and not eval_rows:
            mistakes.append(
                f"finetune.{field}: without eval rows nothing says {use}. Raise prepare.eval_fraction, "
                f"name a file in prepare.source.eval, or set {field} to {off}."
            )
    stages = value("all", "stages")
    if isinstance(stages, list):
        mistakes += adapter_mistakes(stages, value("adapter", "source"))
    if isinstance(stages, list) and "finetune" in stages and data.get("prepare") is None:
        mistakes.append("prepare: missing, and finetune in all.stages needs a dataset. Add it, or take finetune out.")
    if isinstance(stages, list) and "publish" in stages and not value("publish", "url"):
        mistakes.append("publish.url: missing, and all.stages lists publish. Say where to: az://container/prefix.")
    return mistakes


def adapter_mistakes(stages: list, source: object) -> list[str]:
    """Mistakes in where the adapter comes from that is to be merged, one line each."""
    if "merge" in stages and "finetune" not in stages and not source:
        return [
            "all.stages: merge needs finetune, or an adapter from elsewhere: list finetune too, or set adapter.source."
        ]
    if "finetune" in stages and source:
        return [
            "adapter.source: finetune in all.stages makes the adapter itself. Take finetune out, or set adapter.source to null."
        ]
    return []


def uncompared(checked: Params) -> list[str]:
    """Gates on drops and ratios for which evaluate scores no model to compare with, one line each."""
    stages = checked.all.stages
    if "gates" not in stages:
        return []
    built = {
        "base": True,
        "adapter": bool({"finetune", "merge"} & set(stages)),
        "merged": "merge" in stages,
        "onnx": "quantize" in stages,
    }
    scored = [model for model in get_args(Model) if model in checked.evaluate.models and built[model]]
    mistakes = []
    for name, gate in checked.gates.every().items():
        judged = scored[-1] if gate.model == "last" and scored else gate.model
        if gate.kind in ("minimum", "maximum") or gate.against == "published" or judged not in scored:
            continue
        earlier = [model for model in scored[: scored.index(judged)] if model != "adapter"]
        if not earlier if gate.against == "previous" else gate.against not in earlier:
            wanted = "merged" if built["merged"] and judged == "onnx" else "base"
            other = wanted if gate.against == "previous" else gate.against
            mistakes.append(
                f"gates.{name}: it compares {judged} with an earlier model, and evaluate.models scores none such. Add {other} there, or take "
                "the gate out."
            )
    return mistakes


def unmeasured(checked: Params) -> list[str]:
    """Gates on what evaluate does not measure of a model, and constraints that have nothing to hold, one line each."""
    mistakes = []
    for name, gate in checked.gates.every().items() if "gates" in checked.all.stages else ():
        if gate.metric.startswith("constrained_") or gate.metric == "valid":
            if checked.evaluate.constrain == "none":
                mistakes.append(
                    f"gates.{name}: {gate.metric} is measured where evaluate.constrain is set. Set it, or take the gate out."
                )
            elif gate.model not in ("last", "onnx") or gate.kind not in ("minimum", "maximum"):
                mistakes.append(
                    f"gates.{name}: only the exported model has the figure {gate.metric}. Bound it with minimum or maximum, for the model onnx."
                )
        if gate.metric.startswith("sampled_") and not checked.evaluate.sampling:
            mistakes.append(
                f"gates.{name}: {gate.metric} is measured where evaluate.sampling is set. Set it, or take the gate out."
            )
        if gate.metric.startswith("lm_eval.") and gate.model == "adapter":
            mistakes.append(
                f"gates.{name}: the harness does not run the adapter, since merged is the same function. Bound merged."
            )
    if {"package", "evaluate"} <= set(checked.stages) and "onnx" not in checked.evaluate.models:
        mistakes.append(
            "evaluate.models: a package shows the scores of its own model, the exported one. Add onnx, or take package out of all.stages."
        )
    if checked.prepare is None and "evaluate" in checked.stages and checked.evaluate.constrain != "none":
        mistakes.append(
            "evaluate.constrain: it holds answers to a dataset's rows. Add the section prepare, or set it to none."
        )
    if checked.prepare is None and "evaluate" in checked.stages and checked.evaluate.sampling:
        mistakes.append(
            "evaluate.sampling: it asks for answers to a dataset's rows. Add the section prepare, or set it to null."
        )
    if checked.prepare is None and "package" in checked.stages and checked.package.constrain in ("labels", "tools"):
        mistakes.append(
            f"package.constrain: without a dataset there are no {checked.package.constrain}. Add the section prepare, or set it to none."
        )
    return mistakes


def without_dataset(checked: Params) -> list[str]:
    """What asks for rows where there is no section prepare, and for the fixed texts where there is one; one line each."""
    stages = checked.all.stages
    gates = checked.gates.every() if "gates" in stages else {}
    if checked.prepare:
        return [
            f"gates.{name}: perplexity is of the fixed texts, for models without a dataset. Bound answer_perplexity."
            for name, gate in gates.items()
            if gate.metric in OF_TEXTS
        ]
    mistakes = []
    if checked.quantize.search and "quantize" in stages:
        mistakes.append(
            "quantize.search: candidates are compared on a dataset's rows. Add the section prepare, or set search to null."
        )
    if checked.evaluate.metrics and "evaluate" in checked.stages:
        mistakes.append(
            "evaluate.metrics: they judge answers to a dataset's rows. Add the section prepare, or empty it."
        )
    return mistakes + [
        f"gates.{name}: {gate.metric} is of rows with expected answers, and there is no section prepare. Take the gate out, or bound "
        "kl_mean, top1_agreement, perplexity, size_bytes or a latency."
        for name, gate in gates.items()
        if gate.metric in OF_ROWS or gate.metric.startswith("per_class.")
    ]


def load(path: str | Path = "params.yaml") -> Params:
    """Read and validate params.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or breaks the schema (every broken field is named at once); or this is a rule
            of a build that was planned with other values.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), ParamsLoader)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. Run from the project's folder, or restore it with `git checkout {path}`."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a parameter file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {yaml_problem(error)}.") from None
    if data is None:
        raise UserError(f"{path}: empty. Restore it with `git checkout {path}`.")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        raise UserError(f"{path}: expected sections such as `prepare:` and `finetune:`, found {kind}.")
    checked, errors = None, []
    try:
        checked = Params.model_validate(data, context={"metrics": figures_of(data)})
    except ValidationError as error:
        errors = lines(error.errors(), data, Params)
    apart = uncompared(checked) + unmeasured(checked) + without_dataset(checked) if checked else []
    unique = list(dict.fromkeys(errors + between_sections(data) + apart))
    if unique or checked is None:
        count = f"{len(unique)} error{'s' if len(unique) > 1 else ''}"
        raise UserError(
            f"{path}: {count}; nothing was run. See docs/params.md.\n" + "\n".join("  " + line for line in unique)
        )
    if PLANNED in os.environ:
        planned, now = json.loads(os.environ[PLANNED]), sums(checked)
        if changed := [name for name in now if now[name] != planned.get(name)]:
            raise UserError(
                f"{path}: {', '.join(changed)} changed after this build was planned, so it stops: what was built so far is of the "
                "former values. Run the same command again: it builds what the file asks for now."
            )
    return checked


def figures_of(data: dict) -> list[str]:
    """Figures that the file's evaluate.metrics adds; entries that are wrong are reported elsewhere."""
    section = data.get("evaluate")
    entries = section.get("metrics") if isinstance(section, dict) else None
    figures = []
    for entry in entries if isinstance(entries, list) else []:
        with contextlib.suppress(ValueError):
            figures += [parse(entry).figure] if isinstance(entry, str | dict) else []
    return figures + ["lm_eval"] * bool(isinstance(section, dict) and section.get("lm_eval"))


def sums(everything: Params) -> dict[str, str]:
    """A short SHA-256 of every section, by name."""
    return {
        name: hashlib.sha256(as_json(getattr(everything, name)).encode()).hexdigest()[:16]
        for name in type(everything).model_fields
    }


def section(path: str | Path, name: str) -> Section:
    """The validated section `name` of the params file."""
    return getattr(load(path), name)


def as_json(value: object) -> str:
    """A section with its defaults (null where it is absent) or a parameter as canonical JSON: Snakemake compares it to decide whether a rule must run again."""
    return json.dumps(value, sort_keys=True, default=lambda section: section.model_dump(mode="json"))
