"""package and verify: what is shipped, the same bytes each time, and every flipped byte named."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ROOT, write_params

from scripts import package
from slmake import generation, params
from slmake.errors import UserError
from slmake.export import builder
from slmake.packaging import checksums, provenance, sbom, signature
from tools import verify

FIGURES = {
    "accuracy": 0.8,
    "accuracy_low": 0.75,
    "accuracy_high": 0.85,
    "macro_f1": 0.78,
    "macro_f1_low": 0.7,
    "macro_f1_high": 0.83,
    "outside_labels": 0.0,
    "restricted_accuracy": 0.81,
    "restricted_macro_f1": 0.8,
    "answer_perplexity": 1.2,
    "size_bytes": 1000,
    "per_class": {label: {"precision": 0.9, "recall": 0.7, "f1": 0.79, "rows": 6} for label in ("joy", "fear")},
}
METRICS = {
    "test_rows": 24,
    "merged": FIGURES,
    "fp32": FIGURES,
    "parity": {
        "fp32_vs_merged": {"prompts": 64, "kl_mean": 0.02, "kl_max": 0.3, "top1_agreement": 0.95, "logit_diff_max": 0.1}
    },
}
GATE = {
    "gate": "min_accuracy",
    "metric": "accuracy",
    "kind": "minimum",
    "model": "fp32",
    "bound": 0.7,
    "value": 0.8,
    "passed": True,
}
SLOW = GATE | {"gate": "checks[0]", "metric": "latency_ms_p50", "kind": "maximum", "bound": 900.0, "value": 123.4}
FILES = {
    *(
        "README.md",
        "run.py",
        "prompt.json",
        "metrics.json",
        "licenses/LICENSE",
        "SHA256SUMS",
        "bom.cdx.json",
        "provenance.intoto.json",
    ),
    *(
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ),
}


@pytest.fixture(scope="module")
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


def pack(parts: Path, folder: Path, **section: object) -> Path:
    """Run the script in this process; returns the package's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"license_files": [str(ROOT / "LICENSE")], **section}
    file = write_params(
        folder / "params.yaml",
        package=settings,
        quantize={"precision": "fp32", "calibration": "none", "int8_nodes": []},
    )
    arguments = ["--params", file, "--model", parts / "model", "--dataset", parts / "dataset"]
    for name in ("base", "dataset"):
        arguments += [f"--{name}-report", parts / f"{name}.json"]
    arguments += [
        "--metrics",
        parts / "metrics.json",
        "--gates",
        parts / "gates.json",
        "--lock",
        ROOT / "envs" / "cpu.lock",
    ]
    arguments += ["--materials", parts / "rows.json", ROOT / "Snakefile", "--output", folder / "package"]
    package.main([str(argument) for argument in arguments])
    return folder / "package"


@pytest.fixture(scope="module")
def packed(parts, tmp_path_factory) -> Path:
    """A package; do not write into it."""
    return pack(parts, tmp_path_factory.mktemp("packed"))


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """A private copy of the package."""
    return Path(shutil.copytree(packed, tmp_path / "package"))


def refused(capsys, *arguments: object) -> str:
    """verify's error; it exits with 1."""
    with pytest.raises(SystemExit) as caught:
        verify.main([str(argument) for argument in arguments])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    return message[message.index("verify: error: ") :]


