"""verify: every flipped byte and every edit is named, and a forger is caught."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from package_script import FILES, pack, refused
from tiny import write_params

from slmake.errors import UserError
from slmake.packaging import checksums, signature
from tools import verify


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """A private copy of the package."""
    return Path(shutil.copytree(packed, tmp_path / "package"))


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
