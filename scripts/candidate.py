"""Build and measure one candidate of a quantization search, or measure the merged model that all are compared with.

    python -m scripts.candidate --params params.yaml --candidate merged --model build/merged --dataset build/dataset --output build/search/merged
    python -m scripts.candidate --params params.yaml --candidate 0 --model build/merged --dataset build/dataset \\
        --reference build/search/merged --output build/search/0

Reads the section `quantize`. Writes measured.json (options, scores on the tuning rows, parity with merged, cost) and the
exported model in model/. A candidate that the builder refuses, or that does not load, is a result and not a failure: measured.json
says why. A machine that fails, or a file that changes meanwhile, says nothing of the candidate: then the rule fails. The tuning
rows are those of eval, and of train where eval has too few; never those of test.
"""

import json
from pathlib import Path

import numpy as np

from slmake import cli, outputs, params
from slmake.errors import NotBuildable, UserError
from slmake.export import proposals
from slmake.export.build import build
from slmake.scoring import metrics, selection
from slmake.scoring.measure import drop, measure
from slmake.scoring.onnx_runner import OnnxRunner
from slmake.scoring.questions import TUNING, Questions
from slmake.scoring.transformers_runner import TransformersRunner


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--candidate", required=True, help="number of the candidate, or `merged`")
    parser.add_argument("--model", type=Path, required=True, help="the folder of the model to export")
    parser.add_argument("--dataset", type=Path, required=True, help="the tokenized dataset's folder")
    parser.add_argument("--reference", type=Path, help="the merged model's measurements")
    parser.add_argument(
        "--batch-before", type=Path, nargs="*", default=[], help="folders of the candidates of the batch before"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    with cli.job("candidate", args.log) as job:
        everything = params.load(args.params)
        section, scoring = everything.quantize, everything.evaluate
        if section.search is None:
            raise UserError("quantize.search is not set, so there are no candidates.")
        questions = Questions(args.dataset, section.search.rows, TUNING)
        new_tokens = scoring.max_new_tokens or questions.form["longest_answer_tokens"]
        weights = metrics.resamples(questions.scored, scoring.bootstrap_samples, scoring.seed, questions.groups())
        with outputs.written(args.output) as (folder,):
            if args.candidate == "merged":
                model = TransformersRunner(args.model, scoring.batch_size, scoring.latency_rows)
                run = model.ask(questions, new_tokens, job, "merged")
                answers, scores = measure(questions, run, weights, scoring.answer_metrics)
                scores["size_bytes"] = outputs.folder_size(args.model)
                np.save(folder / "logits.npy", np.vstack(run.logits))
                result = {"rows": questions.scored, "metrics": scores, "benchmark": run.timings, "answers": answers}
            else:
                result = measure_candidate(
                    everything, int(args.candidate), args, questions, new_tokens, weights, folder, job
                )
            outputs.write_json(folder / "measured.json", result)
        if "failed" in result:
            job.say(f"candidate {args.candidate} could not be built: {result['failed'].splitlines()[0]}")
        else:
            job.say(
                f"{args.output}: accuracy {result['metrics']['accuracy']:.1%} on {questions.scored} tuning rows ({job.seconds():.0f} s)"
            )


def measure_candidate(
    everything: params.Params, number: int, args, questions, new_tokens: int, weights, folder: Path, job: cli.Job
) -> dict:
    """Propose, build and measure candidate `number`; the exported model stays in `folder`/model."""
    section, scoring = everything.quantize, everything.evaluate
    if args.reference is None:
        raise UserError("a candidate is compared with merged: give --reference.")
    measured = selection.figures_before(args.batch_before, section.search.objective)
    options = proposals.proposal(section, number, measured)
    result: dict = {"candidate": number, "options": options, "figures_before": measured}
    job.log(f"candidate {number}: {json.dumps(options)}")
    model = folder / "model"
    model.mkdir()
    try:
        build(proposals.applied(section, options), args.model, args.dataset, model, folder / ".cache", job)
    except NotBuildable as error:
        outputs.remove(model)
        return result | {"failed": str(error)}
    run = OnnxRunner(model).ask(questions, new_tokens, job, f"candidate {number}")
    answers, scores = measure(questions, run, weights, scoring.answer_metrics)
    scores["size_bytes"] = outputs.folder_size(model)
    reference = outputs.read_json(args.reference / "measured.json", "answers", output=args.reference)
    logits = np.load(args.reference / "logits.npy")
    return result | {
        "metrics": scores,
        "benchmark": run.timings,
        "parity": metrics.parity(logits, np.vstack(run.logits)),
        "drop": drop(questions, reference["answers"], answers, weights, scoring.answer_metrics),
    }


if __name__ == "__main__":
    main()
