"""Check a package: signature, checksums, bill of materials, provenance, and that the model loads and generates.

    python -m tools.verify build/package
    python -m tools.verify --key public.pem --package-only some/package

Every file that is not what it was when the package was made is named. Where this is the folder of the build, the inputs
that the provenance names (data, a local base model, scripts, locks) are compared with what is here too. Exit code 0 means all is well.
"""

import json
import re
from hashlib import sha256
from pathlib import Path

from slmake import cli, outputs, params
from slmake.azureml import settings
from slmake.errors import PUBLIC_HALF, RELINK, UserError
from slmake.export.foreign import refuse_code
from slmake.export.graph_checks import check_generates
from slmake.packaging import checksums, provenance, sbom, signature
from slmake.packaging.contents import sections
from slmake.plan import Plan
from slmake.sources.download import digest_of
from slmake.sources.fetching import sums_of
from tools.azureml import SETTINGS

OWN = (checksums.SUMS, checksums.SIGNATURE, checksums.PROVENANCE)  # what the provenance's subjects do not list


def changed_files(folder: Path) -> list[str]:
    """One line per file that is changed, missing or extra, by SHA256SUMS and the provenance's subjects."""
    names, refused = checksums.scan(folder)
    if refused:
        return refused
    for name in (checksums.SUMS, checksums.PROVENANCE, checksums.BOM):
        if name not in names:
            return [f"{name}: missing, so nothing can be checked"]
    actual = checksums.digests(folder, (checksums.SUMS, checksums.SIGNATURE))
    text = (folder / checksums.SUMS).read_text(encoding="utf-8", errors="replace")
    if text == checksums.sums_text(actual):
        return []
    listed = dict(reversed(line.split("  ", 1)) for line in text.split("\n") if "  " in line)
    try:
        subjects = subjects_of(
            json.loads((folder / checksums.PROVENANCE).read_text(encoding="utf-8", errors="replace"))
        )
    except (ValueError, KeyError, TypeError):
        subjects = {}
    return differences(actual, listed, subjects) or [f"{checksums.SUMS}: changed"]


def subjects_of(statement: dict) -> dict[str, str]:
    """SHA-256 by name of the files that the provenance is about."""
    return {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}


def differences(actual: dict[str, str], listed: dict[str, str], subjects: dict[str, str]) -> list[str]:
    """What differs between the files, SHA256SUMS and the provenance's subjects (empty if it cannot be read), one line each."""
    problems = []
    for name in sorted(actual.keys() | listed.keys() | subjects.keys()):
        if name not in actual and name not in subjects and subjects and name != checksums.PROVENANCE:
            problems.append(f"{checksums.SUMS}: names {name!r}, which is no file of the package")
        elif name not in actual:
            problems.append(f"{name}: missing")
        elif name not in listed and name not in subjects and name != checksums.PROVENANCE:
            problems.append(f"{name}: not part of the package")
        elif actual[name] != listed.get(name):
            if name in subjects and actual[name] == subjects[name]:
                problems.append(
                    f"{checksums.SUMS}: its line for {name} is damaged (the file is as the provenance says)"
                )
            elif name == checksums.PROVENANCE:
                problems.append(f"{name}: changed (or its line in {checksums.SUMS} is)")
            else:
                problems.append(f"{name}: changed")
    return list(dict.fromkeys(problems))


def replaced_sources(statement: dict) -> dict[str, str]:
    """What Azure ML read in place of sources of params.yaml, because its settings named it, by these sources."""
    read = statement["predicate"]["buildDefinition"].get("internalParameters", {})
    records = [read.get("base"), *read.get("dataset", {}).values()]
    return {record["in_place_of"]: record["source"] for record in records if record and "in_place_of" in record}


def other_settings(replaced: dict[str, str], settings_file: Path) -> list[str]:
    """One line for each source that Azure ML read and that its settings do not name any more."""
    loaded = settings.load(settings_file) if replaced and settings_file.is_file() else None
    named = [*loaded.data_files, loaded.model] if loaded else []
    return [
        f"{text}: read on Azure ML in place of {source}, and {settings_file} does not name it now; build again"
        for source, text in replaced.items()
        if text not in named
    ]


