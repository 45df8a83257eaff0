"""A dataset that is pinned to a commit and a sum, of which the hub's cache has a part: the hub is asked once for the rest."""

import huggingface_hub
import pytest

from slmake.errors import UserError
from slmake.sources import fetching, schemes
from slmake.sources.download import digest_of
from slmake.sources.fetching import sums_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = {"train.csv": "text\na\n", "test.csv": "text\nb\n"}


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Fetch the dataset from a hub that has some files and a cache that has others: its sum, and how often the hub was asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = tmp_path / "snapshots" / COMMIT

    def write(files: dict[str, str]) -> None:
        snapshot.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (snapshot / name).write_text(text, encoding="utf-8")

    def run(cached: dict[str, str], remote: dict[str, str], pin: str) -> tuple[str, int]:
        asked = []

        def download(local_files_only: bool = False, **_: object) -> str:
            if not local_files_only:
                asked.append(1)
                write(remote)
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        write(cached)
        source = schemes.parse(f"hf:org/tones@{COMMIT}#sha256={pin}")
        try:
            return fetching.fetch(source, "dataset", tmp_path / "kept", None).record["sha256"], len(asked)
        except UserError as error:
            return str(error), len(asked)

    return run


@pytest.fixture
def total(tmp_path) -> str:
    folder = tmp_path / "whole"
    folder.mkdir()
    for name, text in ROWS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return digest_of(sums_of(folder, "dataset"))


def test_a_whole_snapshot_is_used_without_the_hub(fetch, total):
    assert fetch(ROWS, {}, total) == (total, 0)


def test_a_partial_snapshot_is_completed(fetch, total):
    assert fetch({"train.csv": ROWS["train.csv"]}, ROWS, total) == (total, 1)


def test_another_dataset_is_refused_after_the_hub_was_asked_once(fetch):
    message, asked = fetch(ROWS, ROWS, "0" * 64)
    assert "is not what was asked for" in message
    assert asked == 1
