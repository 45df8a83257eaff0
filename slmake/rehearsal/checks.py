"""The checks of a rehearsal: every stage on a twin, and its exports' logits against those of transformers."""

import json
from pathlib import Path

from slmake import cli, constraints, outputs, params
from slmake.data.tokenize import load_tokenizer
from slmake.errors import UserError
from slmake.export.families import mixture_of_experts, unsupported
from slmake.generation import Exported
from slmake.model_config import MOST_POSITIONS
from slmake.prompts import load_prompt
from slmake.rehearsal import chain, chat_prompts, trial, twin
from slmake.scoring import answer_metrics, constrained, gates, onnx_runner, tokenizers
from slmake.scoring.measure import ask_all
from slmake.scoring.questions import TUNING, Questions
from slmake.scoring.run import Run

LONGEST = 8192  # tokens of the longest prompt that is tried
SCORED, NEW_TOKENS = 4, 8  # test rows on which the twin is scored, and tokens that it generates there
LONGEST_ANSWER = 64  # tokens of an expected answer there: each has logits of the whole vocabulary
ROWS = 512  # largest number of test rows that the runtime's tokenizer reads and writes


def context_of(base: Path) -> int:
    """Tokens of prompt and answer together that a model reads; MOST_POSITIONS where it does not say so."""
    config = outputs.read_json(base / "config.json", output=base)
    return config.get("max_position_embeddings") or MOST_POSITIONS


