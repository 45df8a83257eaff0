"""Pack the exported model into what a user ships: model, card, run.py, licences, checksums, bill of materials, provenance.

    python scripts/package.py --params params.yaml --model build/onnx-int4 --dataset build/dataset --base-report results/base.json \\
        --dataset-report results/dataset.json --metrics results/metrics.json --gates results/gates.json --lock envs/cpu.lock \\
        --materials data/dataset.json Snakefile scripts/*.py --output build/package

Reads the sections of params.yaml and what the rules before it wrote. The same inputs give the same bytes; timestamps are
SOURCE_DATE_EPOCH, and left out where it is not set. A signature (package.signing_key) has a random part of its own.
`make verify` checks a package.
"""

import os
import shutil
from pathlib import Path

from common import cli, outputs, params
from common.errors import UserError
from common.outputs import read_json
from common.prompts import load_prompt
from gates import MODELS, table
from shipping import card, records

SECTIONS = ("fetch_model", "prepare", "finetune", "merge", "quantize", "evaluate", "gates", "package")


def copy_licences(files: list[str], target: Path) -> list[str]:
    """Copy licence texts into a folder; returns their names.

    Raises:
        UserError: one is missing, or two have one name.
    """
    target.mkdir()
    names = []
    for file in files:
        source = Path(file)
        if not source.is_file():
            raise UserError(
                f"package.license_files: {file}: no such file. Correct params.yaml, or bring the file back."
            )
        if source.name in names:
            raise UserError(f"package.license_files: two files are called {source.name}. Rename one.")
        shutil.copyfile(source, target / source.name)
        names.append(source.name)
    return names


def sections(everything: params.Params) -> dict[str, str]:
    """Every section that can change a package, as canonical JSON. The signing key's path changes nothing, and is nobody's business."""
    package = everything.package.model_copy(update={"signing_key": None})
    return {name: params.as_json(package if name == "package" else getattr(everything, name)) for name in SECTIONS}


def pack(everything: params.Params, args, folder: Path) -> dict:
    """Fill `folder`; returns the facts that card and bill of materials tell."""
    section = everything.package
    for path in sorted(args.model.iterdir()):
        if path.is_file() and not path.name.startswith(".snakemake"):
            shutil.copyfile(path, folder / path.name)
    shutil.copyfile(args.dataset / "prompt.json", folder / "prompt.json")
    shutil.copyfile(Path(__file__).parent / "shipping" / "run.py", folder / "run.py")
    shutil.copyfile(args.metrics, folder / "metrics.json")
    metrics = read_json(args.metrics, "test_rows")
    gates = [
        one for one in read_json(args.gates, "gates")["gates"] if one["metric"] not in params.TIMINGS
    ]  # they differ from run to run
    models = [name for name in MODELS if name in metrics]
    search = read_json(args.search) if args.search else None
    tuned = "finetune" in everything.all.stages
    form = load_prompt(args.dataset)
    facts = {
        "base": read_json(args.base_report, "source"),
        "dataset": read_json(args.dataset_report, "source", "rows"),
        "metrics": metrics,
        "models": models,
        "last": models[-1],
        "quantize": everything.quantize.model_dump(mode="json") | (search["options"] if search else {}),
        "search": search,
        "licences": copy_licences(section.license_files, folder / "licenses"),
        "task": "text-classification" if form["labels"] else "text-generation",
        "architecture": read_json(args.model / "genai_config.json", "model", output=args.model)["model"]["type"],
    }
    training = everything.finetune.model_dump(mode="json") if tuned else None
    text = card.write(section, facts, form, training, gates, table(gates))
    (folder / "README.md").write_text(text, encoding="utf-8")

    files = records.digests(folder, ())
    bom = records.bill_of_materials(section.name, section.license, section.intended_use, facts, files, args.lock)
    (folder / records.BOM).write_text(records.canonical(bom), encoding="utf-8")
    records.check_bom((folder / records.BOM).read_text(encoding="utf-8"))

    inside = "APPTAINER_CONTAINER" in os.environ or "SINGULARITY_CONTAINER" in os.environ
    container = everything.all.container if inside else None
    statement = records.provenance(records.digests(folder, ()), args.materials, sections(everything), facts, container)
    (folder / records.PROVENANCE).write_text(records.canonical(statement), encoding="utf-8")
    records.check_statement((folder / records.PROVENANCE).read_text(encoding="utf-8"))
    (folder / records.SUMS).write_text(records.sums_text(records.digests(folder, ())), encoding="utf-8")
    return facts


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the exported model's folder")
    parser.add_argument("--dataset", type=Path, required=True, help="the tokenized dataset's folder, for prompt.json")
    parser.add_argument("--base-report", type=Path, required=True, help="what fetch_model read (base.json)")
    parser.add_argument("--dataset-report", type=Path, required=True, help="what prepare read (dataset.json)")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json of evaluate")
    parser.add_argument("--gates", type=Path, required=True, help="gates.json of gates")
    parser.add_argument("--search", type=Path, help="search.json of search, if the exported model is its winner")
    parser.add_argument("--lock", type=Path, required=True, help="the lock of the environment that built the model")
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
                records.sign(folder, Path(everything.package.signing_key))
        signed = "signed" if everything.package.signing_key else "not signed"
        count, size = len(records.files_of(args.output)), outputs.folder_size(args.output)
        job.say(f"{args.output}: {count} files, {size / 1e6:.0f} MB, {signed} ({job.seconds():.0f} s)")


if __name__ == "__main__":
    main()
