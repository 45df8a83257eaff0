"""The source syntax: what each form means, what must be pinned, and what is refused without repeating a secret."""

import subprocess
import sys

import pytest
from tiny import ROOT

from slmake.sources import schemes

SUM = "a" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/rows.json", {"kind": "local", "path": "data/rows.json", "pin": None}),
        (f"models/tiny#sha256={SUM}", {"kind": "local", "path": "models/tiny", "pin": ("sha256", SUM)}),
        ("odd#name.json", {"kind": "local", "path": "odd#name.json", "pin": None}),
        ("wheels/x.whl/in/m.gguf", {"kind": "local", "path": "wheels/x.whl", "member": "in/m.gguf"}),
        (
            f"https://host/a/b.jsonl#sha256={SUM}",
            {"kind": "https", "text": "https://host/a/b.jsonl", "path": "/a/b.jsonl"},
        ),
        (
            f"https://host/x.whl/in/m.gguf#sha256={SUM}",
            {"kind": "https", "text": "https://host/x.whl", "member": "in/m.gguf"},
        ),
        ("hf:org/name@v1", {"kind": "hf", "name": "org/name", "revision": "v1", "path": ""}),
        ("hf:name@main/sub/rows.csv", {"kind": "hf", "name": "name", "revision": "main", "path": "sub/rows.csv"}),
        (
            "az://data/a/b#etag=0x8D",
            {"kind": "az", "name": "data", "path": "a/b", "pin": ("etag", "0x8D"), "account": ""},
        ),
        ('az://data/a#etag="0x8D"', {"pin": ("etag", "0x8D")}),
        (
            "abfs://data@store.dfs.core.windows.net/a#etag=1",
            {"kind": "az", "name": "data", "path": "a", "account": "store"},
        ),
        ("azureml://datastores/blobs/paths/a/b#etag=1", {"kind": "datastore", "name": "blobs", "path": "a/b"}),
        (
            "azureml://subscriptions/s-1/resourcegroups/g/workspaces/w/datastores/blobs/paths/a#etag=1",
            {"kind": "datastore", "name": "blobs", "account": "s-1/g/w"},
        ),
        (
            "azureml://registries/azureml/models/Phi-3/versions/7",
            {"kind": "registry", "name": "azureml", "path": "Phi-3", "revision": "7", "pin": None},
        ),
        (
            "pypi:name==1.0/in/m.gguf",
            {"kind": "pypi", "name": "name==1.0", "member": "in/m.gguf", "full": "pypi:name==1.0/in/m.gguf"},
        ),
    ],
)
def test_forms(text, expected):
    source = schemes.parse(text)
    assert {key: getattr(source, key) for key in expected} == expected
    assert source.remote == (source.kind != "local")


@pytest.mark.parametrize("text", ["https://host/x.jsonl", "az://data/a", "azureml://datastores/b/paths/a"])
def test_remote_sources_must_be_pinned(text):
    with pytest.raises(
        ValueError, match=r"is not pinned, so its content could change unnoticed. `python -m tools.pin '"
    ):
        schemes.parse(text)
    assert schemes.parse(text, must_pin=False).pin is None


SECRET = "s3cr3tS3CR3T"


@pytest.mark.parametrize(
    "text",
    [
        "data/rows.json",
        "data/what?.json",
        "odd#name.json",
        "C:/data/rows.json",
        "data/lang=en/rows.csv",
        "data/a&b;c.json",
        f"https://host/a/b.jsonl#sha256={SUM}",
        "https://host:8443/a/b.jsonl#etag=W/abc-1",
        f"https://host/x.json?download=true#sha256={SUM}",
        f"https://host/x.json?ref=3f2a1b0&raw=1#sha256={SUM}",
        f"https://host/x?api-version=2024-05-01&format=csv#sha256={SUM}",
        f"https://cdn.example.org/npm/pkg@1.2.3/rows.json#sha256={SUM}",
        f"https://host/year=2024/country_code=US/rows.parquet#sha256={SUM}",
        f"https://host/design=1/tokens/keys.json#sha256={SUM}",
        f"https://host/with%20space/gr%C3%BC%C3%9Fe.json#sha256={SUM}",
        f"http://localhost:8000/x.json#sha256={SUM}",
        "hf:org/name@v1.0",
        "hf:org/data@0123456789abcdef0123456789abcdef01234567/train/part-0.parquet",
        "az://data/a/b#etag=0x8D",
        "abfs://data@store.dfs.core.windows.net/a b/c#etag=1",
        "azureml://datastores/blobs/paths/a/b#etag=1",
        "azureml://registries/azureml/models/Phi-3/versions/7",
        "pypi:name==1.0.post1/in/m.gguf",
    ],
)
def test_sources_without_credentials_work(text):
    source = schemes.parse(text)
    pin = f"#{source.pin[0]}={source.pin[1]}" if source.pin else ""
    assert source.full + pin == text


@pytest.mark.parametrize(
    "text",
    [
        "wheels/x.whl/../../etc/passwd",
        "wheels/x.whl//etc/passwd",
        "wheels/x.whl/a/../m.gguf",
        "pypi:name==1.0/../m.gguf",
        "pypi:name==1.0//m.gguf",
        "pypi:name==1.0/a\\b.gguf",
        "hf:org/name@v1/../../x.json",
        "hf:org/name@v1//x.json",
        "hf:org/name@v1/a/./x.json",
        "az://data/a/../x#etag=1",
        "azureml://datastores/b/paths/../x#etag=1",
    ],
)
def test_names_inside_a_source_are_plain_relative_paths(text):
    with pytest.raises(ValueError, match="names a file that is no plain relative path"):
        schemes.parse(text)


def test_parsing_needs_the_standard_library_only():
    loaded = "{name.split('.')[0] for name, module in sys.modules.items() if module}"  # cli keeps one package from being loaded
    code = f"import sys, slmake.sources.schemes; print({loaded} - sys.stdlib_module_names)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "{'__main__', 'slmake'}" or done.stdout.strip() == "{'slmake', '__main__'}", (
        done.stderr
    )


def test_the_hub_agrees_about_names():
    """Every name that huggingface_hub rejects is rejected here, before anything runs; and the other way round."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for name in (
        "../up",
        "a/b",
        "-a/b",
        "a/b.",
        "a/b-",
        "a..b",
        "a--b",
        "a_b/c.d-e",
        "a/b/c",
        "n" * 97,
        "a/b.git",
        ".a",
        "a b",
    ):
        try:
            validate_repo_id(name)
            accepted = True
        except HFValidationError:
            accepted = False
        try:
            schemes.parse(f"hf:{name}@v1")
            ours = True
        except ValueError:
            ours = False
        assert ours == accepted, name


@pytest.mark.parametrize("before", [" https://", "//", "\thttps://", " //"])
def test_an_address_that_looks_like_a_path_is_refused_without_its_secret(before):
    with pytest.raises(ValueError, match="a path with outer white space") as refused:
        schemes.parse(f"{before}user:{SECRET}@host/x.json")
    assert SECRET not in str(refused.value)
