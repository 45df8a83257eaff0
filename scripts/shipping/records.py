"""What a package says of itself: checksums, bill of materials, provenance. The same inputs give the same bytes."""

import json
import os
import re
import uuid
from datetime import UTC, datetime
from hashlib import sha256 as hash_of
from pathlib import Path

from common import outputs
from common.errors import UserError

SUMS, BOM, PROVENANCE, SIGNATURE = "SHA256SUMS", "bom.cdx.json", "provenance.intoto.json", "model.sig"
BUILD_TYPE = "urn:slmake:package:v1"


def files_of(folder: Path) -> list[str]:
    """Names of a package's files, sorted, without Snakemake's own marker."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".snakemake")
    )


def build_time() -> str | None:
    """SOURCE_DATE_EPOCH (https://reproducible-builds.org/specs/source-date-epoch/) as RFC 3339, or None where it is not set.

    Raises:
        UserError: it is no whole number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"SOURCE_DATE_EPOCH={text}: it must be a whole number of seconds since 1970.")
    return datetime.fromtimestamp(int(text), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def digests(folder: Path, leave_out: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of every file of a package but those left out."""
    return {name: outputs.sha256(folder / name) for name in files_of(folder) if name not in leave_out}


def sums_text(found: dict[str, str]) -> str:
    """The content of SHA256SUMS, as `sha256sum --check` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))


