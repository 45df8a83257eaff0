"""How a data set or a base model is named in params.yaml, wherever it lies. Standard library only; nothing is read here.

    path/to/file                                    a file or folder here
    https://host/path                               a file of a web server
    hf:ORG/NAME@REVISION[/file]                     a repository of the Hugging Face hub, or one file of it
    az://container/path                             Azure Blob; the account comes from the environment
    abfs://container@account.dfs.core.windows.net/path
    azureml://datastores/NAME/paths/PATH            a datastore of an Azure Machine Learning workspace (or Azure ML's long form,
                                                    with subscriptions/…/resourcegroups/…/workspaces/… in front)
    azureml://registries/REGISTRY/models/NAME/versions/VERSION
    pypi:NAME==VERSION/path/inside/the/wheel        a file in a wheel of the package index

Behind any of them, `#sha256=HEX` or `#etag=VALUE` pins the content, as pip's URLs do. A file inside a wheel is named behind the
wheel: `…/x.whl/inner/file.gguf`. A remote source must be pinned: by the revision (hf), by the version (registries, pypi), or by one of these.
"""

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

KINDS = (
    "a local path, https://…, hf:ORG/NAME@REVISION[/file], az://container/path, azureml://datastores/NAME/paths/PATH, "
    "azureml://registries/REGISTRY/models/NAME/versions/VERSION, or pypi:NAME==VERSION/file"
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Query parameters that carry a credential: Azure's and Amazon's signatures, and what servers commonly call theirs.
SECRETS = {
    "sig",
    "signature",
    "x-amz-signature",
    "x-goog-signature",
    "token",
    "access_token",
    "key",
    "api_key",
    "password",
}


class Source(NamedTuple):
    """A parsed source."""

    text: str  # what is read: as given, without the pin and without the file inside a wheel
    kind: str  # local, https, hf, az, datastore, registry, pypi
    pin: tuple[str, str] | None = None  # ("sha256", 64 hex digits) or ("etag", value)
    name: str = ""  # hf: ORG/NAME; datastore, registry: its name; pypi: NAME==VERSION; az: container
    revision: str = ""  # hf: revision; registry: the model's version
    path: str = ""  # hf: file or ""; az, datastore: path in it; registry: the model's name; local: path
    account: str = ""  # az: account; datastore: subscription/resource group/workspace; where the URI names it
    member: str = ""  # file inside a wheel

    @property
    def full(self) -> str:
        """The source as it was given, with the file inside the wheel, without the pin."""
        return f"{self.text}/{self.member}" if self.member else self.text

    @property
    def remote(self) -> bool:
        """Whether it must be brought here before it can be read."""
        return self.kind != "local"

    @property
    def sha256(self) -> str | None:
        """The SHA-256 it is pinned to, if it is."""
        return self.pin[1] if self.pin and self.pin[0] == "sha256" else None


def parse(text: str, must_pin: bool = True) -> Source:
    """Read one source.

    Args:
        must_pin: refuse a remote source without a pin.

    Raises:
        ValueError: not of a known form, not pinned, with a credential in it, or a pickle; the message holds no credential.
    """
    whole, mark, pin_text = text.partition("#")
    pin = _pin(pin_text) if mark and re.match(r"(sha256|etag)=", pin_text) else None
    if mark and not pin:
        whole = text  # a # of a file's own name
    wheel, inside, member = whole.partition(".whl/")
    if inside and member and not whole.startswith("pypi:"):
        whole = wheel + ".whl"
    else:
        member = ""
    for prefix, reader in _READERS.items():
        if whole.startswith(prefix):
            source = reader(whole)._replace(pin=pin, member=member)
            break
    else:
        scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+)://", whole)
        if scheme:
            raise ValueError(f"sources that begin with `{scheme[0]}` are not known. Known are {KINDS}")
        source = Source(whole, "local", pin, path=whole, member=member)
    _refuse_pickle(source)
    if must_pin and source.kind in ("https", "az", "datastore") and not pin:
        raise ValueError(
            f"`{source.full}` is not pinned, so its content could change unnoticed. `python -m tools.pin '{source.full}'` prints "
            "it with its pin"
        )
    if must_pin and source.text.startswith("http://") and not source.sha256:
        raise ValueError("an http:// source needs #sha256=…, because nothing else protects its bytes on the way")
    return source


def is_remote(text: str) -> bool:
    """Whether a source that `parse` accepts is not a local path."""
    return parse(text).remote


def local_path(text: str) -> str:
    """The path of a local source, without its pin."""
    return parse(text).path


def _pin(text: str) -> tuple[str, str]:
    kind, _, value = text.partition("=")
    if kind == "sha256" and not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError("the pin behind # is not of the form sha256=64 hex digits")
    if not value:
        raise ValueError("the pin behind # is empty")
    return kind, value.strip('"')


