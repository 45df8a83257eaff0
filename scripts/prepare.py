"""Validate, split and tokenize the dataset; without a section `prepare`, tokenize the fixed texts that stand in for one.

    python -m scripts.prepare --params params.yaml --base build/base --output build/dataset --report results/dataset.json

Reads the section `prepare`, the dataset files that it names (on this disk or elsewhere: slmake/sources/schemes.py) and the tokenizer in
the base model's folder. Checks every row first, then writes train.parquet, eval.parquet and test.parquet (row, prompt, answer, input_ids,
labels) and prompt.json (the template for inference), and a report of rows, tokens, lengths, labels, truncation and duplicates.

The loss is taken on the answers only: labels are -100 over the prompt, and an answer ends with the end-of-text token. Of a conversation,
every turn of the assistant is an answer (prepare.train_on); the test split has a line for each, behind the turns before it.
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.data.dataset import Preparation
from slmake.data.texts import write_texts
from slmake.sources.fetching import downloading


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder (for its tokenizer)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the dataset to")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write statistics to")
    parser.add_argument(
        "--downloads", type=Path, help="folder where a broken download is kept and resumed (default: nothing is kept)"
    )
    args = parser.parse_args(argv)
    with cli.job("prepare", args.log) as job:
        everything = params.load(args.params)
        stages = everything.all.stages
        with outputs.written(args.output, [args.report]) as (folder, report):
            if everything.prepare is None:
                statistics = write_texts(args.base, folder)
            else:
                with downloading(args.downloads, folder.parent) as downloads:
                    preparation = Preparation(everything.prepare, args.base, folder, job, "evaluate" in stages)
                    statistics = preparation.run(downloads)
            outputs.write_json(report, statistics)
        if everything.prepare is None:
            job.say(
                f"no section prepare: {statistics['texts']} fixed texts in {args.output} measure and calibrate the model"
            )
            return
        counts, dropped = statistics["rows"], statistics["dropped_turns"]
        if dropped["turns"]:
            job.say(
                f"{dropped['conversations']} conversations are longer than max_seq_len: their {dropped['turns']} earliest turns were dropped"
            )
        if preparation.apart:
            job.say(
                f"the chat template changes earlier turns: {statistics['sequences']['train']} sequences of {counts['train']} conversations to train on"
            )
        for name, gate in everything.gates.every().items() if "gates" in stages else ():
            scored = statistics["sequences"]["test"]  # of conversations, an answer each
            if scored < gate.rows_needed():  # reported now, before hours of training
                job.say(
                    f"gates.{name} needs {gate.rows_needed()} test rows; there are {scored}: the build will fail at gates"
                )
        job.say(
            f"{counts['train']} train, {counts['eval']} eval and {counts['test']} test rows in {args.output} "
            f"({statistics['duplicates']['removed_from_train']} duplicates removed, {statistics['truncated']} prompts truncated, {job.seconds():.0f} s)"
        )


if __name__ == "__main__":
    main()
