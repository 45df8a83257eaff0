"""package: what is shipped, and the same bytes each time."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from package_script import FILES, pack, refused

from slmake import generation
from slmake.errors import UserError
from slmake.packaging import provenance, sbom


def test_ships_exactly_these_files(packed, parts):
    assert {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()} == FILES
    for path in (parts / "model").iterdir():
        if path.name == "chat_template.jinja":  # the prompt of training (tests/unit/packaging/test_shipped_server.py)
            continue
        assert (packed / path.name).read_bytes() == path.read_bytes()


def test_the_same_inputs_give_the_same_bytes(packed, parts, tmp_path):
    again = pack(parts, tmp_path)
    for name in FILES:
        assert (again / name).read_bytes() == (packed / name).read_bytes(), name


def test_source_date_epoch_is_the_only_time(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    folder = pack(parts, tmp_path / "one")
    assert json.loads((folder / "bom.cdx.json").read_text())["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    run = json.loads((folder / "provenance.intoto.json").read_text())["predicate"]["runDetails"]
    assert run["metadata"]["finishedOn"] == "2023-11-14T22:13:20Z"
    for text in ("yesterday", "", "²", "1700000000000", "9" * 40, "-1"):  # of milliseconds, the year would be 55,841
        monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        with pytest.raises(SystemExit):
            pack(parts, tmp_path / "two")
        assert f"SOURCE_DATE_EPOCH={text}: it must be a whole number of seconds" in capsys.readouterr().err
        assert not (tmp_path / "two" / "package").exists()


def test_a_package_names_the_image_that_its_rules_ran_in(parts, tmp_path, monkeypatch):
    """Not where a shell in another container runs Snakemake without one: Apptainer's own variable is set there, too."""
    image = f"containers/slmake-cpu.sif@sha256:{'a' * 64}"
    monkeypatch.setenv("APPTAINER_CONTAINER", "/opt/python-3.11.sif")
    for number, (inside, named) in enumerate([(None, False), ("containers/other.sif", False), (image, True)]):
        if inside:
            monkeypatch.setenv("SLMAKE_IMAGE", inside)
        folder = pack(parts, tmp_path / str(number), container=image)
        assert ("a" * 64 in (folder / "provenance.intoto.json").read_text()) == named


def test_run_py_answers_as_the_pipeline_does(packed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", str(packed / "run.py"), "We buried the old dog"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    model = generation.Exported(packed, json.loads((packed / "prompt.json").read_text()))
    assert done.stdout.strip() == model.answer("We buried the old dog")
    assert (packed / "run.py").read_bytes() == Path(generation.__file__).read_bytes()
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse((packed / "run.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {
        *(
            "bisect",
            "json",
            "os",
            "re",
            "sys",
            "unicodedata",
            "collections",
            "dataclasses",
            "datetime",
            "decimal",
            "pathlib",
            "onnxruntime_genai",
        )
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], 'this model takes 1 text: "phrase". Given: 0.'),
        (["a", "b"], 'this model takes 1 text: "phrase". Given: 2.'),
        (["word " * 4000], "the text is too long: "),
    ],
    ids=["none", "two", "long"],
)
def test_run_py_refuses_in_one_line(packed, texts, message):
    done = subprocess.run([sys.executable, str(packed / "run.py"), *texts], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("run.py: error: " + message)
    assert done.stderr.count("\n") == 1


DAMAGED = [
    ("prompt.json", "[]"),
    ("prompt.json", "{}"),
    ("prompt.json", '{"prompt":'),
    ("prompt.json", "[" * 100_000),
    ("prompt.json", '{"prompt": "{a}", "fields": 5, "longest_answer_tokens": 3}'),
    ("prompt.json", '{"prompt": null, "fields": [], "longest_answer_tokens": 3, "chat": {"date": 5}}'),
    ("prompt.json", '{"prompt": null, "fields": [], "longest_answer_tokens": 3, "chat": {"date": "today"}}'),
    ("prompt.json", '{"prompt": null, "fields": [], "longest_answer_tokens": 3, "chat": {"template_kwargs": []}}'),
    ("genai_config.json", "{}"),
    ("genai_config.json", '{"model": {"decoder": [], "context_length": 64}}'),
    ("genai_config.json", '{"model":'),
]


@pytest.mark.parametrize(("name", "text"), DAMAGED)
def test_run_py_names_a_damaged_file_in_one_line(packed, tmp_path, name, text):
    folder = tmp_path / "package"
    folder.mkdir()
    for path in packed.iterdir():
        (shutil.copyfile if path.name in (name, "run.py") else os.symlink)(path, folder / path.name)
    (folder / name).write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, str(folder / "run.py"), "a"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"run.py: error: {folder / name}: the file is damaged (")
    assert done.stderr.endswith("). Get the package again.\n")
    assert done.stderr.count("\n") == 1


