"""verify: every flipped byte and every edit is named, and a forger is caught."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from bad_inputs import PACKAGES
from package_script import FILES, change_bill, pack, refused, reseal
from tiny import write_params

from slmake.errors import UserError
from slmake.packaging import signature
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


@pytest.mark.parametrize("edit", PACKAGES)
def test_every_edit_of_a_package_is_refused(copy, edit):
    change, message = PACKAGES[edit]
    change(copy)
    with pytest.raises(UserError) as caught:
        verify.check(copy, None)
    assert message in str(caught.value)


def test_links_into_a_cache_of_dvc_are_refused_and_explained(copy, tmp_path):
    cached = tmp_path / "files" / "md5" / "ab" / "cd"
    cached.parent.mkdir(parents=True)
    shutil.move(copy / "run.py", cached)
    (copy / "run.py").symlink_to(cached)
    with pytest.raises(UserError, match=r"run.py: a link \(to .*\n.*`.venv/bin/dvc checkout --relink` puts files"):
        verify.check(copy, None)
    shutil.move(cached, copy / "run.py")
    verify.check(copy, None)


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
    rsa = ["openssl", "genrsa", "-out", tmp_path / "rsa.pem", "1024"]
    subprocess.run(rsa, check=True, capture_output=True)
    message = refused(capsys, folder, "--package-only", "--key", tmp_path / "rsa.pem")
    assert "rsa.pem: a key of another kind (RSAPublicKey); packages are signed with secp256r1" in message.replace(
        "_", ""
    )
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
    Path("public.pem").write_bytes(signature.public_key(key))
    settings = Path("build/params.yaml").read_text(encoding="utf-8")
    Path("build/nokey.yaml").write_text(settings.replace("key.pem", "nokey.pem"), encoding="utf-8")
    (folder / ".snakemake_timestamp").touch()
    verify.main(["--params", "build/params.yaml"])  # `make verify`
    assert "signature good; loads and generates" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        verify.main(["--params", "build/nokey.yaml"])  # another machine
    assert "package.signing_key: nokey.pem: no such file. Without the private key" in capsys.readouterr().err
    verify.main(["--params", "build/nokey.yaml", "--key", "public.pem"])
    assert "signature good" in capsys.readouterr().err
    shutil.copytree(folder, "copied")
    folder.rename("moved")
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


@pytest.mark.parametrize("name", ["custom_ops_library", "custom\\u005fops_library"])
def test_a_library_is_never_loaded(parts, tmp_path, name):
    folder = pack(parts, tmp_path / "package")
    text = (folder / "genai_config.json").read_text(encoding="utf-8")
    (folder / "genai_config.json").write_text(text.replace("{", f'{{"{name}": "evil.bin", ', 1), encoding="utf-8")
    reseal(folder, "bill", "provenance")
    with pytest.raises(UserError, match=r"genai_config\.json names a library"):
        verify.check(folder, None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_profiling": "{out}/prof"}, "has the session option enable_profiling"),
        ({"optimized_model_filepath": "{out}/model"}, "has the session option optimized_model_filepath"),
        ({"provider_options": [{"cuda": {"path": "{out}/x"}}]}, "names a path among the provider options"),
        ({"provider_options": [{"QNN": {"backend_path": "..\\\\evil"}}]}, "names a path among the provider options"),
        (
            {"provider_options": [{"QNN": {"backend_path": "libevil.so.1"}}]},
            "names a library among the provider options",
        ),
    ],
)
@pytest.mark.parametrize("twice", [False, True])
def test_a_session_option_that_writes_files_is_never_taken(parts, tmp_path, options, reason, twice):
    folder, out = pack(parts, tmp_path / "package"), tmp_path / "out"
    out.mkdir()
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    plain = json.dumps(config["model"]["decoder"]["session_options"])
    evil = json.dumps(config["model"]["decoder"]["session_options"] | options).replace("{out}", str(out))
    both = f'{evil}, "session_options": {plain}'  # under one name: a reader may take either
    text = json.dumps(config).replace(plain, both if twice else evil)
    (folder / "genai_config.json").write_text(text, encoding="utf-8")
    reseal(folder, "bill", "provenance")
    with pytest.raises(UserError, match=reason):
        verify.check(folder, None)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("where", "name", "value", "reason"),
    [
        (["model", "decoder"], "run_options", {"enable_profiling": "{out}/prof"}, "has the setting run_options"),
        (["model"], "encoder", {"session_options": {"enable_profiling": "{out}/prof"}}, "has the setting encoder"),
        (["model", "decoder"], "filename", "../model.onnx", r"names a path in model\.decoder\.filename"),
        (["model", "decoder"], "filename", "model.DLL", r"names a library in model\.decoder\.filename"),
        ([], "engine", {}, "has the setting engine"),
    ],
)
def test_settings_that_no_package_of_slmake_has_are_refused(parts, tmp_path, where, name, value, reason):
    folder, out = pack(parts, tmp_path / "package"), tmp_path / "out"
    out.mkdir()
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    part = config
    for step in where:
        part = part[step]
    part[name] = json.loads(json.dumps(value).replace("{out}", str(out)))
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    reseal(folder, "bill", "provenance")
    with pytest.raises(UserError, match=f"genai_config.json {reason}"):
        verify.check(folder, None)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("genai_config.json", b"{", "genai_config.json cannot be read"),
        ("genai_config.json", b"\xef\xbb\xbf{}", "genai_config.json cannot be read"),
        ("genai_config.json", b"\xff\xfe{}", "genai_config.json cannot be read"),
        ("genai_config.json", b"[" * 100_000, "genai_config.json cannot be read"),
        ("genai_config.json", b"[]", "genai_config.json is no JSON object"),
        ("genai_config.json", None, "genai_config.json cannot be read"),
        ("bom.cdx.json", b"[" * 100_000, "bom.cdx.json is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_message(parts, tmp_path, capsys, name, content, reason):
    folder = pack(parts, tmp_path / "package")
    if content is None:
        (folder / name).unlink()
        change_bill(folder, lambda bom: bom.update(components=[c for c in bom["components"] if c["name"] != name]))
    else:
        (folder / name).write_bytes(content)
        reseal(folder, *(["provenance"] if name == "bom.cdx.json" else ["bill", "provenance"]))
    assert reason in refused(capsys, folder, "--package-only")


@pytest.mark.parametrize("name", ["evil.so", "libevil.so.1", "evil.SO", "Evil.Dll", "evil.dylib", "evil.pyd"])
def test_a_library_in_a_package_is_refused(parts, tmp_path, name):
    folder = pack(parts, tmp_path / "package")
    (folder / name).write_bytes(b"\x7fELF")
    reseal(folder, "bill", "provenance")
    with pytest.raises(UserError, match=r"is a library|not part of the package"):
        verify.check(folder, None)


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
