"""gates: every gate is judged with its figures, a miss fails the build, and the metrics stay."""

import json
from pathlib import Path

import pytest
from conftest import write_params

import gates
from common import params

METRICS = {
    "test_rows": 240,
    "base": {"accuracy": 0.25, "macro_f1": 0.2, "outside_labels": 0.1, "size_bytes": 538},
    "merged": {"accuracy": 0.82, "macro_f1": 0.8, "outside_labels": 0.0, "size_bytes": 538},
    "int4": {"accuracy": 0.8, "macro_f1": 0.78, "outside_labels": 0.0, "size_bytes": 100},
}


def run(folder: Path, metrics: dict = METRICS, **section: object) -> Path:
    """Run the script in this process; returns the judgement's file."""
    settings = {"min_accuracy": None, "max_accuracy_drop": None, **section}
    file = write_params(folder / "params.yaml", gates=settings)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    arguments = ["--params", file, "--metrics", folder / "metrics.json", "--output", folder / "gates.json"]
    gates.main([str(argument) for argument in arguments])
    return folder / "gates.json"


def missed(folder: Path, capsys, metrics: dict = METRICS, **section: object) -> str:
    """The script's error: exit code 1, no judgement written, and the metrics as they were."""
    with pytest.raises(SystemExit) as caught:
        run(folder, metrics, **section)
    assert caught.value.code == 1
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "params.yaml"]
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8")) == metrics
    message = capsys.readouterr().err
    return message[message.index("gates: error: ") :]


def test_both_gates_pass_and_are_written(tmp_path, capsys):
    file = run(tmp_path, min_accuracy=0.75, max_accuracy_drop=0.05)
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "gates": [
            {"gate": "min_accuracy", "model": "int4", "bound": 0.75, "value": 0.8, "passed": True},
            {
                "gate": "max_accuracy_drop",
                "model": "int4",
                "against": "merged",
                "bound": 0.05,
                "value": 0.02,
                "passed": True,
            },
        ]
    }
    message = capsys.readouterr().err
    assert "gates: all 2 gates passed" in message
    assert "  passed  min_accuracy: int4 0.8000 ≥ 0.7500" in message
    assert "  passed  max_accuracy_drop: int4 against merged 0.0200 ≤ 0.0500" in message


def test_bounds_themselves_pass(tmp_path):
    """0.82 - 0.8 is a little more than 0.02 in floating point; it is not a miss."""
    found = json.loads(run(tmp_path, min_accuracy=0.8, max_accuracy_drop=0.02).read_text(encoding="utf-8"))
    assert [one["passed"] for one in found["gates"]] == [True, True]


def test_missed_accuracy_shows_figures_and_advice(tmp_path, capsys):
    message = missed(tmp_path, capsys, min_accuracy=0.85)
    assert "gates: error: 1 of 1 gates missed.\n  MISSED  min_accuracy: int4 0.8000 ≥ 0.8500\n" in message
    assert "  min_accuracy is missed by 0.0500: train longer (finetune.num_train_epochs)" in message
    assert f"{tmp_path}/metrics.json stays as it is." in message


def test_missed_drop_shows_figures_and_advice(tmp_path, capsys):
    message = missed(tmp_path, capsys, min_accuracy=0.8, max_accuracy_drop=0.01)
    assert "gates: error: 1 of 2 gates missed.\n" in message
    assert "  passed  min_accuracy: int4 0.8000 ≥ 0.8000\n" in message
    assert "  MISSED  max_accuracy_drop: int4 against merged 0.0200 ≤ 0.0100\n" in message
    assert "  max_accuracy_drop is missed by 0.0100: choose a milder quantization" in message


def test_all_misses_are_told_at_once(tmp_path, capsys):
    message = missed(tmp_path, capsys, min_accuracy=0.9, max_accuracy_drop=0.0)
    assert "2 of 2 gates missed." in message
    assert message.count("MISSED") == 2
    assert message.count(" is missed by ") == 2


def test_missed_gate_can_be_lowered_and_judged_again(tmp_path, capsys):
    missed(tmp_path, capsys, min_accuracy=0.81)
    found = json.loads(run(tmp_path, min_accuracy=0.79).read_text(encoding="utf-8"))
    assert found["gates"][0]["passed"] is True


def test_no_gate_is_set(tmp_path, capsys):
    assert json.loads(run(tmp_path).read_text(encoding="utf-8")) == {"gates": []}
    assert capsys.readouterr().err == "gates: no gate is set\n"


def test_last_model_is_judged_against_the_one_before():
    """Without the exported model: merged against base; without finetune: the export against base."""
    section = params.Gates(min_accuracy=0.5, max_accuracy_drop=0.1)
    first, second = gates.judge(section, {name: METRICS[name] for name in ("test_rows", "base", "merged")})
    assert (first["model"], first["value"], first["passed"]) == ("merged", 0.82, True)
    assert (second["against"], second["value"], second["passed"]) == ("base", -0.57, True)
    first, second = gates.judge(section, {"test_rows": 9, "base": {"accuracy": 0.7}, "fp32": {"accuracy": 0.55}})
    assert (first["model"], first["passed"]) == ("fp32", True)
    assert (second["against"], second["value"], second["passed"]) == ("base", 0.15, False)


def test_one_model_is_judged_by_its_accuracy_alone():
    section = params.Gates(min_accuracy=0.5, max_accuracy_drop=None)
    (one,) = gates.judge(section, {"test_rows": 9, "int4": {"accuracy": 0.4}})
    assert one == {"gate": "min_accuracy", "model": "int4", "bound": 0.5, "value": 0.4, "passed": False}


def test_drop_without_a_model_to_compare_with_does_not_pass_in_silence(tmp_path, capsys):
    """A gate that is set and cannot be judged is not a passed gate."""
    metrics = {"test_rows": 9, "int4": {"accuracy": 0.9}}
    message = missed(tmp_path, capsys, metrics, max_accuracy_drop=0.02)
    assert "max_accuracy_drop" in message


def test_missing_metrics_are_named(tmp_path, capsys):
    file = write_params(tmp_path / "params.yaml", gates={"min_accuracy": 0.5})
    with pytest.raises(SystemExit) as caught:
        gates.main(
            ["--params", str(file), "--metrics", str(tmp_path / "no.json"), "--output", str(tmp_path / "g.json")]
        )
    assert caught.value.code == 1
    assert f"{tmp_path}/no.json" in capsys.readouterr().err
    assert not (tmp_path / "g.json").exists()


def test_existing_judgement_is_refused(tmp_path, capsys):
    before = run(tmp_path, min_accuracy=0.5).read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path, min_accuracy=0.6)
    assert f"{tmp_path}/gates.json already exists" in capsys.readouterr().err
    assert (tmp_path / "gates.json").read_bytes() == before
