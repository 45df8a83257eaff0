"""The bill of materials of a package (CycloneDX)."""

import json
import re
import uuid
from hashlib import sha256 as hash_of
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

from slmake.errors import UserError
from slmake.packaging import card
from slmake.packaging.checksums import BOM, sums_text
from slmake.packaging.provenance import build_time
from slmake.scoring.metrics import held_out

BESIDE = "torch"  # installed beside the lock: its CPU and CUDA builds have different hashes
ADDED = "lm-eval.lock"  # of packages that are added to an environment
RUNTIMES = ("onnxruntime-genai", "onnxruntime-genai-cuda")


def locked(lock: Path) -> tuple[dict[str, set[str]], set[str]]:
    """The versions of each package that a lock file pins, and the packages that it pins for some Pythons or platforms only."""
    pinned: dict[str, set[str]] = {}
    conditional: set[str] = set()
    lines = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)( ;)?", lock.read_text(encoding="utf-8"), re.M)
    for package, version, condition in lines:
        pinned.setdefault(package, set()).add(version)
        conditional |= {package} if condition else set()
    return pinned, conditional


def installed(package: str) -> str | None:
    """The version of a package that is installed here; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hashes(content: str | None) -> list[dict]:
    """A component's hashes; none without a digest."""
    return [{"alg": "SHA-256", "content": content}] if content else []


def performance(scores: dict, rows: str) -> list[dict]:
    """The scores of a model as performance metrics, with their intervals; `rows` says of what they are."""
    metrics = []
    for key, value in scores.items():
        if isinstance(value, (int, float)) and not key.endswith(("_low", "_high")):
            metric: dict = {"type": key, "value": str(value), "slice": rows}
            if f"{key}_low" in scores:
                bounds = {"lowerBound": str(scores[f"{key}_low"]), "upperBound": str(scores[f"{key}_high"])}
                metric["confidenceInterval"] = bounds
            metrics.append(metric)
    return metrics


def made_from(facts: dict) -> list[dict]:
    """The models that were read, as components: the base model, and an adapter that was made elsewhere."""
    names = {"base-model": facts["base"], "adapter": facts.get("adapter")}
    return [fetched(name, record) for name, record in names.items() if record]


def fetched(name: str, record: dict) -> dict:
    """A model that was read, as a component."""
    component: dict = {"type": "machine-learning-model", "bom-ref": name, "name": record["source"]}
    return component | ({"hashes": hashes(record["sha256"])} if record.get("sha256") else {})


def data(sources: dict) -> list[dict]:
    """The splits of the dataset as components."""
    return [
        {
            "type": "data",
            "bom-ref": f"data:{split}",
            "name": source["source"],
            "hashes": hashes(source.get("sha256")),
            "data": [{"type": "dataset", "name": split}],
        }
        for split, source in sources.items()
    ]


def libraries(locks: list[Path]) -> list[dict]:
    """The packages of the environment as components; a user of the package needs the runtime only.

    They are those that are installed, of any lock: one is of a CPU's environment, one of a GPU's. The version is the one that is installed;
    where the locks have another or none, or a package of all environments is not here, a property says so.
    """
    components = []
    pinned: dict[str, set[str]] = {}
    expected: list[set[str]] = []
    for lock in locks:
        versions, conditional = locked(lock)
        expected += [versions.keys() - conditional] if lock.name != ADDED else []
        for package, given in versions.items():
            pinned[package] = pinned.get(package, set()) | given
    if installed(BESIDE):
        pinned.setdefault(BESIDE, set())
    for package, versions in pinned.items():
        here = installed(package)
        if not (here or all(package in lock for lock in expected)):
            continue  # for another machine, platform or Python
        version = here or max(versions)
        purl = f"pkg:pypi/{package.lower()}@{quote(version, safe='')}"
        component: dict = {
            "type": "library",
            "bom-ref": purl,
            "name": package,
            "version": version,
            "purl": purl,
            "scope": "required" if package in RUNTIMES else "excluded",
        }
        if here not in versions:
            names = {"slmake:locked": ", ".join(sorted(versions)) or "no", "slmake:installed": here or "no"}
            component["properties"] = [{"name": name, "value": value} for name, value in names.items()]
        components.append(component)
    return components


def licensed(licence: str) -> dict:
    """A licence in CycloneDX's words: an SPDX identifier in whatever case, an expression of several, or else a name."""
    from cyclonedx.spdx import fixup_id, is_expression

    if known := fixup_id(licence):
        return {"license": {"id": known}}
    return {"expression": licence} if is_expression(licence) else {"license": {"name": licence}}


def bill_of_materials(name: str, licence: str, use: str, facts: dict, files: dict[str, str], locks: list[Path]) -> dict:
    """A CycloneDX 1.6 machine-learning bill of materials (https://cyclonedx.org/docs/1.6/json/).

    Args:
        facts: `task`, `architecture`, `base` (results/base.json), `adapter` (results/adapter.json, or None), `dataset` (results/dataset.json), `metrics`, `limit`
            (evaluate.max_samples), `last`.
        files: SHA-256 of the package's files.
        locks: lock files of the environments, and of what may be added (see `libraries`).
    """
    digest = hash_of(sums_text(files).encode()).hexdigest()
    splits = data(facts["dataset"]["source"])
    rows = "test split" if splits else "fixed texts"
    if card.limited(facts):
        rows = f"first {facts['limit']} of the {held_out(facts['dataset'])} answers of the test split"
    contents = [
        {"type": "file", "bom-ref": f"file:{file}", "name": file, "hashes": hashes(value)}
        for file, value in sorted(files.items())
    ]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": digest[:16],
        "licenses": [licensed(licence)],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": facts["task"],
                "architectureFamily": "transformer",
                "modelArchitecture": facts["architecture"],
                "datasets": [{"ref": split["bom-ref"]} for split in splits],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": performance(facts["metrics"][facts["last"]], rows)},
            "considerations": {"useCases": [use]},
        },
    }
    metadata: dict = {
        "lifecycles": [{"phase": "build"}],
        "tools": {"components": [{"type": "application", "name": "slmake"}]},
        "component": model,
    }
    if build_time():
        metadata["timestamp"] = build_time()
    parts = [*made_from(facts), *splits, *contents]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": metadata,
        "components": [*parts, *libraries(locks)],
        "dependencies": [{"ref": "model", "dependsOn": [component["bom-ref"] for component in parts]}],
    }


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
    except (ValueError, RecursionError) as error:
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