def test_run_py_imports_nothing_from_its_folder(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "package"))
    for name in ("json", "unicodedata", "onnxruntime_genai", "numpy"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} of the package was run')\n")
    command = [sys.executable, "run.py", "We buried the old dog"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_card_is_what_a_hub_reads(packed):
    from huggingface_hub import ModelCard

    text = (packed / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "org/name"
    assert card.data.library_name == "onnxruntime-genai"
    (result,) = [score for score in card.data.eval_results if score.metric_type == "accuracy"]
    assert result.metric_value == 0.8
    assert yaml.safe_load(text.split("---")[1])["tags"][:3] == ["onnx", "onnxruntime-genai", "fp32"]
    for part in (
        "80.0% (75.0% to 85.0%)",
        "| joy | 0.900 | 0.700 | 0.790 | 6 |",
        "`learning_rate`",
        "min_accuracy",
        "python run.py",
        "rows.json`, SHA-256 `",
    ):
        assert part in text
    assert "latency" not in text  # timings differ from run to run, and the package must not


def test_checksums_are_what_sha256sum_reads(packed):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=packed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == len(FILES) - 1


def test_bill_of_materials_is_valid_and_complete(packed):
    text = (packed / "bom.cdx.json").read_text(encoding="utf-8")
    sbom.check_bom(text)
    bom = json.loads(text)
    assert bom["metadata"]["component"]["type"] == "machine-learning-model"
    figures = {
        entry["type"]: entry
        for entry in bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert figures["accuracy"]["confidenceInterval"] == {"lowerBound": "0.75", "upperBound": "0.85"}
    names = {entry["name"] for entry in bom["components"]}
    assert any(name.endswith("/rows.json") for name in names)
    assert {"hf:org/name@1234", "model.onnx.data", "onnxruntime-genai", "numpy"} <= names
    versions = [entry["version"] for entry in bom["components"] if entry["name"] == "numpy"]
    assert versions == [metadata.version("numpy")]
    assert "pywin32" not in names  # the lock has it for Windows
    for wrong in ({"bomFormat": "SPDX"}, {"components": [{"type": "modle", "name": "x"}]}, {"unknown": 1}):
        with pytest.raises(UserError, match=r"breaks the CycloneDX schema"):
            sbom.check_bom(json.dumps(bom | wrong))
    for licence, entry in (
        ("apache-2.0", {"license": {"id": "Apache-2.0"}}),  # as Hugging Face spells it
        ("MIT OR Apache-2.0", {"expression": "MIT OR Apache-2.0"}),
        ("llama3.2", {"license": {"name": "llama3.2"}}),
    ):
        assert sbom.licensed(licence) == entry
        bom["metadata"]["component"]["licenses"] = [entry]
        sbom.check_bom(json.dumps(bom))


def test_a_package_that_is_not_as_locked_is_named_as_it_is(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text("numpy==0.1 \\\n    --hash=sha256:0\nonnxruntime-genai-cuda==9.9\n")
    here, absent, _ = sbom.libraries([lock])
    assert here["version"] == metadata.version("numpy")
    assert {"name": "slmake:locked", "value": "0.1"} in here["properties"]
    assert (absent["version"], absent["scope"]) == ("9.9", "required")
    assert {"name": "slmake:installed", "value": "no"} in absent["properties"]


def test_provenance_names_every_input_and_every_file(packed, parts):
    statement = provenance.check_statement((packed / "provenance.intoto.json").read_text(encoding="utf-8"))
    subjects = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    assert subjects.keys() == FILES - {"provenance.intoto.json", "SHA256SUMS"}
    assert subjects["model.onnx"] == hashlib.sha256((packed / "model.onnx").read_bytes()).hexdigest()
    inputs = {
        entry["name"]: entry["digest"]["sha256"]
        for entry in statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    assert inputs[str(parts / "rows.json")] == hashlib.sha256(b"[]").hexdigest()
    assert {f"params.yaml#{name}" for name in ("fetch_model", "finetune", "gates", "package")} <= inputs.keys()
    assert not any(name.endswith(".sif") for name in inputs)
    recorded = {
        "base": {"source": "x"},
        "dataset": {"source": {"train": {"source": "az://c/rows", "sha256": "b" * 64}}},
    }
    other = provenance.provenance({}, [], {}, recorded, f"containers/one.sif@sha256:{'a' * 64}")
    there = {
        entry["name"]: entry["digest"]["sha256"]
        for entry in other["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    assert there == {"az://c/rows": "b" * 64, "containers/one.sif": "a" * 64}
    for wrong in ({"_type": "https://example.org"}, {"subject": []}, {"predicate": {"surprise": 1}}):
        with pytest.raises(UserError, match=r"no valid provenance"):
            provenance.check_statement(json.dumps(statement | wrong))


def test_missing_licence_and_missing_package_are_named(parts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pack(parts, tmp_path / "run", license_files=["NO-LICENCE"])
    assert "package.license_files: NO-LICENCE: no such file." in capsys.readouterr().err
    assert "no package here. Build it with `make`, or correct the folder's name." in refused(capsys, tmp_path / "no")


@pytest.mark.parametrize("read", ["same", "other"])
def test_a_dataset_that_was_another_while_it_was_read_is_not_named(tmp_path, monkeypatch, read):
    """Edited while prepare ran, and taken back: the file here is not what the model was trained on."""
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text("[]", encoding="utf-8")
    sha256 = hashlib.sha256(b"[]" if read == "same" else b"[1]").hexdigest()
    recorded = {"base": {"source": "x"}, "dataset": {"source": {"train": {"source": "rows.json", "sha256": sha256}}}}
    if read == "same":
        provenance.provenance({}, [Path("rows.json")], {}, recorded)
    else:
        with pytest.raises(UserError, match=r"rows.json: its content was another one while it was read. `snakemake"):
            provenance.provenance({}, [Path("rows.json")], {}, recorded)