def changed_inputs(statement: dict, params_file: Path, settings_file: Path = SETTINGS) -> list[str]:
    """Inputs that are here, but no longer what the package was made from: files, a base model's folder, and sections of the parameter file."""
    now, named, added, gone, others = {}, [], [], [], []
    recorded = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    if params_file.is_file():
        everything = params.load(params_file)
        plan = Plan(everything)
        texts, named, materials = sections(everything), plan.files, plan.materials()
        now = {f"params.yaml#{name}": sha256(text.encode()).hexdigest() for name, text in texts.items()}
        names = [dependency["name"] for dependency in recorded]
        if "Snakefile" in names:  # a build's; the script alone may have been given other inputs
            sources = [source.text for source in plan.sources]
            known = {*materials, *named, *sources, str(everything.all.container).partition("@")[0]}
            replaced = replaced_sources(statement)
            others = other_settings(replaced, settings_file)
            added = [name for name in materials if name not in (*names, *replaced)]
            gone = [name for name in names if not re.search(r"[:#]", name) and name not in known]
    problems = others + [f"{name}: an input since the package was made; build again" for name in added]
    problems += [f"{name}: no input any more; build again" for name in gone]
    for dependency in recorded:
        path = Path(dependency["name"])
        if path.is_absolute() and dependency["name"] not in named:
            continue  # a foreign package may name anything
        if path.is_file():
            now[dependency["name"]] = outputs.sha256(path)
        elif path.is_dir() and dependency["name"] in named:
            now[dependency["name"]] = digest_of(sums_of(path))
        if now.get(dependency["name"], dependency["digest"]["sha256"]) != dependency["digest"]["sha256"]:
            problems.append(f"{dependency['name']}: changed since the package was made; build again")
    return problems


def check_signature(folder: Path, key: Path | None) -> str:
    """Check model.sig with a public (or private) key; returns the result as a few words.

    Raises:
        UserError: the signature does not fit, or a key is given and there is none.
    """
    if key:
        signature.check(folder, key)
        return "signature good"
    return "signature not checked (give --key)" if (folder / checksums.SIGNATURE).is_file() else "not signed"


def check(folder: Path, key: Path | None) -> tuple[dict, str]:
    """Check a package as it lies there, without its model's loading; returns its provenance and the words on its signature.

    Raises:
        UserError: it is not what was built, or its signature, provenance or bill of materials is not right.
    """
    wrong = changed_files(folder)
    if wrong:
        links = [RELINK] if any("/files/md5/" in line for line in wrong) else []
        raise UserError("\n  ".join([f"{folder} is not what was built:", *wrong, *links]))
    refuse_code(folder)
    signed = check_signature(folder, key)
    statement = provenance.check_statement((folder / checksums.PROVENANCE).read_text(encoding="utf-8"))
    files = checksums.digests(folder, OWN)
    if subjects_of(statement) != files:
        raise UserError(f"{checksums.PROVENANCE}: its subjects are not the files of this package.")
    files.pop(checksums.BOM)
    sbom.check_bom((folder / checksums.BOM).read_text(encoding="utf-8"), files)
    return statement, signed


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "package", type=Path, nargs="?", default=Path("build/package"), help="folder (default: build/package)"
    )
    parser.add_argument(
        "--key", type=Path, help="public key of the signer (default: package.signing_key of the parameter file)"
    )
    parser.add_argument("--package-only", action="store_true", help="do not compare the inputs that are in this folder")
    parser.add_argument(
        "--settings", type=Path, default=SETTINGS, help=f"settings of a build on Azure ML (default: {SETTINGS})"
    )
    args = parser.parse_args(argv)
    with cli.job("verify", args.log) as job:
        if not args.package.is_dir():
            raise UserError(f"{args.package}: no package here. Build it with `make`, or correct the folder's name.")
        key = args.key
        if key is None and Path(args.params).is_file() and not args.package_only:
            configured = params.section(args.params, "package").signing_key
            key = Path(configured) if configured else None
            if key and not key.is_file():
                raise UserError(f"package.signing_key: {key}: no such file. {PUBLIC_HALF}")
        statement, signed = check(args.package, key)
        wrong = [] if args.package_only else changed_inputs(statement, Path(args.params), args.settings)
        if wrong:
            raise UserError(f"{args.package} is whole, but not of this folder's inputs:\n  " + "\n  ".join(wrong))
        check_generates(args.package)
        for source, text in replaced_sources(statement).items():
            job.say(f"{args.package}: made of {text}, which Azure ML's settings named in place of {source}")
        job.say(
            f"{args.package}: {len(subjects_of(statement)) + 2} files as built, provenance and bill of materials valid, {signed}; loads and generates"
        )


if __name__ == "__main__":
    main()