def test_ships_exactly_these_files(packed, parts):
    assert {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()} == FILES
    for path in (parts / "model").iterdir():
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
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(SystemExit):
        pack(parts, tmp_path / "two")
    assert "SOURCE_DATE_EPOCH=yesterday: it must be a whole number of seconds" in capsys.readouterr().err
    assert not (tmp_path / "two" / "package").exists()


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
        *("json", "re", "sys", "unicodedata", "collections", "datetime", "pathlib", "onnxruntime_genai")
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
    (result,) = [one for one in card.data.eval_results if one.metric_type == "accuracy"]
    assert result.metric_value == 0.8
    assert yaml.safe_load(text.split("---")[1])["tags"][:3] == ["onnx", "onnxruntime-genai", "fp32"]
    for told in (
        "80.0% (75.0% to 85.0%)",
        "| joy | 0.900 | 0.700 | 0.790 | 6 |",
        "`learning_rate`",
        "min_accuracy",
        "python run.py",
        "rows.json`, SHA-256 `",
    ):
        assert told in text
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
        one["type"]: one
        for one in bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert figures["accuracy"]["confidenceInterval"] == {"lowerBound": "0.75", "upperBound": "0.85"}
    names = {one["name"] for one in bom["components"]}
    assert any(name.endswith("/rows.json") for name in names)
    assert {"hf:org/name@1234", "model.onnx.data", "onnxruntime-genai", "numpy"} <= names
    for wrong in ({"bomFormat": "SPDX"}, {"components": [{"type": "modle", "name": "x"}]}, {"unknown": 1}):
        with pytest.raises(UserError, match=r"breaks the CycloneDX schema"):
            sbom.check_bom(json.dumps(bom | wrong))


