"""The bill of materials of a package (CycloneDX)."""

import json
import re
import uuid
from hashlib import sha256 as hash_of
from pathlib import Path

from slmake.errors import UserError
from slmake.packaging.checksums import BOM, sums_text
from slmake.packaging.provenance import build_time


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
            figure: dict = {
                "type": key,
                "value": str(value),
                "slice": "test split" if dataset["source"] else "fixed texts",
            }
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


def check_bom(text: str, files: dict[str, str] | None = None) -> None:
    """Validate against the official CycloneDX schema, strictly, and compare its hashes with the files' own.

    Args:
        files: SHA-256 of the package's files that the bill lists; None checks the schema only.

    Raises:
        UserError: where it breaks the schema, or which files it does not list as they are.
    """
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    try:
        problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    except ValueError as error:
        raise UserError(f"{BOM} is not JSON: {error}") from None
    if problem is not None:
        raise UserError(f"{BOM} breaks the CycloneDX schema: {str(problem.data)[:300]}")
    if files is not None:
        components = [part for part in json.loads(text).get("components", []) if part["type"] == "file"]
        listed = {part["name"]: [value["content"] for value in part.get("hashes", [])] for part in components}
        wrong = [name for name in sorted(files.keys() | listed.keys()) if listed.get(name) != [files.get(name)]]
        if wrong or len(components) != len(listed):
            raise UserError(
                f"{BOM}: its files are not those of this package: {', '.join(wrong) or 'one is listed twice'}."
            )
