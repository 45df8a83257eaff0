"""The whole chain on a tiny model: what is built, what is rebuilt, and what happens when something is wrong."""

import json

import pytest
from project import change, digests, new_project, planned, run, snakemake
from tiny import make_rows

SHOWN = {"gates", "package", "report"}  # what follows evaluate
EVERYTHING = {"fetch_model", "prepare", "rehearse", "finetune", "merge", "quantize", "evaluate"} | SHOWN
AFTER_PREPARE = EVERYTHING - {"fetch_model"}


def test_builds_every_output(built):
    """The documented files are there, and nothing temporary is left."""
    names = {path.relative_to(built).as_posix() for path in (built / "build").iterdir()}
    assert names == {
        *("build/base", "build/dataset", "build/adapter", "build/merged", "build/onnx-int4"),
        *("build/package", "build/report"),
    }
    results = {path.name for path in (built / "results").iterdir()}
    assert results == {
        "base.json",
        "benchmark.json",
        "dataset.json",
        "estimate.json",
        "eval_loss.csv",
        "gates.json",
        "metrics.json",
        "predictions.csv",
        "rehearsal.json",
        "train_loss.csv",
    }
    assert not list(built.rglob("*.partial"))
    metrics = json.loads((built / "results" / "metrics.json").read_text())
    assert list(metrics) == ["test_rows", "base", "adapter", "merged", "int4", "parity", "drop"]
    assert metrics["test_rows"] == 24
    assert {"accuracy", "macro_f1", "outside_labels", "size_bytes"} < set(metrics["int4"])
    assert metrics["parity"]["merged_vs_adapter"]["kl_max"] < 1e-4
    benchmark = json.loads((built / "results" / "benchmark.json").read_text())
    assert benchmark["int4"]["latency_ms_p50"] > 0


def test_nothing_to_do_after_a_build(built):
    assert planned(built) == set()


@pytest.mark.parametrize(
    ("section", "fields", "expected"),
    [
        ("prepare", {"seed": 1}, AFTER_PREPARE),
        ("finetune", {"learning_rate": 0.02}, EVERYTHING - {"fetch_model", "prepare"}),
        ("merge", {"dtype": "bfloat16"}, {"rehearse", "merge", "quantize", "evaluate"} | SHOWN),
        ("quantize", {"accuracy_level": 0}, {"rehearse", "quantize", "evaluate"} | SHOWN),
        ("evaluate", {"batch_size": 8}, {"evaluate"} | SHOWN),
        ("gates", {"min_accuracy": 0.01}, {"rehearse"} | SHOWN),
        ("package", {"language": ["de"]}, {"package"}),
        ("report", {"wrong_answers": 3}, {"report"}),
        ("fetch_model", {"dtype": "bfloat16"}, EVERYTHING),
    ],
)
def test_a_changed_parameter_reruns_exactly_what_depends_on_it(copy_of_built, section, fields, expected):
    change(copy_of_built, section, **fields)
    assert planned(copy_of_built) == expected


def test_a_changed_row_rebuilds_from_prepare_on(copy_of_built):
    data = copy_of_built / "data" / "dataset.json"
    data.write_text(data.read_text().replace("number 5 of", "number five of"), encoding="utf-8")
    assert planned(copy_of_built) == AFTER_PREPARE


def test_a_changed_script_reruns_its_rule(copy_of_built):
    script = copy_of_built / "scripts" / "gates.py"
    script.write_text(script.read_text() + "\nCHANGED = True\n", encoding="utf-8")
    assert planned(copy_of_built) == {"gates", "package"}  # the report shows metrics, and judges them by itself


def test_a_build_in_another_folder_gives_the_same_bytes(built, base, tmp_path):
    """… and in processes of their own, with other hash seeds than those that share their imports."""
    again = new_project(tmp_path / "elsewhere", base)
    done = snakemake(again, fresh=True)
    assert done.returncode == 0, done.stdout
    assert digests(again) == digests(built)


def test_quantize_the_base_model_without_fine_tuning(copy_of_built):
    change(copy_of_built, "all", stages=["quantize", "evaluate"])
    assert planned(copy_of_built) >= {"quantize", "evaluate"}
    assert "finetune" not in planned(copy_of_built)
    done = snakemake(copy_of_built)
    assert done.returncode == 0, done.stdout
    metrics = json.loads((copy_of_built / "results" / "metrics.json").read_text())
    assert list(metrics) == ["test_rows", "base", "int4", "parity", "drop"]


def test_stop_after_the_adapter(base, tmp_path):
    project = new_project(tmp_path / "project", base)
    change(project, "all", stages=["finetune"])
    assert planned(project) == {"fetch_model", "prepare", "finetune"}


