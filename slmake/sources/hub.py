"""Files of the Hugging Face hub, through huggingface_hub and its cache. A login comes from `hf auth login` or HF_TOKEN."""

import functools
import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from slmake import cli
from slmake.credentials import masked
from slmake.errors import UserError
from slmake.sources.base import Source, check_plain, not_of_form
from slmake.sources.download import digest_of
from slmake.sources.fetching import ENDINGS, ROWS, sums_of


@dataclass(frozen=True, kw_only=True)
class HubRepository(Source):
    """`hf:ORG/NAME@REVISION`, or `hf:ORG/NAME@REVISION/file`; the revision fixes the content."""

    kind = "hf"
    prefixes = ("hf:",)
    form = "hf:ORG/NAME@REVISION[/file]"
    pin_needed = False

    name: str = ""  # ORG/NAME
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        parts = re.fullmatch(r"hf:(?P<name>[^@\s]+)@(?P<revision>[\w.-]+)(/(?P<path>\S+))?", text)
        if not parts:
            raise not_of_form(cls, text, ": a hub source needs a revision (a commit hash or a tag)")
        # The hub's own rule for names (huggingface_hub, validate_repo_id): checked here before anything runs.
        name = parts["name"]
        part = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?"
        if (
            not re.fullmatch(f"({part}/)?{part}", name)
            or "--" in name
            or ".." in name
            or len(name) > 96
            or name.endswith(".git")
        ):
            raise ValueError(
                f"`{masked(text)}` cannot be a name on the hub: ORG/NAME of letters, digits, `-`, `_` and `.`, without `--` or `..`, "
                "neither beginning nor ending with `-` or `.`, at most 96 characters"
            )
        path = check_plain(parts["path"], text) if parts["path"] else ""
        return cls(text=text, name=name, revision=parts["revision"], path=path)

    def pinned(self, job: cli.Job) -> str:
        """The source with the commit that its revision stands for now."""
        return self.full.replace(f"@{self.revision}", f"@{commit_of(self)}", 1)

    def fetch(self, use: str, folder: Path, job: cli.Job) -> tuple[Path, dict]:
        pattern = glob.has_magic(self.path)  # several files of a dataset
        endings = ENDINGS if use == "model" else ROWS
        patterns = [self.path] if pattern else [f"*{ending}" for ending in endings]
        path, commit = from_hub(replace(self, path="") if pattern else self, patterns, use)
        if path.is_dir() and not self.sha256 and offline():
            job.say(
                f"warning: {self.full}: HF_HUB_OFFLINE is set, so the cached files are taken as they are. Files may be missing: a SHA-256 "
                "of the whole would tell."
            )
        return path, {"pin": {"revision": self.revision}, "revision": commit}


def offline() -> bool:
    """Whether the user keeps huggingface_hub from the network, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def from_hub(source: HubRepository, patterns: Iterable[str], repo_type: str) -> tuple[Path, str]:
    """Fetch a repository's files, or one of them, into huggingface_hub's cache.

    What is cached of a repository may be a part of it: the cache alone is believed where the whole has the pinned sum, or with
    HF_HUB_OFFLINE.

    Args:
        patterns: which files of the repository, as shell patterns; unused where the source names one file.
        repo_type: `model` or `dataset`.

    Returns:
        The file or the snapshot's folder, and the commit that the revision stands for.

    Raises:
        UserError: no such repository, revision or file; or out of reach.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    what = source.full
    keyword = {"repo_id": source.name, "revision": source.revision, "repo_type": repo_type}
    if source.path:
        fetch = functools.partial(hf_hub_download, filename=source.path, **keyword)
    else:
        fetch = functools.partial(snapshot_download, allow_patterns=list(patterns), **keyword)
    try:
        path = None
        if re.fullmatch("[0-9a-f]{40}", source.revision):  # a commit never changes: the hub need not be asked
            try:
                path = Path(fetch(local_files_only=True))
                if path.is_dir() and (not source.sha256 or digest_of(sums_of(path, repo_type)) != source.sha256):
                    path = None
            except errors.LocalEntryNotFoundError:
                path = None
        if not path and not source.path and not offline():
            commit_of(source, repo_type)  # without an answer, snapshot_download would return what is cached
        path = path or Path(fetch())
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
    except (errors.HTTPError, OSError) as error:
        raise _out_of_reach(what, error) from None
    parts = path.parts
    return path, parts[parts.index("snapshots") + 1]


def _out_of_reach(what: str, error: Exception) -> UserError:
    return UserError(
        f"{what}: the hub cannot be reached and it is not in the local cache ({type(error).__name__}). Check the network and try again, "
        "or name a local path."
    )


def commit_of(source: HubRepository, *kinds: str) -> str:
    """The commit that a revision stands for now, of a repository of these kinds: by default a model, or else a dataset of that name."""
    from huggingface_hub import HfApi, errors

    for repo_type in kinds or ("model", "dataset"):
        try:
            return HfApi().repo_info(source.name, revision=source.revision, repo_type=repo_type).sha
        except errors.RepositoryNotFoundError:
            continue
        except errors.RevisionNotFoundError:
            raise UserError(f"{source.full}: no revision `{source.revision}` there.") from None
        except (errors.HTTPError, OSError) as error:
            raise UserError(
                f"{source.full}: the hub cannot be reached ({type(error).__name__}). Check the network and try again, or name a local path. "
                "HF_HUB_OFFLINE=1 takes what is in the local cache as it is."
            ) from None
    raise UserError(
        f"{source.full}: the hub knows no {' or '.join(kinds or ('model', 'dataset'))} {source.name}, or it is gated: log in with `hf auth login`."
    )
