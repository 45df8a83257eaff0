"""The estimate counts the files that calibration writes between two layers."""

import sys

from tiny import write_params

from slmake import cli, params
from slmake.export import gptq
from slmake.rehearsal import estimate


def test_the_states_of_the_calibration_rows_are_counted(tmp_path, base, dataset):
    everything = params.load(
        write_params(tmp_path / "params.yaml", quantize={"calibration_rows": 40, "int8_nodes": []})
    )
    gptq.calibrate(everything.quantize, base, dataset, tmp_path, cli.Job("quantize", sys.stderr, None))
    states = [path.stat().st_size - 128 for path in tmp_path.glob("states-*.npy")]  # without NumPy's header
    assert len(states) > 1
    assert estimate._calibration_files(everything, dataset, 10**6, 64) == 10**6 + sum(states)
    fewer = everything.model_copy(update={"quantize": params.Quantize(calibration_rows=1)})
    assert 10**6 < estimate._calibration_files(fewer, dataset, 10**6, 64) < 10**6 + sum(states)