def test_a_missed_gate_fails_and_keeps_the_metrics(copy_of_built):
    before = (copy_of_built / "results" / "metrics.json").read_bytes()
    change(copy_of_built, "gates", min_accuracy=1.0)
    done = snakemake(copy_of_built)
    assert done.returncode != 0
    assert "MISSED  min_accuracy " in done.stdout
    assert "min_accuracy is missed by" in done.stdout
    assert (copy_of_built / "results" / "metrics.json").read_bytes() == before
    assert not (copy_of_built / "results" / "gates.json").exists()
    assert (copy_of_built / "build" / "package" / "model.onnx").exists()
    assert (copy_of_built / "build" / "onnx-int4" / "model.onnx").exists()
    change(copy_of_built, "gates", min_accuracy=0.99)
    assert snakemake(copy_of_built, "build/report/overview.html").returncode == 0  # the package is of a former build


def test_a_misspelt_parameter_stops_before_any_job(copy_of_built):
    path = copy_of_built / "params.yaml"
    path.write_text(
        path.read_text().replace("lora_r:", "lora_rank:").replace("seed: 42", "seed: -3", 1), encoding="utf-8"
    )
    done = snakemake(copy_of_built)
    assert done.returncode != 0
    assert "finetune.lora_rank: unknown name." in done.stdout
    assert "prepare.seed: -3 is not allowed" in done.stdout
    assert "rule prepare" not in done.stdout
    assert (copy_of_built / "build" / "adapter" / "adapter_model.safetensors").exists()


def test_config_on_the_command_line_is_refused(built):
    done = snakemake(built, "--dry-run", "--config", "lora_r=4")
    assert done.returncode != 0
    assert "edit params.yaml" in done.stdout


def test_a_bad_row_fails_with_its_place_and_keeps_later_outputs(copy_of_built):
    rows = make_rows(96)
    rows[6]["tone"] = ""
    (copy_of_built / "data" / "dataset.json").write_text(json.dumps(rows), encoding="utf-8")
    done = snakemake(copy_of_built)
    assert done.returncode != 0
    assert "data/dataset.json: row 7: field `tone` is an empty answer" in done.stdout
    assert (copy_of_built / "build" / "onnx-int4" / "model.onnx").exists()
    assert (copy_of_built / "build" / "adapter" / "adapter_model.safetensors").exists()


def test_a_missing_dataset_is_named(copy_of_built):
    (copy_of_built / "data" / "dataset.json").unlink()
    done = snakemake(copy_of_built)
    assert done.returncode != 0
    assert "data/dataset.json" in done.stdout


@pytest.mark.parametrize(
    ("section", "field", "value", "told"),
    [
        ("prepare", "source", "a" * 5000, "no such file"),
        ("prepare", "source", "data/{x}.json", "Snakemake takes braces for a wildcard"),
        ("gates", "published", "last.json", "no such file"),
        ("package", "license_files", ["LICENSE", "data"], "a folder, not a file"),
        ("package", "signing_key", "key.pem", "no such file"),
    ],
    ids=["source", "braces", "published", "license_files", "signing_key"],
)
def test_a_file_that_cannot_be_an_input_is_named(copy_of_built, section, field, value, told):
    """Although everything is built, which is all that Snakemake itself asks."""
    change(copy_of_built, section, **{field: value})
    done = snakemake(copy_of_built, "--dry-run")
    assert done.returncode != 0
    file = value if isinstance(value, str) else value[-1]
    assert done.stdout.count(f"params.yaml: {section}.{field}: {file}: {told}") == 1
    assert "Traceback" not in done.stdout


def test_a_missing_lock_is_named(copy_of_built):
    (copy_of_built / "envs" / "cuda.lock").unlink()
    done = snakemake(copy_of_built, "--dry-run")
    assert done.returncode != 0
    assert "envs/cuda.lock: no such file" in done.stdout


def test_files_of_stages_that_are_left_out_may_be_missing(base, tmp_path):
    project = new_project(tmp_path / "project", base)
    change(project, "all", stages=["finetune"])
    change(project, "gates", published="last.json")
    change(project, "package", license_files=["nothere"], signing_key="key.pem")
    assert planned(project) == {"fetch_model", "prepare", "finetune"}


def test_ask_answers_with_a_latency(built):
    done = run(built, "python", "-m", "tools.ask", "We buried the old dog at home")
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("ms)")


def test_ask_without_a_model_says_what_to_do(base, tmp_path):
    project = new_project(tmp_path / "project", base)
    done = run(project, "python", "-m", "tools.ask", "Hello")
    assert done.returncode == 1
    assert "no such file. Build it with" in done.stdout or "no exported model. Build it with" in done.stdout
