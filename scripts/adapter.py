"""Fetch an adapter that another trainer made, and check that it fits the base model.

    python -m scripts.adapter --params params.yaml --base build/base --output build/fetched-adapter --report results/adapter.json

Reads the section `adapter` and the folder it names: a PEFT LoRA adapter as PEFT, TRL, Axolotl, Unsloth and LLaMA-Factory write it, here
or in any source that fetch_model knows. Writes its configuration, weights and tokenizer, and a report of what was read. An adapter of
another base model, of a kind that cannot be merged exactly, with values that are not finite, or with another chat template or end token
than the base's is refused. Of `fetch_model` it reads the source, to compare it with the model that the adapter names.
"""

import shutil
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.merging.adapter import Adapter
from slmake.merging.fit import plan, tokenizer_files
from slmake.merging.trained_with import other_base, refuse_other_prompts
from slmake.model_folder import KEPT, refuse_not_finite, tensor_shapes, weight_files
from slmake.sources.fetching import downloading, fetch
from slmake.sources.schemes import parse


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the adapter to")
    parser.add_argument("--report", type=Path, required=True, help="JSON file for what was read")
    parser.add_argument("--downloads", type=Path, help="folder for downloads, kept where they fail")
    args = parser.parse_args(argv)
    with cli.job("adapter", args.log) as job:
        section = params.section(args.params, "adapter")
        if section.source is None:
            raise UserError("adapter.source is not set: name the adapter's folder, or list finetune in all.stages.")
        with outputs.written(args.output, [args.report]) as (folder, report):
            with downloading(args.downloads, folder.parent) as downloads:
                path, record = fetch(parse(section.source), "model", downloads, job, section.sha256)
                if not path.is_dir():
                    raise UserError(f"adapter.source: {path.name} is a file. Name the adapter's folder.")
                adapter = Adapter(path, section.source)
                shapes: dict[str, list[int]] = {}
                for file in weight_files(args.base):
                    shapes |= tensor_shapes(file)
                tokenizer_files(adapter, args.base, plan(adapter, args.base, shapes))  # refused here, before long work
                refuse_other_prompts(adapter, args.base)
                refuse_not_finite([adapter.weights], section.source)
                for file in sorted(path.iterdir()):
                    if file.is_file() and (file.suffix in KEPT or file == adapter.weights):
                        shutil.copyfile(file, folder / file.name)
            outputs.write_json(report, record)
        if warning := other_base(adapter, args.base, params.section(args.params, "fetch_model").source):
            job.say(warning)
        job.say(f"{args.output}: {len(adapter.changes)} tensors of the base change ({job.seconds():.1f} s)")


if __name__ == "__main__":
    main()
