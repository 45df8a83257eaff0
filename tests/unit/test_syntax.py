"""The source syntax: what each form means, what must be pinned, and what is refused without repeating a secret."""

import pytest

from slmake.sources import syntax

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
        ("pypi:name==1.0/in/m.gguf", {"kind": "pypi", "name": "name==1.0", "path": "in/m.gguf"}),
    ],
)
def test_forms(text, expected):
    source = syntax.parse(text)
    assert {key: getattr(source, key) for key in expected} == expected
    assert source.remote == (source.kind != "local")


@pytest.mark.parametrize("text", ["https://host/x.jsonl", "az://data/a", "azureml://datastores/b/paths/a"])
def test_remote_sources_must_be_pinned(text):
    with pytest.raises(
        ValueError, match=r"is not pinned, so its content could change unnoticed. `python -m tools.pin '"
    ):
        syntax.parse(text)
    assert syntax.parse(text, must_pin=False).pin is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hf:../up@x", "cannot be a name on the hub"),
        ("hf:org/-name@x", "cannot be a name on the hub"),
        ("hf:org/a--b@x", "cannot be a name on the hub"),
        ("hf:a/b/c@main", "cannot be a name on the hub"),
        (f"hf:org/{'n' * 97}@x", "cannot be a name on the hub"),
        ("hf:org/tiny@", "is not of the form hf:ORG/NAME@REVISION"),
        ("hf:org/tiny", "a hub source needs a revision"),
        ("pypi:name/a.gguf", "is not of the form pypi:NAME==VERSION"),
        ("s3://bucket/x", "sources that begin with `s3://` are not known"),
        ("azureml://models/x", "is neither azureml://datastores"),
        ("az://UPPER/x", "is not of the form az://container/path"),
        ("az://data", "is not of the form az://container/path"),
        ("abfs://data@evil.example.org/x#etag=1", "does not name an account"),
        ("data/x.json#sha256=abc", "not of the form sha256=64 hex digits"),
        ("http://host/x.json#etag=1", "an http:// source needs #sha256="),
        ("model.pt", r"model.pt, a pickle format.*safe_serialization=True"),
        ("az://data/rows.pkl#etag=1", r"rows.pkl, a pickle format.*read_pickle"),
        ("hf:org/name@v1/pytorch_model.bin", "pytorch_model.bin, a pickle format"),
    ],
)
def test_refused(text, why):
    with pytest.raises(ValueError, match=why):
        syntax.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://me:s3cr3t@host/x.json",
        "https://a.blob.core.windows.net/c/x.json?sv=2024&sig=s3cr3t",
        "https://host/x.json?X-Amz-Signature=s3cr3t",
        "az://data/x?sig=s3cr3t",
    ],
)
def test_credentials_in_a_source_are_refused_and_not_repeated(text):
    with pytest.raises(ValueError, match=r"refused|takes no query") as caught:
        syntax.parse(text)
    assert "s3cr3t" not in str(caught.value)


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
            syntax.parse(f"hf:{name}@v1")
            ours = True
        except ValueError:
            ours = False
        assert ours == accepted, name
