"""Run the whole chain on a shrunken twin of the base model, and estimate what the real build needs.

    python -m scripts.rehearse --params params.yaml --base build/base --dataset build/dataset --output results/rehearsal.json \\
        --estimate results/estimate.json

Reads the base model's configuration and tokenizer, params.yaml and the first training rows. The twin has the same architecture,
vocabulary, head size, norms and rotary style, but few layers and heads, and random weights from a seed. It is trained, merged and
exported as params.yaml asks for; the export's logits are compared with those of transformers. Writes which checks passed, their
figures, and the estimate of memory, time and disk. What fails here would fail after hours of training.
"""

import json
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.export.families import unsupported
from slmake.rehearsal import chain, estimate, twin

LONGEST = 8192  # tokens of the longest prompt that is tried


def lengths(base: Path) -> list[int]:
    """Lengths of the prompts to compare: short ones, and one beyond each length at which the model changes what it computes."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    limit = min(LONGEST, config.get("max_position_embeddings") or LONGEST)
    edges = [config.get("sliding_window"), config.get("original_max_position_embeddings")]
    edges += [
        (config.get(name) or {}).get("original_max_position_embeddings") for name in ("rope_scaling", "rope_parameters")
    ]
    beyond = {edge + 8 for edge in edges if isinstance(edge, int) and edge > 0}
    return sorted({length for length in {8, 40, *beyond} if length <= limit})


def rehearse(everything: params.Params, base: Path, dataset: Path, scratch: Path, job: cli.Job) -> dict:
    """Run the stages on the twin. Returns the checks with their figures.

    Raises:
        UserError: a check fails; the message names it, the figure and the remedy.
    """
    stages, checks = everything.all.stages, {}
    reason = unsupported(outputs.read_json(base / "config.json", output=base)) if "quantize" in stages else None
    if reason:
        raise UserError(f"{base}: {reason}")
    small = scratch / "twin"
    twin.make_model(base, small, twin.shrink)
    model = small
    if "finetune" in stages:
        done = chain.finetune(everything.finetune, model, dataset, scratch / "adapter", 2, job)
        checks["finetune"] = {"steps": done["steps"]}
        job.say("the twin trains")
    if "merge" in stages:
        chain.merge(everything, model, scratch / "adapter", scratch / "merged", job)
        model = scratch / "merged"
        checks["merge"] = {"merged": True}
        job.say("its adapter merges")
    if "quantize" in stages:
        checks["export"] = compare_export(everything, base, model, dataset, scratch, job)
    return checks


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


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--dataset", type=Path, required=True, help="the tokenized dataset's folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the checks that passed")
    parser.add_argument(
        "--estimate", type=Path, required=True, help="JSON file for the checks' figures and the estimate"
    )
    args = parser.parse_args(argv)
    with cli.job("rehearse", args.log) as job:
        everything = params.load(args.params)
        scratch = args.output.parent / f".{args.output.stem}.partial"
        outputs.remove(scratch)
        try:
            with outputs.written(files=[args.output, args.estimate]) as (checks_file, estimate_file):
                checks = rehearse(everything, args.base, args.dataset, scratch, job)
                outputs.write_json(checks_file, {"passed": list(checks)})  # no figures: finetune depends on this file
                needs = estimate.estimate(everything, args.base, args.dataset, scratch, job)
                section = everything.rehearse
                memory = (section.memory_gb or 0) * 1e9 or estimate.available_memory()
                disk = (section.disk_gb or 0) * 1e9 or estimate.free_disk(args.output.parent)
                outputs.write_json(
                    estimate_file,
                    {
                        "checks": checks,
                        "stages": {stage: need._asdict() for stage, need in needs.items()},
                        "memory": memory,
                        "disk": disk,
                    },
                )
                if needs:
                    job.say("what the build needs:\n" + estimate.table(needs, memory, disk))
                    if section.refuse:
                        estimate.refuse_too_large(needs, memory, disk)
        finally:
            outputs.remove(scratch)
        job.say(f"every stage works on the twin ({job.seconds():.0f} s)")


if __name__ == "__main__":
    main()
