"""Files of the Hugging Face hub, through huggingface_hub and its cache. A login comes from `hf auth login` or HF_TOKEN."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from slmake.errors import UserError
from slmake.sources.syntax import Source


def from_hub(source: Source, patterns: Iterable[str], repo_type: str) -> tuple[Path, str]:
    """Bring a repository's files, or one of them, into huggingface_hub's cache.

    Args:
        patterns: which files of the repository, as shell patterns; unused where the source names one file.
        repo_type: `model` or `dataset`.

    Returns:
        The file or the snapshot's folder, and the commit that the revision stands for.

    Raises:
        UserError: no such repository, revision or file; or out of reach and not in the cache.
    """
    os.environ.pop("HF_HUB_OFFLINE", None)
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    what = source.full
    keyword = {"repo_id": source.name, "revision": source.revision, "repo_type": repo_type}
    if source.path:
        fetch = lambda **more: Path(hf_hub_download(filename=source.path, **keyword, **more))  # noqa: E731
    else:
        fetch = lambda **more: Path(snapshot_download(allow_patterns=list(patterns), **keyword, **more))  # noqa: E731
    try:
        found = None
        if re.fullmatch("[0-9a-f]{40}", source.revision):  # one content for ever: the cache need not be asked about
            try:
                found = fetch(local_files_only=True)
                if found.is_dir() and not _complete(found):
                    found = None
            except errors.LocalEntryNotFoundError:
                found = None
        found = found or fetch()
    except errors.EntryNotFoundError as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(f"{what}: that repository has no file {source.path} at this revision.") from None
        raise _out_of_reach(what, error) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{what}: {source.name} has no revision `{source.revision}`. Take a commit hash or a tag of that repository."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{what}: the hub knows no {repo_type} {source.name}, or it is gated: log in with `hf auth login` or set HF_TOKEN."
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{what}: {str(error).splitlines()[0]}") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise _out_of_reach(what, error) from None
    parts = found.parts
    return found, parts[parts.index("snapshots") + 1]


def _complete(snapshot: Path) -> bool:
    """Whether a cached snapshot holds weights, so that nothing has to be asked of the hub."""
    import json

    index = snapshot / "model.safetensors.index.json"
    if index.exists():
        return all((snapshot / name).exists() for name in set(json.loads(index.read_text())["weight_map"].values()))
    return any(snapshot.glob("*.safetensors"))


def _out_of_reach(what: str, error: Exception) -> UserError:
    return UserError(
        f"{what}: the hub cannot be reached and it is not in the local cache ({type(error).__name__}). Check the network and try again, "
        "or name a local path."
    )


def commit_of(source: Source) -> str:
    """The commit that a revision stands for now, of a model or else a data set of that name."""
    from huggingface_hub import HfApi, errors

    for repo_type in ("model", "dataset"):
        try:
            return HfApi().repo_info(source.name, revision=source.revision, repo_type=repo_type).sha
        except errors.RepositoryNotFoundError:
            continue
        except errors.RevisionNotFoundError:
            raise UserError(f"{source.full}: no revision `{source.revision}` there.") from None
        except (errors.HfHubHTTPError, OSError) as error:
            raise _out_of_reach(source.full, error) from None
    raise UserError(
        f"{source.full}: the hub knows neither a model nor a data set {source.name}, or it is gated: log in with `hf auth login`."
    )
