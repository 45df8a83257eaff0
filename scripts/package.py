"""Pack the exported model into what a user ships: model, card, run.py, licences, checksums, bill of materials, provenance.

    python -m scripts.package --params params.yaml --model build/onnx-int4 --dataset build/dataset --base-report results/base.json \\
        --dataset-report results/dataset.json --metrics results/metrics.json --gates results/gates.json --locks envs/*.lock \\
        --materials data/dataset.json Snakefile scripts/*.py --output build/package

Reads the sections of params.yaml and what the rules before it wrote. The same inputs give the same bytes; timestamps are
SOURCE_DATE_EPOCH, and omitted where it is not set. A signature (package.signing_key) has a random part of its own.
`make verify` checks a package.
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.packaging import checksums, signature
from slmake.packaging.contents import pack


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the exported model's folder")
    parser.add_argument("--dataset", type=Path, required=True, help="the tokenized dataset's folder, for prompt.json")
    parser.add_argument("--base-report", type=Path, required=True, help="what fetch_model read (base.json)")
    parser.add_argument("--dataset-report", type=Path, required=True, help="what prepare read (dataset.json)")
    parser.add_argument("--adapter", type=Path, help="what adapter read (adapter.json), if it was not trained here")
    parser.add_argument("--losses", type=Path, help="the loss curve of finetune, if the model was trained here")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json of evaluate")
    parser.add_argument("--gates", type=Path, required=True, help="gates.json of gates")
    parser.add_argument("--search", type=Path, help="search.json of search, if the exported model is its winner")
    parser.add_argument(
        "--locks", type=Path, nargs="+", required=True, help="locks of environments that may have built it"
    )
    parser.add_argument(
        "--materials", type=Path, nargs="*", default=[], help="files whose digests go into the provenance"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the package to")
    args = parser.parse_args(argv)
    with cli.job("package", args.log) as job:
        everything = params.load(args.params)
        if not (args.model / "genai_config.json").exists():
            raise UserError(
                f"{args.model}: no exported model here. Build it with `snakemake --cores all {args.model}`."
            )
        with outputs.written(args.output) as (folder,):
            pack(everything, args, folder)
            if everything.package.signing_key:
                signature.sign(folder, Path(everything.package.signing_key))
        signed = "signed" if everything.package.signing_key else "not signed"
        count, size = len(checksums.files_of(args.output)), outputs.folder_size(args.output)
        job.say(f"{args.output}: {count} files, {size / 1e6:.0f} MB, {signed} ({job.seconds():.0f} s)")


if __name__ == "__main__":
    main()
