"""Upload the finished model to Azure Blob, then move the pointer to it.

    python -m scripts.publish --params params.yaml --model build/onnx-int4 --metrics results/metrics.json --output results/published.json
    python -m scripts.publish --verify az://container/prefix

Reads the section `publish`. The model's files go to URL/DIGEST/, where DIGEST is the SHA-256 over their names and contents, so
that the same bytes are uploaded once and no published byte ever changes. Only when all of them are there, URL/latest.json moves: digest, files
with sha256 and size, metrics, and the digest that was latest before. It moves on the condition that its ETag is the one that was read, so of
two publishers at once each sees the other's work. --verify downloads what a pointer (or URL/DIGEST) names and checks every byte.
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.packaging.blob_store import POINTER, Store, describe, publish, verify
from slmake.sources.schemes import parse


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, help="the model's folder")
    parser.add_argument("--metrics", type=Path, help="JSON file of metrics to put into the pointer")
    parser.add_argument("--output", type=Path, help="JSON file to write the receipt to")
    parser.add_argument(
        "--verify", metavar="URL", help="check what was published at az://container/prefix, and do nothing else"
    )
    args = parser.parse_args(argv)
    if not args.verify and not (args.model and args.output):
        parser.error("give --model and --output, or --verify URL")
    with cli.job("publish", args.log) as job:
        try:
            url = (
                args.verify.rstrip("/").removesuffix(f"/{POINTER}")
                if args.verify
                else params.section(args.params, "publish").url
            )
            if not url:
                raise UserError("publish.url in params.yaml says nowhere to publish to: az://container/prefix.")
            target = parse(url, must_pin=False)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        if target.kind != "az":
            raise UserError(f"{url}: not of the form az://container/prefix.")
        store = Store(target)
        if args.verify:
            manifest = verify(store, job)
            size = sum(file["size_bytes"] for file in manifest["files"].values())
            job.say(
                f"{len(manifest['files'])} files, {size / 1e6:.0f} MB: every byte is right ({manifest['digest'][:16]}…, {job.seconds():.0f} s)"
            )
            return
        manifest = describe(args.model, args.metrics)
        with outputs.written(files=[args.output]) as (output,):
            outputs.write_json(output, publish(store, args.model, manifest, job))
        job.say(
            f"{store.url}/{POINTER} points to {manifest['digest'][:16]}… ({len(manifest['files'])} files, {job.seconds():.0f} s)"
        )


if __name__ == "__main__":
    main()
