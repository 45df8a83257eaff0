"""Check a package: signature, checksums, bill of materials, provenance, and that the model loads and generates.

    python -m tools.verify build/package
    python -m tools.verify --key public.pem --package-only some/package

Every file that is not what it was when the package was made is named. Where this is the folder of the build, the inputs
that the provenance names (data, scripts, locks) are compared with what is here too. Exit code 0 means all is well.
"""

import json
import tempfile
from hashlib import sha256
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.export.graph_checks import check_generates
from slmake.packaging import checksums, provenance, sbom
from slmake.packaging import signature as signature_module
from slmake.packaging.contents import sections


def changed_files(folder: Path) -> list[str]:
    """One line per file that is changed, missing or extra, by SHA256SUMS and the provenance's subjects."""
    for name in (checksums.SUMS, checksums.PROVENANCE, checksums.BOM):
        if not (folder / name).is_file():
            return [f"{name}: missing, so nothing can be checked"]
    actual = checksums.digests(folder, (checksums.SUMS, checksums.SIGNATURE))
    text = (folder / checksums.SUMS).read_text(encoding="utf-8", errors="replace")
    if text == checksums.sums_text(actual):
        return []
    listed = dict(reversed(line.split("  ", 1)) for line in text.split("\n") if "  " in line)
    try:
        statement = json.loads((folder / checksums.PROVENANCE).read_text(encoding="utf-8", errors="replace"))
        subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    except (ValueError, KeyError, TypeError):
        subjects = {}
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
    return list(dict.fromkeys(problems)) or [f"{checksums.SUMS}: changed"]


def changed_inputs(statement: dict, params_file: Path) -> list[str]:
    """Inputs that are here, but no longer what the package was made from: files, and sections of the parameter file."""
    now = {}
    if params_file.is_file():
        texts = sections(params.load(params_file))
        now = {f"params.yaml#{name}": sha256(text.encode()).hexdigest() for name, text in texts.items()}
    problems = []
    for dependency in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        path = Path(dependency["name"])
        if path.is_file() and not path.is_absolute():
            now[dependency["name"]] = outputs.sha256(path)
        if now.get(dependency["name"], dependency["digest"]["sha256"]) != dependency["digest"]["sha256"]:
            problems.append(f"{dependency['name']}: changed since the package was made; build again")
    return problems


def check_signature(folder: Path, key: Path | None) -> str:
    """Check model.sig with a public (or private) key; returns what to say of it.

    Raises:
        UserError: the signature does not fit, or a key is given and there is none.
    """
    signature = folder / checksums.SIGNATURE
    if key is None:
        return "signature not checked (give --key)" if signature.is_file() else "not signed"
    if not signature.is_file():
        raise UserError(f"{checksums.SIGNATURE}: missing, but a key is given: this package was not signed.")
    from model_signing import hashing, verifying

    with tempfile.NamedTemporaryFile(suffix=".pem") as public:
        public.write(signature_module.public_key(key))
        public.flush()
        ignored = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)
        try:
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path(public.name))
            verifier.set_hashing_config(ignored).verify(folder, signature)
        except Exception as error:
            reason = str(error).splitlines()
            raise UserError(
                f"{checksums.SIGNATURE}: does not fit this package and key ({reason[0] if reason else type(error).__name__})."
            ) from None
    return "signature good"


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "package", type=Path, nargs="?", default=Path("build/package"), help="folder (default: build/package)"
    )
    parser.add_argument(
        "--key", type=Path, help="public key of the signer (default: package.signing_key of the parameter file)"
    )
    parser.add_argument("--package-only", action="store_true", help="do not compare the inputs that are in this folder")
    args = parser.parse_args(argv)
    with cli.job("verify", args.log) as job:
        if not args.package.is_dir():
            raise UserError(f"{args.package}: no package here. Build it with `make`.")
        key = args.key
        if key is None and Path(args.params).is_file() and not args.package_only:
            configured = params.section(args.params, "package").signing_key
            key = Path(configured) if configured else None
        wrong = changed_files(args.package)
        if wrong:
            raise UserError(f"{args.package} is not what was built:\n  " + "\n  ".join(wrong))
        signed = check_signature(args.package, key)
        statement = provenance.check_statement((args.package / checksums.PROVENANCE).read_text(encoding="utf-8"))
        subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
        own = (checksums.SUMS, checksums.SIGNATURE, checksums.PROVENANCE)
        if subjects != checksums.digests(args.package, own):
            raise UserError(f"{checksums.PROVENANCE}: its subjects are not the files of this package.")
        sbom.check_bom((args.package / checksums.BOM).read_text(encoding="utf-8"))
        wrong = [] if args.package_only else changed_inputs(statement, Path(args.params))
        if wrong:
            raise UserError(f"{args.package} is whole, but not of this folder's inputs:\n  " + "\n  ".join(wrong))
        check_generates(args.package)
        job.say(
            f"{args.package}: {len(subjects) + 2} files as built, provenance and bill of materials valid, {signed}; loads and generates"
        )


if __name__ == "__main__":
    main()
