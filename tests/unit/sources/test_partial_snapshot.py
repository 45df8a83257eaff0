"""A repository at a commit, of which the hub's cache may have a part: without the sum of the whole the hub is asked."""

from types import SimpleNamespace

import huggingface_hub
import pytest

from slmake.errors import UserError
from slmake.sources import fetching, schemes
from slmake.sources.download import digest_of
from slmake.sources.fetching import sums_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {
    "model.safetensors": "weights",
    "config.json": "{}",
    "generation_config.json": "{}",
    "chat_template.jinja": "{{ x }}",
}
PART = {name: MODEL[name] for name in ("model.safetensors", "config.json")}
ROWS = {"train.csv": "text\na\n", "test.csv": "text\nb\n"}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def fetch(tmp_path, monkeypatch, said):
    """Fetch from a hub that has some files and a cache that has others: the sum or the message, and how often the hub was asked."""
    snapshot = tmp_path / "snapshots" / COMMIT

    def write(files: dict[str, str]) -> None:
        snapshot.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (snapshot / name).write_text(text, encoding="utf-8")

    def run(
        cached: dict[str, str], remote: dict[str, str] | None, pin: str, use: str = "dataset", **more
    ) -> tuple[str, int]:
        """`remote` None: the hub is out of reach."""
        asked = []

        def repo_info(*_: object, **__: object) -> SimpleNamespace:
            if remote is None:
                raise ConnectionError
            return SimpleNamespace(sha=COMMIT)

        def download(local_files_only: bool = False, **_: object) -> str:
            if not local_files_only:
                asked.append(1)
                write(remote or {})
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
        write(cached)
        source = schemes.parse(f"hf:org/tones@{COMMIT}" + f"#sha256={pin}" * bool(pin))
        job = SimpleNamespace(say=said.append)
        try:
            return fetching.fetch(source, use, tmp_path / "kept", job, **more).record["sha256"], len(asked)
        except UserError as error:
            return str(error), len(asked)

    return run


def sum_of(folder, files: dict[str, str], use: str) -> str:
    """The SHA-256 of files as one, which are written into a folder."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return digest_of(sums_of(folder, use))


@pytest.fixture
def total(tmp_path) -> str:
    return sum_of(tmp_path / "whole", ROWS, "dataset")


def test_a_whole_snapshot_is_used_without_the_hub(fetch, total):
    assert fetch(ROWS, {}, total) == (total, 0)


def test_a_partial_snapshot_is_completed(fetch, total):
    assert fetch({"train.csv": ROWS["train.csv"]}, ROWS, total) == (total, 1)


def test_another_dataset_is_refused_after_the_hub_was_asked_once(fetch):
    message, asked = fetch(ROWS, ROWS, "0" * 64)
    assert "is not what was asked for" in message
    assert asked == 1


def test_a_partial_model_is_completed(fetch, tmp_path, said):
    """Its weights are there, but not what decides how it answers."""
    whole = sum_of(tmp_path / "model", MODEL, "model")
    assert fetch(PART, MODEL, "", "model") == (whole, 1)
    assert not said


@pytest.mark.parametrize("use", ["model", "dataset"])
def test_without_a_sum_a_hub_out_of_reach_is_an_error(fetch, use):
    message, asked = fetch(MODEL if use == "model" else ROWS, None, "", use)
    assert "the hub cannot be reached (ConnectionError)" in message
    assert "HF_HUB_OFFLINE=1 takes what is in the local cache as it is" in message
    assert asked == 0


@pytest.mark.parametrize("given", ["source", "parameter"])
def test_a_whole_model_of_the_right_sum_needs_no_hub(fetch, tmp_path, given, said):
    whole = sum_of(tmp_path / "model", MODEL, "model")
    more = {"sha256": whole} if given == "parameter" else {}
    assert fetch(MODEL, None, whole if given == "source" else "", "model", **more) == (whole, 0)
    assert not said


def test_offline_the_cache_is_taken_with_a_warning(fetch, tmp_path, monkeypatch, said):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(PART, None, "", "model")[0] == sum_of(tmp_path / "model", PART, "model")
    assert [line.startswith("warning: ") and "HF_HUB_OFFLINE is set" in line for line in said] == [True]
