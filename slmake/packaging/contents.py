"""What is in a package, and how its folder is filled."""

import os
import shutil
from functools import partial
from pathlib import Path

from slmake import cli, params, serve
from slmake.constraints import constrained
from slmake.csv_files import read_csv
from slmake.errors import UserError
from slmake.outputs import read_json, write_json
from slmake.packaging import card, checksums, local_runtimes, provenance, sbom
from slmake.plan import SECTIONS
from slmake.prompts import load_prompt
from slmake.scoring import onnx_runner
from slmake.scoring.gates import MODELS


def copy_licences(files: list[str], target: Path) -> list[str]:
    """Copy licence texts, of different names, into a folder; returns their names.

    Raises:
        UserError: one is missing.
    """
    target.mkdir()
    names = []
    for file in files:
        source = Path(file)
        if not source.is_file():
            raise UserError(
                f"package.license_files: {file}: no such file. Correct params.yaml, or bring the file back."
            )
        shutil.copyfile(source, target / source.name)
        names.append(source.name)
    return names


def sections(everything: params.Params) -> dict[str, str]:
    """Every section that can change a package, as canonical JSON. The signing key's path changes nothing and is left out."""
    package = everything.package.model_copy(update={"signing_key": None})
    return {
        name: params.as_json(package if name == "package" else getattr(everything, name))
        for name in SECTIONS["package"]
    }


def providers(quantize: dict, metrics: dict) -> dict:
    """The execution providers that the exported model was made for, and that its figures were taken on; empty if it was not scored."""
    name, provider = quantize["precision"], quantize["execution_provider"]
    same = {"exported_for": provider, "scored_on": provider}
    return {name: metrics.get("providers", {}).get(name, same)} if name in metrics else {}


def trained(losses: Path) -> dict:
    """The `step` and `epoch` at which a training ended, its `processes` and their `threads`: the last line of its loss curve.

    Raises:
        UserError: the file is not there, damaged or empty.
    """
    lines = read_csv(losses, ("step", "epoch", "processes", "threads"))
    if not lines:
        raise UserError(f"{losses} has no line. Remove it and run snakemake: it is built again.")
    return lines[-1]


def pack(everything: params.Params, args, folder: Path) -> dict:
    """Fill `folder`; returns the facts that card and bill of materials tell."""
    section = everything.package
    for path in sorted(args.model.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    form = load_prompt(args.dataset)
    write_json(folder / "prompt.json", constrained(form, section.constrain, partial(onnx_runner.load, args.model)))
    for module, name in (*serve.FILES.items(), ("serve", "serve.py")):
        shutil.copyfile(Path(serve.__file__).with_name(f"{module}.py"), folder / name)
    local_runtimes.write(folder, section.name, form)
    shutil.copyfile(args.metrics, folder / "metrics.json")
    metrics = read_json(args.metrics, "test_rows")
    gates = read_json(args.gates, "gates")["gates"]
    models = [name for name in MODELS if name in metrics]
    search = read_json(args.search) if args.search else None
    tuned = "finetune" in everything.all.stages
    facts = {
        "base": read_json(args.base_report, "source"),
        "adapter": read_json(args.adapter, "source") if args.adapter else None,
        "trained": trained(args.losses) if args.losses else None,
        "dataset": read_json(args.dataset_report, "source", "rows"),
        "metrics": metrics,
        "limit": everything.evaluate.max_samples,
        "models": models,
        "last": models[-1],
        "quantize": everything.quantize.model_dump(mode="json") | (search["options"] if search else {}),
        "search": search,
        "constrained": card.held_answers(section.constrain, everything.evaluate.constrain, metrics[models[-1]]),
        "licences": copy_licences(section.license_files, folder / "licenses"),
        "task": "text-classification" if form["labels"] else "text-generation",
        "architecture": read_json(args.model / "genai_config.json", "model", output=args.model)["model"]["type"],
    }
    training = everything.finetune.model_dump(mode="json") if tuned else None
    text = card.write(section, facts, form, training, gates)
    (folder / "README.md").write_text(text, encoding="utf-8")

    files = checksums.digests(folder, ())
    bom = sbom.bill_of_materials(section.name, section.license, section.intended_use, facts, files, args.locks)
    (folder / checksums.BOM).write_text(checksums.canonical(bom), encoding="utf-8")
    sbom.check_bom((folder / checksums.BOM).read_text(encoding="utf-8"))

    # A shell may be in a container of its own, in which Snakemake started no rule.
    container = everything.all.container if os.environ.get(cli.IMAGE) == everything.all.container else None
    facts["providers"] = providers(facts["quantize"], metrics)
    statement = provenance.provenance(
        checksums.digests(folder, ()), args.materials, sections(everything), facts, container
    )
    (folder / checksums.PROVENANCE).write_text(checksums.canonical(statement), encoding="utf-8")
    provenance.check_statement((folder / checksums.PROVENANCE).read_text(encoding="utf-8"))
    (folder / checksums.SUMS).write_text(checksums.sums_text(checksums.digests(folder, ())), encoding="utf-8")
    return facts
