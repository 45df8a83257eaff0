"""Fixtures of the tests of packaging."""

import json
import shutil
from pathlib import Path

import pytest
from package_script import GATE, SCORES, SLOW, pack

from slmake import params
from slmake.export import builder

METRICS = {
    "test_rows": 24,
    "merged": SCORES,
    "fp32": SCORES,
    "parity": {
        "fp32_vs_merged": {"prompts": 64, "kl_mean": 0.02, "kl_max": 0.3, "top1_agreement": 0.95, "logit_diff_max": 0.1}
    },
}


@pytest.fixture(scope="session")
def parts(tmp_path_factory, base, dataset) -> Path:
    """A tiny exported model and the reports of the rules before; do not write into it."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "model").mkdir()
    section = params.Quantize(precision="fp32", algo_config="rtn", matmul_mixed_precision=None)
    builder.export(section, base, folder / "model", folder / "cache")
    shutil.copytree(dataset, folder / "dataset")
    (folder / "rows.json").write_text("[]", encoding="utf-8")
    reports = {
        "base": {"source": "hf:org/name@1234", "sha256": None, "size_bytes": 5},
        "dataset": json.loads((dataset.parent / "dataset.json").read_text(encoding="utf-8")),  # as prepare wrote it
        "metrics": METRICS,
        "gates": {"gates": [GATE, SLOW]},
    }
    for name, content in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def packed(parts, tmp_path_factory) -> Path:
    """A package; do not write into it."""
    return pack(parts, tmp_path_factory.mktemp("packed"))