def canonical(value: object) -> str:
    """JSON with sorted keys, indented, with a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


# -- bill of materials ---------------------------------------------------------------------------------------------------


def locked(lock: Path) -> list[tuple[str, str]]:
    """Names and versions of the packages that a lock file pins."""
    return re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", lock.read_text(encoding="utf-8"), re.M)


def bill_of_materials(name: str, licence: str, use: str, facts: dict, files: dict[str, str], lock: Path) -> dict:
    """A CycloneDX 1.6 machine-learning bill of materials (https://cyclonedx.org/docs/1.6/json/).

    Args:
        facts: `task`, `architecture`, `base` (results/base.json), `dataset` (results/dataset.json), `metrics`, `last`.
        files: SHA-256 of the package's files.
        lock: the environment's lock file.
    """
    base, dataset, last = facts["base"], facts["dataset"], facts["metrics"][facts["last"]]
    digest = hash_of(sums_text(files).encode()).hexdigest()
    figures = []
    for key, value in last.items():
        if isinstance(value, (int, float)) and not key.endswith(("_low", "_high")):
            figure: dict = {"type": key, "value": str(value), "slice": "test split"}
            if f"{key}_low" in last:
                figure["confidenceInterval"] = {
                    "lowerBound": str(last[f"{key}_low"]),
                    "upperBound": str(last[f"{key}_high"]),
                }
            figures.append(figure)
    data_components = [
        {
            "type": "data",
            "bom-ref": f"data:{split}",
            "name": source["source"],
            "hashes": [{"alg": "SHA-256", "content": source["sha256"]}] if "sha256" in source else [],
            "data": [{"type": "dataset", "name": split}],
        }
        for split, source in dataset["source"].items()
    ]
    base_component: dict = {
        "type": "machine-learning-model",
        "bom-ref": "base-model",
        "name": base["source"],
    }
    if base.get("sha256"):
        base_component["hashes"] = [{"alg": "SHA-256", "content": base["sha256"]}]
    libraries = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{package.lower()}@{version}",
            "name": package,
            "version": version,
            "purl": f"pkg:pypi/{package.lower()}@{version}",
            "scope": "required" if package == "onnxruntime-genai" else "excluded",
        }
        for package, version in locked(lock)
    ]
    contents = [
        {"type": "file", "bom-ref": f"file:{file}", "name": file, "hashes": [{"alg": "SHA-256", "content": value}]}
        for file, value in sorted(files.items())
    ]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": digest[:16],
        "licenses": [{"license": {"id": licence}}],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": facts["task"],
                "architectureFamily": "transformer",
                "modelArchitecture": facts["architecture"],
                "datasets": [{"ref": component["bom-ref"]} for component in data_components],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": figures},
            "considerations": {"useCases": [use]},
        },
    }
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": [{"type": "application", "name": "slmake"}]},
            "component": model,
        },
        "components": [base_component, *data_components, *contents, *libraries],
        "dependencies": [
            {
                "ref": "model",
                "dependsOn": [
                    "base-model",
                    *(c["bom-ref"] for c in data_components),
                    *(c["bom-ref"] for c in contents),
                ],
            }
        ],
    }
    if build_time():
        document["metadata"]["timestamp"] = build_time()
    return document


def check_bom(text: str) -> None:
    """Validate against the official CycloneDX schema, strictly.

    Raises:
        UserError: where it breaks the schema.
    """
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    try:
        problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    except ValueError as error:
        raise UserError(f"{BOM} is not JSON: {error}") from None
    if problem is not None:
        raise UserError(f"{BOM} breaks the CycloneDX schema: {str(problem.data)[:300]}")


# -- provenance ----------------------------------------------------------------------------------------------------------


def provenance(
    files: dict[str, str],
    materials: list[Path],
    sections: dict[str, str],
    recorded: dict,
    container: str | None = None,
) -> dict:
    """An in-toto statement (https://in-toto.io/Statement/v1) with SLSA provenance (https://slsa.dev/spec/v1.0/provenance).

    Args:
        files: SHA-256 of the package's files: the statement's subjects.
        materials: what the build read: data, scripts, locks, container recipes.
        sections: params.yaml's sections as canonical JSON.
        recorded: what fetch_model and prepare wrote of the sources they read.
        container: the image that rules ran in, as NAME@sha256:DIGEST; None outside of containers.
    """
    dependencies = [
        {"name": path.as_posix(), "digest": {"sha256": outputs.sha256(path)}} for path in sorted(set(materials))
    ]
    dependencies += [
        {"name": f"params.yaml#{name}", "digest": {"sha256": hash_of(text.encode()).hexdigest()}}
        for name, text in sorted(sections.items())
    ]
    known = {one["name"] for one in dependencies}
    for source in (recorded["base"], *recorded["dataset"]["source"].values()):
        if source.get("sha256") and source["source"] not in known:
            dependencies.append({"name": source["source"], "digest": {"sha256": source["sha256"]}})
    if container:
        name, _, digest = container.partition("@sha256:")
        dependencies.append({"name": name, "digest": {"sha256": digest}})
    details: dict = {"builder": {"id": "urn:slmake:snakemake"}}
    if build_time():
        details["metadata"] = {"startedOn": build_time(), "finishedOn": build_time()}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {name: json.loads(text) for name, text in sorted(sections.items())},
                "internalParameters": {"base": recorded["base"], "dataset": recorded["dataset"]["source"]},
                "resolvedDependencies": dependencies,
            },
            "runDetails": details,
        },
    }


def check_statement(text: str) -> dict:
    """The provenance as a dictionary, if it is a valid in-toto statement with SLSA provenance.

    Raises:
        UserError: it is not.
    """
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.v1.statement import Statement

    try:
        found = json.loads(text)
        statement = json_format.Parse(text, Statement([], "", {}).pb)
        Statement.copy_from_pb(statement).validate()
        json_format.ParseDict(found["predicate"], Provenance())
    except Exception as error:
        reason = str(error).splitlines()
        raise UserError(
            f"{PROVENANCE} is no valid provenance: {reason[0] if reason else type(error).__name__}"
        ) from None
    return found


# -- signature -----------------------------------------------------------------------------------------------------------


def sign(folder: Path, key: Path) -> None:
    """Sign every file of a package with an elliptic-curve key (OpenSSF model signing); the signature is model.sig.

    Raises:
        UserError: the key cannot be read.
    """
    from model_signing import hashing, signing

    if not key.is_file():
        raise UserError(
            f"package.signing_key: {key}: no such file. Make one: openssl ecparam -name prime256v1 -genkey -noout -out {key}"
        )
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"package.signing_key: {key}: no elliptic-curve private key in PEM form without password ({error})."
        ) from None
    ignored = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)
    signer.set_hashing_config(ignored).sign(folder, folder / SIGNATURE)


def public_key(key: Path) -> bytes:
    """The public half, in PEM form, of a private or public key file.

    Raises:
        UserError: no key in it.
    """
    from cryptography.hazmat.primitives import serialization

    try:
        data = key.read_bytes()
        try:
            public = serialization.load_pem_private_key(data, password=None).public_key()
        except (ValueError, TypeError):
            public = serialization.load_pem_public_key(data)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: no key in PEM form: {error}") from None
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
