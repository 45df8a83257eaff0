"""The provenance of a package (SLSA, as an in-toto statement)."""

import json
import os
import re
from datetime import UTC, datetime
from hashlib import sha256 as hash_of
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError, first_line
from slmake.packaging.checksums import PROVENANCE

BUILD_TYPE = "urn:slmake:package:v1"


def build_time() -> str | None:
    """SOURCE_DATE_EPOCH (https://reproducible-builds.org/specs/source-date-epoch/) as RFC 3339, or None where it is not set.

    Raises:
        UserError: it is no whole number of seconds, or one beyond the year 9999.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        return None
    try:
        if not re.fullmatch("[0-9]+", text):
            raise ValueError
        return datetime.fromtimestamp(int(text), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        raise UserError(
            f"SOURCE_DATE_EPOCH={text}: it must be a whole number of seconds since 1970, up to the year 9999. Correct it, or unset it."
        ) from None


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
        recorded: what was read and measured: `base`, `adapter` (None if it was trained here) and `dataset`, as their rules wrote it, the
            execution `providers` of the exported model, and of a training here (`trained`) the numbers of `processes` and `threads`.
        container: the image that rules ran in, as NAME@sha256:DIGEST; None outside of containers.
    """
    dependencies = [
        {"name": path.as_posix(), "digest": {"sha256": outputs.sha256(path)}} for path in sorted(set(materials))
    ]
    dependencies += [
        {"name": f"params.yaml#{name}", "digest": {"sha256": hash_of(text.encode()).hexdigest()}}
        for name, text in sorted(sections.items())
    ]
    known = {dependency["name"]: dependency["digest"]["sha256"] for dependency in dependencies}
    fetched = {name: recorded[name] for name in ("base", "adapter") if recorded.get(name)}
    for source in (*fetched.values(), *recorded["dataset"]["source"].values()):
        if known.get(source["source"], source.get("sha256")) != source.get("sha256"):
            raise UserError(
                f"{source['source']}: its content was another one while it was read. `snakemake --cores all --force build/dataset` "
                "reads it again."
            )
        if source.get("sha256") and source["source"] not in known:
            dependencies.append({"name": source["source"], "digest": {"sha256": source["sha256"]}})
    if container:
        name, _, digest = container.partition("@sha256:")
        dependencies.append({"name": name, "digest": {"sha256": digest}})
    if trained := recorded.get("trained"):  # these decide the adapter's last digits, and are in no file that was read
        fetched["training"] = {name: int(trained[name]) for name in ("processes", "threads")}
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
                "internalParameters": fetched
                | {"dataset": recorded["dataset"]["source"], "providers": recorded.get("providers", {})},
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
        content = json.loads(text)
        statement = json_format.Parse(text, Statement([], "", {}).pb)
        Statement.copy_from_pb(statement).validate()
        json_format.ParseDict(content["predicate"], Provenance())
    except Exception as error:
        raise UserError(f"{PROVENANCE} is no valid provenance: {first_line(error)}") from None
    return content
