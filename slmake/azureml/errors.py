"""Azure ML's failures as messages that name the field of azureml/settings.yaml to change."""

import contextlib
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from slmake.errors import UserError

QUOTA = re.compile(r"quota|not enough cores|core limit|NotAvailableForSubscription|SkuNotAvailable", re.I)
SECRET = re.compile(r"(sig|token|key|secret|password)=[^&\s\"']+", re.I)


def quieten() -> None:
    """No warnings of the SDK about itself; what matters is raised."""
    for name in ["azure", "msrest", "urllib3", *logging.root.manager.loggerDict]:
        if name.startswith(("azure", "msrest", "urllib3")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("azure.ai.ml._utils._experimental").disabled = True
    warnings.filterwarnings("ignore", module=r"azure|msrest")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Hide the SDK's progress bars and notices about its own classes."""
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
        yield


@contextlib.contextmanager
def translate_errors(field: str, file: Path | None = None, but: type | tuple = ()) -> Iterator[None]:
    """Turn an SDK error into a UserError that names `field` (of `file`); errors of the types `but` pass."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        if but and isinstance(error, but):
            raise
        raise explain(error, f"{file}: {field}" if file else field) from None


def passes(error: Exception) -> bool:
    """Whether a retry may help: a lost connection, a busy or failing server."""
    from azure.core.exceptions import (
        ClientAuthenticationError,
        HttpResponseError,
        ServiceRequestError,
        ServiceResponseError,
    )

    if isinstance(error, ServiceRequestError | ServiceResponseError):
        return True
    if isinstance(error, ClientAuthenticationError):
        return False
    return isinstance(error, HttpResponseError) and error.status_code in (None, 408, 429, 500, 502, 503, 504)


def explain(error: Exception, where: str) -> UserError:
    """One clear message for an error of the SDK, without a credential in it."""
    from azure.core.exceptions import (
        ClientAuthenticationError,
        HttpResponseError,
        ResourceNotFoundError,
        ServiceRequestError,
        ServiceResponseError,
    )

    reason = _reason(error)
    if isinstance(error, ClientAuthenticationError):
        return UserError(
            f"{where}: Azure rejected the credentials: {reason} Log in (`az login`), or check AZURE_CLIENT_ID and the like."
        )
    if isinstance(error, ResourceNotFoundError):
        return UserError(f"{where}: not found: {reason}")
    if isinstance(error, ServiceRequestError | ServiceResponseError):
        return UserError(f"{where}: no connection to Azure: {reason} Check the network and run the same command again.")
    status = getattr(error, "status_code", None)
    if QUOTA.search(f"{getattr(error, 'error', '')} {error}"):
        return UserError(
            f"{where}: the subscription's quota does not allow it: {reason} Choose a smaller size or fewer nodes, or ask for more quota in the portal."
        )
    if status == 403:
        return UserError(
            f"{where}: permission denied: {reason} You need the role AzureML Data Scientist (for clusters: AzureML Compute Operator)."
        )
    if isinstance(error, HttpResponseError) and status in (429, 500, 502, 503, 504):
        return UserError(f"{where}: Azure ML keeps answering {status}: {reason} Run the same command again later.")
    return UserError(f"{where}: {reason}")


def _reason(error: Exception) -> str:
    """The first sentence or two of the service's message."""
    text = getattr(getattr(error, "error", None), "message", None) or getattr(error, "message", None) or str(error)
    text = SECRET.sub(r"\1=…", re.sub(r"\x1b\[[0-9;]*m", "", str(text)))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    short = " ".join(lines[:3]) if lines else type(error).__name__
    short = short if len(short) < 500 else short[:500] + " …"
    return short if short.endswith((".", "…", "!")) else short + "."


def asset(uri: str) -> tuple[str, str | None, str | None]:
    """Name, version and label of `azureml:NAME:VERSION` or `azureml:NAME@LABEL`."""
    name, at, label = uri.removeprefix("azureml:").partition("@")
    if at:
        return name, None, label
    name, _, version = name.partition(":")
    return name, version or None, None if version else "latest"


def digest(files: dict[str, str]) -> str:
    """One SHA-256 for a folder, over names and SHA-256 of its files."""
    text = "".join(f"{name}\0{value}\n" for name, value in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()
