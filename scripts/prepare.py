"""Validate, split and tokenize the dataset.

    python -m scripts.prepare --params params.yaml --base build/base --output build/dataset --report results/dataset.json

Reads the section `prepare`, the dataset files it names (here or elsewhere: slmake/sources/schemes.py) and the tokenizer in the base model's folder. Checks every row
first, then writes train.parquet, eval.parquet and test.parquet (row, prompt, answer, input_ids, labels) and
prompt.json (the template for inference), and a report of rows, tokens, lengths, labels, truncation and duplicates.

The loss is taken on the answer only: labels are -100 over the prompt, and the answer ends with the end-of-text token.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from slmake import cli, outputs, params
from slmake.data.splits import FEW_ANSWERS, SPLITS, check_labels, check_test_split, drop_duplicates, split_rows
from slmake.data.store import Store
from slmake.data.template import Form, read_valid
from slmake.data.tokenize import BATCH, Tokenize, Writer, lengths_summary, load_tokenizer
from slmake.errors import UserError
from slmake.sources.fetching import downloading, fetch
from slmake.sources.schemes import parse


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder (for its tokenizer)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the dataset to")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write statistics to")
    parser.add_argument(
        "--downloads", type=Path, help="folder where a broken download is kept and goes on (default: nothing is kept)"
    )
    args = parser.parse_args(argv)
    with cli.job("prepare", args.log) as job:
        everything = params.load(args.params)
        section = everything.prepare
        with outputs.written(args.output, [args.report]) as (folder, report):
            with downloading(args.downloads, folder.parent) as downloads:
                statistics = prepare(section, args.base, folder, downloads, job, "evaluate" in everything.all.stages)
            outputs.write_json(report, statistics)
        counts = statistics["rows"]
        for name, gate in everything.gates.every().items() if "gates" in everything.all.stages else ():
            if counts["test"] < gate.rows_needed():  # said now, before hours of training
                job.say(
                    f"gates.{name} needs {gate.rows_needed()} test rows; there are {counts['test']}: the build will fail at gates"
                )
        job.say(
            f"{counts['train']} train, {counts['eval']} eval and {counts['test']} test rows in {args.output} "
            f"({statistics['duplicates']['removed_from_train']} duplicates removed, {statistics['truncated']} prompts truncated, {job.seconds():.0f} s)"
        )


def prepare(section: params.Prepare, base: Path, folder: Path, downloads: Path, job: cli.Job, scored: bool) -> dict:
    """Run all of it: bring remote files here, validate into a temporary store, split, drop duplicates, tokenize.

    Args:
        scored: evaluate will score the test split, so it must not be empty.

    Returns:
        The statistics.
    """
    tokenizer = load_tokenizer(base)
    check_room(section, base)
    form = Form(section, tokenizer)
    files = {name: fetch(parse(text), "dataset", downloads, job) for name, text in section.files.items()}

    with Store(folder / ".rows.sqlite", FEW_ANSWERS) as store:
        sizes = {name: store.add(read_valid(file.record["source"], form, file.path)) for name, file in files.items()}
        split = split_rows(section, store, sizes)
        if scored:
            check_test_split(section, split)
        before = split.copy()
        drop_duplicates(section, store, split)
        gone = {name: int(((before == i) & (split < 0)).sum()) for i, name in enumerate(SPLITS)}
        labels = check_labels(store, split, before)
        within = store.exact_duplicates(split == 0)

        tokenize = Tokenize(section, tokenizer, form.special_tokens)
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        writers = [
            Writer(folder / f"{name}.parquet", section, pad_id, section.strategy == "join" and name != "test")
            for name in SPLITS
        ]
        with job.progress(int((split >= 0).sum()), "rows") as bar:
            for numbers, batch in store.batches(BATCH):
                for index, writer in enumerate(writers):
                    chosen = [row for row, own in zip(batch, split[numbers] == index, strict=True) if own]
                    if chosen:
                        writer.write(chosen, tokenize(chosen))
                        bar.update(len(chosen))
        for writer in writers:
            writer.close()
        answers, codes = store.answers(), store.answer_codes().copy()

    outputs.write_json(
        folder / "prompt.json",
        {
            "prompt": form.head,
            "answer": form.tail,
            "fields": form.prompt_fields,
            "add_special_tokens": form.special_tokens,
            "end_token": tokenizer.eos_token,
            "end_token_id": tokenizer.eos_token_id,
            "labels": labels,
            "longest_answer_tokens": tokenize.longest_answer,
        },
    )
    per_label = {}
    for index, name in enumerate(SPLITS):
        numbers, amounts = np.unique(codes[split == index], return_counts=True)
        per_label[name] = (
            {answers[code]: int(amount) for code, amount in zip(numbers, amounts, strict=True)} if labels else {}
        )
    return {
        "source": {name: file.record for name, file in files.items()},
        "rows": {"read": len(split), **{name: int((split == index).sum()) for index, name in enumerate(SPLITS)}},
        "sequences": {name: sum(writer.lengths.values()) for name, writer in zip(SPLITS, writers, strict=True)},
        "tokens": {name: writer.tokens for name, writer in zip(SPLITS, writers, strict=True)},
        "answer_tokens": {name: writer.answer_tokens for name, writer in zip(SPLITS, writers, strict=True)},
        "length": lengths_summary(sum((writer.lengths for writer in writers), Counter())),
        "labels": per_label,
        "truncated": tokenize.truncated,
        "duplicates": {"removed_from_train": gone["train"], "removed_from_eval": gone["eval"], "within_train": within},
    }


def check_room(section: params.Prepare, base: Path) -> None:
    """Raise UserError where rows may be longer than what the base model reads."""
    config = base / "config.json"
    room = outputs.read_json(config, output=base).get("max_position_embeddings") if config.is_file() else None
    if room and section.max_seq_len > room:
        raise UserError(
            f"prepare.max_seq_len: {section.max_seq_len} is more than the base model reads: {room} tokens (max_position_embeddings in "
            f"{config}). Lower it."
        )


if __name__ == "__main__":
    main()