def lengths(base: Path) -> list[int]:
    """Lengths of the prompts to compare: short ones, and some beyond each length at which the model changes what it computes.

    Two beyond: the runtime takes tokens back only where a prompt is little longer than a sliding window.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    limit = min(LONGEST, context_of(base))
    edges = [config.get("sliding_window"), config.get("original_max_position_embeddings")]
    edges += [
        (config.get(name) or {}).get("original_max_position_embeddings") for name in ("rope_scaling", "rope_parameters")
    ]
    beyond = {edge + more for edge in edges if isinstance(edge, int) and edge > 0 for more in (8, 32)}
    return sorted({length for length in {8, 40, *beyond} if length <= limit})


def rehearse(
    everything: params.Params, base: Path, dataset: Path, scratch: Path, of_tasks: dict[str, float], job: cli.Job
) -> dict:
    """Run the stages on the twin. Returns the checks with their figures.

    Args:
        of_tasks: figures that `evaluate.lm_eval` will find, with made-up values.

    Raises:
        UserError: a check fails; the message names it, the figure and the remedy.
    """
    stages, checks = everything.stages, {}
    config = outputs.read_json(base / "config.json", output=base)
    reason = unsupported(config) if "quantize" in stages else mixture_of_experts(config)
    if reason:
        raise UserError(f"{base}: {reason}")
    small = scratch / "twin"
    twin.make_model(base, small, twin.shrink)
    model = small
    if "finetune" in stages:
        done = chain.finetune(everything.finetune, model, dataset, scratch / "adapter", 2, job)
        checks["finetune"] = {"steps": done["steps"]}
        job.say("the twin trains")
    if {"finetune", "merge"} <= set(stages):  # an adapter from elsewhere fits the real base only
        chain.merge(everything, model, scratch / "adapter", scratch / "merged", job)
        model = scratch / "merged"
        checks["merge"] = {"merged": True}
        job.say("its adapter merges")
    if "quantize" in stages:
        checks["export"] = compare_export(everything, base, model, dataset, scratch, job)
        exported = onnx_runner.load(scratch / "asked", load_prompt(dataset))
        same = chat_prompts.compare(base, dataset, exported)
        if same:
            job.say(f"the runtime writes {same} chats as training does")
        try_tokenizer(everything, base, dataset, exported)
        try_constraints(everything, dataset, exported)
    if "evaluate" in stages and (runs := try_evaluate(everything, base, scratch, dataset, job)):
        checks["evaluate"] = {"models": list(runs)}
        job.say(f"it is scored as {', '.join(runs)}")
        if "gates" in stages:
            trial.judge(everything, dataset, runs, of_tasks)
    return checks


def try_metrics(everything: params.Params, dataset: Path) -> None:
    """Score the expected answers as if they were given, by the user's own functions those of a few rows, since these may take long.

    Raises:
        UserError: a metric has nothing to say of the rows that will be asked, or an error on one.
    """
    stages, search = everything.all.stages, everything.quantize.search
    metrics = everything.evaluate.answer_metrics
    built_in, own = ([metric for metric in metrics if bool(metric.kind) == known] for known in (True, False))
    asked = [(everything.evaluate.max_samples, ("test",))] if "evaluate" in stages else []
    asked += [(search.rows, TUNING)] if search and "quantize" in stages else []
    for limit, splits in asked if metrics else ():
        questions = Questions(dataset, limit, splits)
        answer_metrics.values_of(built_in, questions, questions.expected)
        for metric in own:
            answer_metrics.numbers_of(metric, questions, questions.expected[:SCORED])


def try_tokenizer(everything: params.Params, base: Path, dataset: Path, exported: Exported) -> None:
    """Judge by `gates.max_tokenizer_differences` how the runtime reads and writes the first rows that evaluate will ask.

    Args:
        exported: that of the twin, whose tokenizer is that of the real one.

    Raises:
        UserError: in so few rows, it already differs from training's more often than the gate allows.
    """
    evaluate, judged = everything.evaluate, {"evaluate", "gates"} <= set(everything.all.stages)
    if not judged or "onnx" not in evaluate.models or everything.gates.max_tokenizer_differences is None:
        return
    questions = Questions(dataset, min(evaluate.max_samples or ROWS, ROWS))
    found = tokenizers.compare(exported, load_tokenizer(base), questions)
    metrics = {"parity": {"tokenizer": found}}
    for entry in gates.tokenizer_gate(everything.gates, metrics, everything.quantize.precision):
        if not entry["passed"]:
            raise UserError(
                f"the runtime's tokenizer differs from training's on {entry['value']} of the prompts and answers of the first "
                f"{questions.scored} test rows; {entry['bound']} may{gates.advice(entry, metrics)}."
            )


def try_evaluate(everything: params.Params, base: Path, scratch: Path, dataset: Path, job: cli.Job) -> dict[str, Run]:
    """Score the twin on the first rows in each form that `evaluate` will score. Returns the runs by the names of these forms.

    The user's own metrics score its answers as a base model, which may say anything; what is trained may always answer in form.

    Args:
        scratch: has what the stages before made of it.

    Raises:
        UserError: an answer may be longer than what the real model reads behind the longest prompt, or a user's metric fails.
    """
    section, onnx = everything.evaluate, everything.quantize.precision
    longest, context = max(map(len, Questions(dataset, section.max_samples).prompts)), context_of(base)
    if longest + (section.max_new_tokens or 0) > context:
        raise UserError(
            f"evaluate.max_new_tokens: {section.max_new_tokens} tokens behind the longest prompt, of {longest}, are more than the model reads: "
            f"{context}. Set it to {context - longest} or less."
        )
    made = {"base": "twin", "adapter": "adapter", "merged": "merged", "onnx": "asked"}
    folders = {
        onnx if name == "onnx" else name: scratch / folder
        for name, folder in made.items()
        if name in section.models and (scratch / folder).is_dir()
    }
    section = section.model_copy(update={"latency_rows": min(section.latency_rows, 1), "constrain": "none"})
    questions = Questions(dataset, SCORED)
    if not questions.label_tokens:
        questions.answers = [answer[:LONGEST_ANSWER] for answer in questions.answers]
    new_tokens = min(section.max_new_tokens or questions.form["longest_answer_tokens"], NEW_TOKENS)
    quantized = everything.finetune if everything.merge.onto == "dequantized" else None
    runs, _ = ask_all(
        section, folders | {"adapter_base": scratch / "twin"}, onnx, quantized, questions, new_tokens, job
    )
    own = [metric for metric in section.answer_metrics if not (metric.kind or questions.without_dataset)]
    for metric in own if "base" in runs else ():
        answer_metrics.numbers_of(metric, questions, list(map(questions.read, runs["base"].texts)))
    return runs


def try_constraints(everything: params.Params, dataset: Path, exported: Exported) -> None:
    """Let the runtime make the guidance that `evaluate.constrain` and `package.constrain` ask for.

    Args:
        exported: that of the twin, whose tokenizer is that of the real one.

    Raises:
        UserError: it cannot follow one of them.
    """
    evaluate, package = (
        getattr(everything, stage).constrain if stage in everything.all.stages else "none"
        for stage in ("evaluate", "package")
    )
    if evaluate == package == "none":
        return
    if evaluate != "none":
        constrained.refuse_unfollowed(exported, evaluate, Questions(dataset, everything.evaluate.max_samples))
    if package != "none":
        exported.form = constraints.constrained(exported.form, package, lambda _: exported)
        constraints.refuse_unfollowed(exported, exported.sampling.guidance, "package.constrain")


def compare_export(
    everything: params.Params, base: Path, model: Path, dataset: Path, scratch: Path, job: cli.Job
) -> dict:
    """Export the twin in fp32 and as params.yaml asks for it, and compare the logits.

    Raises:
        UserError: the fp32 export computes other logits than transformers, or an export fails.
    """
    section, tolerance = everything.quantize, everything.rehearse.logits_tolerance
    tried = lengths(base)
    prompts = chain.prompts_of(dataset, tried)
    reference = chain.reference_logits(model, prompts)
    chain.export(chain.plain(section), model, dataset, scratch / "fp32", job)
    exported = chain.exported_logits(scratch / "fp32", prompts)
    shares = {
        str(length): round(chain.difference([a], [b]), 7)
        for length, a, b in zip(tried, reference, exported, strict=True)
    }
    worst = max(shares, key=shares.get)
    if not shares[worst] <= tolerance:
        raise UserError(
            f"the fp32 export of this architecture computes other logits than transformers: at {worst} tokens they differ by "
            f"{shares[worst]:.3g} of their spread, allowed is {tolerance:g} (rehearse.logits_tolerance). A model that was exported so would "
            "give wrong answers: use another base model, or leave quantize out of all.stages."
        )
    job.say(f"its fp32 export agrees with transformers (largest difference {shares[worst]:.1e} of the spread)")
    depth = json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    asked = chain.for_twin(section, model, depth)
    graph = chain.export(asked, model, dataset, scratch / "asked", job)
    drift = chain.difference(exported, chain.exported_logits(scratch / "asked", prompts))
    if drift == float("inf"):
        raise UserError(
            f"the {section.precision} export of the twin computes logits that are not numbers. Change the section quantize."
        )
    job.say(f"its {section.precision} export has what quantize asks for, loads and generates")
    return {
        "fp32_difference_by_prompt_tokens": shares,
        f"{section.precision}_difference": round(drift, 4),
        "graph": graph,
    }
