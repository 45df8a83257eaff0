"""Export one model: calibrate, build, check."""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.export.builder import export, set_accuracy_levels
from slmake.export.families import unsupported
from slmake.export.graph_checks import check_generates, check_graph
from slmake.model_folder import weight_files


def build(
    section: params.Quantize, model: Path, dataset: Path | None, folder: Path, scratch: Path, job: cli.Job
) -> dict:
    """Export into an empty folder, and check the graph and a trial generation.

    Returns:
        The graph's summary, from `check_graph`, the faults of the builder that were worked around as `builder_fixes`, if any, and the
        execution provider of the trial as `runs_on`.

    Raises:
        NotBuildable: an export that is refused, is not what was asked for, or does not run.
        UserError: no model there, or one that cannot be exported at all.
    """
    if not (model / "config.json").exists():
        raise UserError(f"{model}: no model here. Build it with `snakemake --cores all {model}`.")
    reason = unsupported(outputs.read_json(model / "config.json", output=model))
    if reason:
        raise UserError(f"{model}: {reason}")
    weight_files(model)
    rounded = {}
    try:
        if section.calibration == "gptq":
            from slmake.export import gptq

            if dataset is None:
                raise UserError("quantize.calibration: gptq needs training prompts: give --dataset.")
            calibrated = scratch / "calibrated"
            calibrated.mkdir(parents=True)
            rounded = gptq.calibrate(section, model, dataset, calibrated, job)
        fixes = export(section, model, folder, scratch, gptq.placed(rounded) if rounded else {})
        if section.node_accuracy_levels:
            set_accuracy_levels(section, folder)
        summary = check_graph(section, folder)
        if rounded:
            gptq.check_weights(folder, rounded)
    finally:
        outputs.remove(scratch)
    if fixes:
        summary["builder_fixes"] = fixes
    return summary | {"runs_on": check_generates(folder).runs_on}
