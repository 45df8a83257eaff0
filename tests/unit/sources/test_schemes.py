"""The source syntax: what each form means, what must be pinned, and what is refused without repeating a secret."""

import subprocess
import sys

import pytest
from tiny import ROOT, write_params

from slmake import params
from slmake.errors import UserError
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
        schemes.parse(text)


SECRET = "s3cr3tS3CR3T"
WITH_SECRETS = [
    # user and password
    f"https://me:{SECRET}@host/x.json",
    f"https://{SECRET}@host/x.json",
    f"https://me:a/{SECRET}@host/x.json",
    f"https://me:a#{SECRET}@host/x.json",
    f"https://me:a?{SECRET}@host/x.json",
    f"https://me:12345#{SECRET}@host/x.json",
    f"http://me:{SECRET}@host:8080/x.json#sha256={SUM}",
    f"https://host:{SECRET}/x.json#sha256={SUM}",
    f"abfs://c:{SECRET}@store.dfs.core.windows.net/x#etag=1",
    f"abfss://c:{SECRET}@store/x#etag=1",
    f"abfs://c:{SECRET}",
    f"https://host;{SECRET}/x.json#sha256={SUM}",
    f"az://c:{SECRET}@store/x#etag=1",
    f"hf:me:{SECRET}@v1",
    f"hf:org/name:{SECRET}@v1",
    f"ftp://me:{SECRET}@host/x.json",
    f"https://me%3A{SECRET}%40host/x.json#sha256={SUM}",
    f"https://a@host%3F{SECRET}",
    f"abfs://me%40host:{SECRET}",
    f"az://data/x%3F{SECRET}#etag=1",
    # a query
    f"https://a.blob.core.windows.net/c/x.json?sv=2024&sig={SECRET}#sha256={SUM}",
    f"https://host/x.json?X-Amz-Signature={SECRET}#sha256={SUM}",
    f"https://host/x.json?apikey={SECRET}#sha256={SUM}",
    f"https://host/x.json?private_token={SECRET}#sha256={SUM}",
    f"https://host/x.json?api-key={SECRET}#sha256={SUM}",
    f"https://host/x.json?code={SECRET}#sha256={SUM}",
    f"https://host/x.json?auth={SECRET}#sha256={SUM}",
    f"https://host/x.json?secret={SECRET}#sha256={SUM}",
    f"https://host/x.json?pwd={SECRET}#sha256={SUM}",
    f"https://host/x.json?subscription-key={SECRET}#sha256={SUM}",
    f"https://host/x.json?{SECRET}#sha256={SUM}",
    f"https://host/x.json?whatever={SECRET}#sha256={SUM}",
    f"https://host/x.json?raw=1;sig={SECRET}#sha256={SUM}",
    f"https://host/x.json?download={SECRET * 4}#sha256={SUM}",
    f"https://host/x.json?download=a%20{SECRET}#sha256={SUM}",
    f"https://host/x.json?raw=1&key={SECRET}#sha256={SUM}",
    f"HTTPS://host/x.json?key={SECRET}#sha256={SUM}",
    f"az://data/x?sig={SECRET}",
    f"abfs://data@store.dfs.core.windows.net/x?{SECRET}#etag=1",
    f"azureml://datastores/b/paths/x?sig={SECRET}#etag=1",
    f"azureml://datastores/b/paths/x?{SECRET}#etag=1",
    f"azureml://registries/r/models/m/versions/1?sig={SECRET}",
    f"hf:org/name@v1?token={SECRET}",
    f"hf:org/name@v1/x.json?download={SECRET}",
    f"pypi:name==1.0/m.gguf?token={SECRET}",
    f"pypi:name==1.0@https://me:{SECRET}@host/m.gguf",
    # parameters of a path, and fragments
    f"https://host/x.json;sig={SECRET}#sha256={SUM}",
    f"https://host/x.json;jsessionid={SECRET}#sha256={SUM}",
    f"https://host/x.json%3Fsig%3D{SECRET}#sha256={SUM}",
    f"https://host/x.json&sig={SECRET}#sha256={SUM}",
    f"https://host/token={SECRET}/x.json#sha256={SUM}",
    f"https://host/x#sig={SECRET}",
    f"https://host/x#sha256={SUM}&sig={SECRET}",
    f"https://host/x#{SECRET}",
    f"az://data/a#sig={SECRET}",
    f"hf:org/name@v1#token={SECRET}",
    f"https:/host/x.json?key={SECRET}",
    f"//host/x.json?sig={SECRET}",
    f"data/x.json?access_token={SECRET}",
]


@pytest.mark.parametrize("text", WITH_SECRETS)
def test_credentials_in_a_source_are_refused_and_not_repeated(text):
    for must_pin in (True, False):
        with pytest.raises(ValueError, match=r"\w") as caught:
            schemes.parse(text, must_pin)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("section", ["fetch_model", "prepare"])
@pytest.mark.parametrize("text", WITH_SECRETS)
def test_params_yaml_with_a_credential_is_refused_without_it(tmp_path, text, section):
    path = write_params(tmp_path / "params.yaml", **{section: {"source": text}})
    with pytest.raises(UserError) as caught:
        params.load(path)
    assert SECRET not in str(caught.value)


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
    code = "import sys, slmake.sources.schemes; print({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
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