def test_provenance_names_every_input_and_every_file(packed, parts):
    statement = provenance.check_statement((packed / "provenance.intoto.json").read_text(encoding="utf-8"))
    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    assert subjects.keys() == FILES - {"provenance.intoto.json", "SHA256SUMS"}
    assert subjects["model.onnx"] == hashlib.sha256((packed / "model.onnx").read_bytes()).hexdigest()
    found = {
        one["name"]: one["digest"]["sha256"]
        for one in statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    assert found[str(parts / "rows.json")] == hashlib.sha256(b"[]").hexdigest()
    assert {f"params.yaml#{name}" for name in ("fetch_model", "finetune", "gates", "package")} <= found.keys()
    assert not any(name.endswith(".sif") for name in found)
    recorded = {
        "base": {"source": "x"},
        "dataset": {"source": {"train": {"source": "az://c/rows", "sha256": "b" * 64}}},
    }
    other = provenance.provenance({}, [], {}, recorded, f"containers/one.sif@sha256:{'a' * 64}")
    there = {
        one["name"]: one["digest"]["sha256"] for one in other["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    assert there == {"az://c/rows": "b" * 64, "containers/one.sif": "a" * 64}
    for wrong in ({"_type": "https://example.org"}, {"subject": []}, {"predicate": {"surprise": 1}}):
        with pytest.raises(UserError, match=r"no valid provenance"):
            provenance.check_statement(json.dumps(statement | wrong))


def test_a_good_package_verifies(packed, capsys):
    verify.main([str(packed), "--package-only"])
    message = capsys.readouterr().err
    assert "provenance and bill of materials valid, not signed; loads and generates" in message


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_flipped_byte_is_named(copy, capsys, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(bytes(data))
    message = refused(capsys, copy, "--package-only")
    if name == "SHA256SUMS":  # which of its lines is hit depends on the digests
        assert name in message
    else:
        assert f"\n  {name}: changed" in message
        assert message.count("\n  ") == 1


def test_missing_and_foreign_files_are_named(copy, capsys):
    (copy / "tokenizer.json").unlink()
    (copy / "evil.py").write_text("", encoding="utf-8")
    message = refused(capsys, copy, "--package-only")
    assert "tokenizer.json: missing" in message
    assert "evil.py: not part of the package" in message


def test_consistently_forged_sums_do_not_help(copy, capsys):
    """Someone who changes a file and SHA256SUMS alike is caught by the provenance."""
    (copy / "run.py").write_text("print('hello')\n", encoding="utf-8")
    (copy / "SHA256SUMS").write_text(checksums.sums_text(checksums.digests(copy, ("SHA256SUMS",))), encoding="utf-8")
    assert "its subjects are not the files of this package" in refused(capsys, copy, "--package-only")


def test_changed_parameter_is_named(packed, tmp_path):
    statement = json.loads((packed / "provenance.intoto.json").read_text())
    file = write_params(tmp_path / "params.yaml", finetune={"seed": 7}, package={"signing_key": "key.pem"})
    found = verify.changed_inputs(statement, file)
    assert "params.yaml#finetune: changed since the package was made; build again" in found
    assert not any("#merge" in line for line in found)


def test_changed_input_is_named(packed, parts, capsys, monkeypatch, tmp_path):
    """Inputs are compared where the build's folder is at hand; paths in it are relative."""
    statement = json.loads((packed / "provenance.intoto.json").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[1]", encoding="utf-8")
    for one in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        one["name"] = "rows.json" if one["name"] == str(parts / "rows.json") else one["name"]
    assert verify.changed_inputs(statement, Path("params.yaml")) == [
        "rows.json: changed since the package was made; build again"
    ]
    (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
    assert verify.changed_inputs(statement, packed.parent / "params.yaml") == []


# -- signature ---------------------------------------------------------------------------------------------------------


def make_key(path: Path) -> Path:
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path], check=True)
    return path


def test_signed_package(parts, tmp_path, capsys):
    key, other = make_key(tmp_path / "key.pem"), make_key(tmp_path / "other.pem")
    folder = pack(parts, tmp_path / "signed", signing_key=str(key))
    assert "signed" in capsys.readouterr().err
    (tmp_path / "public.pem").write_bytes(signature.public_key(key))
    for one in (key, tmp_path / "public.pem"):
        verify.main([str(folder), "--package-only", "--key", str(one)])
        assert "signature good" in capsys.readouterr().err
    assert "model.sig: does not fit" in refused(capsys, folder, "--package-only", "--key", other)
    assert str(key) not in "".join(path.read_text() for path in folder.glob("*.json"))
    sig = bytearray((folder / "model.sig").read_bytes())
    sig[len(sig) // 2] ^= 1
    (folder / "model.sig").write_bytes(bytes(sig))
    assert "model.sig: does not fit" in refused(capsys, folder, "--package-only", "--key", key)


def test_forger_without_the_key_is_caught(parts, tmp_path, capsys):
    """File, checksums and provenance changed alike: only the signature tells."""
    key = make_key(tmp_path / "key.pem")
    folder = pack(parts, tmp_path / "signed", signing_key=str(key))
    own = (checksums.SUMS, checksums.SIGNATURE, checksums.PROVENANCE)
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    statement = json.loads((folder / checksums.PROVENANCE).read_text())
    statement["subject"] = [{"name": n, "digest": {"sha256": d}} for n, d in checksums.digests(folder, own).items()]
    (folder / checksums.PROVENANCE).write_text(checksums.canonical(statement), encoding="utf-8")
    (folder / checksums.SUMS).write_text(checksums.sums_text(checksums.digests(folder, own[:2])), encoding="utf-8")
    assert "model.sig: does not fit" in refused(capsys, folder, "--package-only", "--key", key)


def test_key_given_but_nothing_signed(packed, tmp_path, capsys):
    message = refused(capsys, packed, "--package-only", "--key", make_key(tmp_path / "key.pem"))
    assert "model.sig: missing, but a key is given" in message


@pytest.mark.parametrize("content", [None, "no key"])
def test_bad_key_leaves_no_package(parts, tmp_path, capsys, content):
    if content:
        (tmp_path / "key.pem").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        pack(parts, tmp_path / "run", signing_key=str(tmp_path / "key.pem"))
    assert "package.signing_key: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "package").exists()


def test_missing_licence_and_missing_package_are_named(parts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pack(parts, tmp_path / "run", license_files=["NO-LICENCE"])
    assert "package.license_files: NO-LICENCE: no such file." in capsys.readouterr().err
    assert "no package here. Build it with `make`." in refused(capsys, tmp_path / "no")
