"""Fold the adapter into the base model, tensor by tensor.

    python -m scripts.merge --params params.yaml --base build/base --adapter build/adapter --output build/merged

Reads the section `merge` (and `finetune.method`, to check that `onto` fits), the base model's safetensors shards and a PEFT
LoRA adapter of any trainer: with rank stabilization, DoRA, rank and alpha patterns, trained biases, modules_to_save, trained tokens,
a resized vocabulary. Writes the merged model with the same shards, configuration and tokenizer. No more than one tensor is in
memory at a time, whatever the model's size. W' = W + s B A in float32 (Hu et al. 2021, arXiv:2106.09685), with s as PEFT
computes it, so that the result equals `merge_and_unload` bit for bit in float32 (slmake/merging/merge.py has the exceptions).
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.merging.merge import merge


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the merged model to")
    args = parser.parse_args(argv)
    with cli.job("merge", args.log) as job:
        everything = params.load(args.params)
        with outputs.written(args.output) as (folder,):
            merge(everything.merge, everything.finetune, args.base, args.adapter, folder, job)
        job.say(
            f"merged model in {args.output} ({outputs.folder_size(args.output) / 1e6:.0f} MB, {job.seconds():.1f} s)"
        )


if __name__ == "__main__":
    main()