def pickle_advice(name: str) -> str:
    """Why a pickled file is refused, and how to convert it."""
    return (
        f"{name}, a pickle format, which can run code when it is read. Convert it where you trust it: a model with "
        "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)`, a table with "
        "`pandas.read_pickle(FILE).to_json(NEW, orient='records', lines=True)`"
    )


def _refuse_pickle(source: Source) -> None:
    name = source.member or source.path or source.text
    if name.endswith(PICKLES):
        raise ValueError(f"the source is {pickle_advice(name.rpartition('/')[2])}")


def _https(text: str) -> Source:
    url = urlsplit(text)
    if url.username or url.password:
        raise ValueError("a URL with a user or password in it is refused: put them into ~/.netrc")
    if {name.lower() for name, _ in parse_qsl(url.query, keep_blank_values=True)} & SECRETS:
        raise ValueError(
            "a URL with a signature or key in it is refused: params.yaml, logs and results are shared. For Azure Blob use "
            "az://container/path, with the SAS in AZURE_STORAGE_SAS_TOKEN"
        )
    if not url.hostname or url.path in ("", "/"):
        raise ValueError(f"`{text}` does not name a file: https://host/path")
    return Source(text, "https", path=url.path)


def _hub(text: str) -> Source:
    found = re.fullmatch(r"hf:(?P<name>[^@\s]+)@(?P<revision>[^/\s]+)(/(?P<path>\S+))?", text)
    if not found:
        raise ValueError(
            f"`{text}` is not of the form hf:ORG/NAME@REVISION[/file]: a hub source needs a revision (a commit hash or a tag)"
        )
    # The hub's own rule for names (huggingface_hub, validate_repo_id): said here before anything runs.
    name = found["name"]
    part = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?"
    if (
        not re.fullmatch(f"({part}/)?{part}", name)
        or "--" in name
        or ".." in name
        or len(name) > 96
        or name.endswith(".git")
    ):
        raise ValueError(
            f"`{name}` cannot be a name on the hub: ORG/NAME of letters, digits, `-`, `_` and `.`, without `--` or `..`, neither "
            "beginning nor ending with `-` or `.`, at most 96 characters"
        )
    return Source(text, "hf", name=name, revision=found["revision"], path=found["path"] or "")


def _azure(text: str) -> Source:
    url = urlsplit(text)
    if url.query:
        raise ValueError("an az:// source takes no query: put a SAS into AZURE_STORAGE_SAS_TOKEN")
    container, at, host = url.netloc.partition("@")
    if at and not re.fullmatch(r"[a-z0-9]+\.(dfs|blob)\.core\.[a-z.]+", host):
        raise ValueError(
            f"`{url.scheme}://{container}@…` does not name an account: CONTAINER@ACCOUNT.dfs.core.windows.net"
        )
    path = url.path.strip("/")
    if not re.fullmatch(r"[a-z0-9$](-?[a-z0-9])+", container) or not path:
        raise ValueError(f"`{text}` is not of the form az://container/path")
    return Source(text, "az", name=container, path=path, account=host.split(".")[0])


def _azureml(text: str) -> Source:
    workspace = r"(?:subscriptions/([\w-]+)/resource[gG]roups/([\w.()-]+)/(?:providers/Microsoft\.MachineLearningServices/)?workspaces/([\w-]+)/)?"
    if found := re.fullmatch(rf"azureml://{workspace}datastores/([\w-]+)/paths/(\S+)", text):
        account = "/".join(filter(None, found.groups()[:3]))
        return Source(text, "datastore", name=found[4], path=found[5].strip("/"), account=account)
    if found := re.fullmatch(r"azureml://registries/([\w-]+)/models/([\w.-]+)/versions/([\w.-]+)", text):
        return Source(text, "registry", name=found[1], path=found[2], revision=found[3])
    raise ValueError(
        f"`{text}` is neither azureml://datastores/NAME/paths/PATH nor azureml://registries/REGISTRY/models/NAME/versions/VERSION"
    )


def _index(text: str) -> Source:
    requirement, _, member = text.removeprefix("pypi:").partition("/")
    if "==" not in requirement or not member:
        raise ValueError(f"`{text}` is not of the form pypi:NAME==VERSION/path/inside/the/wheel.gguf")
    return Source(text, "pypi", name=requirement, path=member)


_READERS = {
    "https://": _https,
    "http://": _https,
    "hf:": _hub,
    "az://": _azure,
    "abfs://": _azure,
    "abfss://": _azure,
    "azureml://": _azureml,
    "pypi:": _index,
}
