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
    for wrong in ({"bomFormat": "SPDX"}, {"components": [{"type": "modle", "name": "x"}]}, {"unknown": 1}):
        with pytest.raises(UserError, match=r"breaks the CycloneDX schema"):
            sbom.check_bom(json.dumps(bom | wrong))


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


def reseal(folder: Path, *names: str) -> None:
    """What a forger without a key can do after an edit: make the checksums fit again, and the provenance or bill if named."""
    own = (checksums.SUMS, checksums.SIGNATURE, checksums.PROVENANCE)
    if "bill" in names:
        bom = json.loads((folder / checksums.BOM).read_text())
        for part in bom["components"]:
            if part["type"] == "file":
                part["hashes"][0]["content"] = hashlib.sha256((folder / part["name"]).read_bytes()).hexdigest()
        (folder / checksums.BOM).write_text(checksums.canonical(bom))
    if "provenance" in names:
        statement = json.loads((folder / checksums.PROVENANCE).read_text())
        statement["subject"] = [{"name": n, "digest": {"sha256": d}} for n, d in checksums.digests(folder, own).items()]
        (folder / checksums.PROVENANCE).write_text(checksums.canonical(statement))
    (folder / checksums.SUMS).write_text(checksums.sums_text(checksums.digests(folder, own[:2])))


def change_bill(folder: Path, change) -> None:
    """Edit the bill of materials, and make checksums and provenance fit it."""
    bom = json.loads((folder / checksums.BOM).read_text())
    change(bom)
    (folder / checksums.BOM).write_text(checksums.canonical(bom))
    reseal(folder, "provenance")


def swap_for_link(folder: Path, name: str) -> None:
    """Move a file out of the package and leave a link to it."""
    (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to(folder.parent / "moved")


def file_components(bom: dict) -> list[dict]:
    return [part for part in bom["components"] if part["type"] == "file"]


EDITS = {  # what is done to a package: what verify says of it
    "link to a folder outside": (
        lambda p: (p / "onnxruntime_genai").symlink_to("../evil"),
        "onnxruntime_genai: a link (to '../evil')",
    ),
    "link to a file inside": (lambda p: (p / "copy.py").symlink_to("run.py"), "copy.py: a link"),
    "link to nothing": (lambda p: (p / "gone").symlink_to("nowhere"), "gone: a link"),
    "file become a link to the same bytes": (lambda p: swap_for_link(p, "model.onnx.data"), "model.onnx.data: a link"),
    "checksums become a link": (lambda p: swap_for_link(p, "SHA256SUMS"), "SHA256SUMS: a link"),
    "marker become a link": (lambda p: (p / ".snakemake_timestamp").symlink_to("run.py"), "a link (to 'run.py')"),
    "link in a folder": (lambda p: (p / "licenses" / "more").symlink_to("/etc"), "licenses/more: a link"),
    "pipe": (lambda p: os.mkfifo(p / "queue"), "queue: not a regular file"),
    "file become a pipe": (
        lambda p: ((p / "prompt.json").unlink(), os.mkfifo(p / "prompt.json")),
        "prompt.json: not a regular file",
    ),
    "hidden library": (lambda p: (p / ".snakemake_evil.so").write_bytes(b"evil"), "'.snakemake_evil.so': not part of"),
    "marker with content": (lambda p: (p / ".snakemake_timestamp").write_text("x"), "'.snakemake_timestamp': not part"),
    "marker in a folder": (lambda p: (p / "licenses" / ".snakemake_timestamp").touch(), "not part of the package"),
    "marker as a folder": (lambda p: (p / ".snakemake_timestamp").mkdir(), "'.snakemake_timestamp': not part of"),
    "hidden folder": (lambda p: ((p / ".git").mkdir(), (p / ".git" / "config").touch()), "'.git': not part of"),
    "hidden file with checksums made to fit": (
        lambda p: ((p / "SHA256SUMS").write_text((p / "SHA256SUMS").read_text() + f"{'0' * 64}  .x\n"), (p / ".x").touch()),
        "'.x': not part of the package",
    ),
    "unknown file": (lambda p: (p / "sitecustomize.py").touch(), "sitecustomize.py: not part of the package"),
    "unknown package": (
        lambda p: ((p / "onnxruntime_genai").mkdir(), (p / "onnxruntime_genai" / "__init__.py").touch()),
        "onnxruntime_genai/__init__.py: not part of the package",
    ),
    "empty folder": (lambda p: (p / "onnxruntime_genai").mkdir(), "onnxruntime_genai: an empty folder"),
    "name with a line break": (lambda p: (p / "a\nb").touch(), r"'a\nb': not part of the package"),
    "missing file": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "missing folder": (lambda p: shutil.rmtree(p / "licenses"), "licenses/LICENSE: missing"),
    "missing checksums": (lambda p: (p / "SHA256SUMS").unlink(), "SHA256SUMS: missing, so nothing can be checked"),
    "missing bill": (lambda p: (p / "bom.cdx.json").unlink(), "bom.cdx.json: missing, so nothing can be checked"),
    "renamed file": (lambda p: (p / "run.py").rename(p / "Run.py"), "run.py: missing"),
    "file cut short": (lambda p: (p / "model.onnx.data").write_bytes(b""), "model.onnx.data: changed"),
    "checksums made to fit": (
        lambda p: ((p / "run.py").write_text("print('hello')\n"), reseal(p)),
        "its subjects are not the files of this package",
    ),
    "checksums and provenance made to fit": (
        lambda p: ((p / "run.py").write_text("print('hello')\n"), reseal(p, "provenance")),
        "bom.cdx.json: its files are not those of this package: run.py.",
    ),
    "file added, checksums and provenance made to fit": (
        lambda p: ((p / "more.py").touch(), reseal(p, "bill", "provenance")),
        "bom.cdx.json: its files are not those of this package: more.py.",
    ),
    "hash changed in the bill": (
        lambda p: change_bill(p, lambda bom: file_components(bom)[0]["hashes"][0].update(content="0" * 64)),
        "its files are not those of this package",
    ),
    "file taken from the bill": (
        lambda p: change_bill(p, lambda bom: bom["components"].remove(file_components(bom)[0])),
        "bom.cdx.json",
    ),
    "file twice in the bill": (
        lambda p: change_bill(
            p, lambda bom: bom["components"].append(file_components(bom)[0] | {"bom-ref": "again"})
        ),
        "bom.cdx.json: its files are not those of this package: one is listed twice.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_of_a_package_is_refused(copy, edit):
    change, message = EDITS[edit]
    change(copy)
    with pytest.raises(UserError) as caught:
        verify.check(copy, None)
    assert message in str(caught.value)


def test_what_may_be_there_and_where_a_package_may_lie(packed, tmp_path, monkeypatch):
    """Snakemake's empty marker, another folder, another name, a link to the package itself: still the package."""
    shutil.copytree(packed, tmp_path / "moved" / "elsewhere")
    (tmp_path / "moved" / "elsewhere" / ".snakemake_timestamp").touch()
    (tmp_path / "current").symlink_to("moved/elsewhere")
    monkeypatch.chdir(tmp_path)
    for folder in (Path("moved/elsewhere"), tmp_path / "moved" / "elsewhere", Path("current")):
        statement, signed = verify.check(folder, None)
        assert len(statement["subject"]) == len(FILES) - 2
        assert signed == "not signed"


def test_changed_parameter_is_named(packed, tmp_path):
    statement = json.loads((packed / "provenance.intoto.json").read_text())
    file = write_params(tmp_path / "params.yaml", finetune={"seed": 7}, package={"signing_key": "key.pem"})
    changed = verify.changed_inputs(statement, file)
    assert "params.yaml#finetune: changed since the package was made; build again" in changed
    assert not any("#merge" in line for line in changed)


def test_changed_input_is_named(packed, parts, capsys, monkeypatch, tmp_path):
    """Inputs are compared where the build's folder is at hand; paths in it are relative."""
    statement = json.loads((packed / "provenance.intoto.json").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[1]", encoding="utf-8")
    for entry in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        entry["name"] = "rows.json" if entry["name"] == str(parts / "rows.json") else entry["name"]
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
    for half in (key, tmp_path / "public.pem"):
        verify.main([str(folder), "--package-only", "--key", str(half)])
        assert "signature good" in capsys.readouterr().err
    assert "model.sig: does not fit" in refused(capsys, folder, "--package-only", "--key", other)
    assert str(key) not in "".join(path.read_text() for path in folder.glob("*.json"))
    sig = bytearray((folder / "model.sig").read_bytes())
    sig[len(sig) // 2] ^= 1
    (folder / "model.sig").write_bytes(bytes(sig))
    assert "model.sig: does not fit" in refused(capsys, folder, "--package-only", "--key", key)


def test_signing_as_the_readme_has_it(parts, tmp_path, monkeypatch, capsys):
    """A new key, relative paths, Snakemake's marker; then the package moves, is copied, and is checked with either half of the key."""
    monkeypatch.chdir(tmp_path)
    key = make_key(Path("key.pem"))
    folder = pack(parts, Path("build"), signing_key="key.pem")
    assert folder == Path("build/package")
    (folder / ".snakemake_timestamp").touch()
    verify.main(["--params", "build/params.yaml"])  # `make verify`
    assert "signature good; loads and generates" in capsys.readouterr().err
    shutil.copytree(folder, "copied")
    folder.rename("moved")
    Path("public.pem").write_bytes(signature.public_key(key))
    for name in ("moved", "copied", str(tmp_path / "copied")):
        for half in ("key.pem", "public.pem"):
            assert verify.check(Path(name), Path(half))[1] == "signature good"
    assert verify.check(Path("copied"), None)[1] == "signature not checked (give --key)"
    Path("copied/more.py").touch()
    with pytest.raises(UserError, match=r"does not fit this package and key .*Extra files found.*: more.py"):
        signature.check(Path("copied"), key)


def test_forger_without_the_key_is_caught(parts, tmp_path, capsys):
    """File, checksums, bill and provenance changed alike: only the signature shows it."""
    key = make_key(tmp_path / "key.pem")
    folder = pack(parts, tmp_path / "signed", signing_key=str(key))
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    reseal(folder, "bill", "provenance")
    verify.check(folder, None)  # without the key there is nothing to see
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
