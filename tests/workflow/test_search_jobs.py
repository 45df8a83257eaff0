"""A search as Snakemake runs it: candidates as jobs, the winner exported, packed and shown; and a search that nothing survives."""

import json

from project import change, digests, planned, snakemake


def test_the_winner_is_exported_packed_and_shown(searched):
    result = json.loads((searched / "results" / "search.json").read_text(encoding="utf-8"))
    assert [one["options"]["block_size"] for one in result["candidates"]] == [16, 32]
    assert result["winner"] == 1, "the larger blocks are the smaller file"
    winner = searched / "build" / "search" / "1" / "model"
    for path in winner.iterdir():
        assert (searched / "build" / "onnx-int4" / path.name).read_bytes() == path.read_bytes()
    card = (searched / "build" / "package" / "README.md").read_text(encoding="utf-8")
    assert "| `block_size` | `32` |" in card
    assert "Candidate 1 of 2: of those that passed the gates on 24 tuning rows the smallest." in card
    page = (searched / "build" / "report" / "candidates.html").read_text(encoding="utf-8")
    assert "block_size 16" in page
    assert "chosen" in page
    assert planned(searched) == set()


def test_one_more_value_builds_one_more_candidate(copy_of_searched):
    change(copy_of_searched, "quantize", search={"block_size": [16, 32, 64], "rows": 24})
    done = snakemake(copy_of_searched, "--dry-run", "--quiet", "rules")
    after = {"rehearse", "candidate", "search", "quantize", "evaluate", "gates", "package", "report"}
    assert planned(copy_of_searched) == after
    counts = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("candidate ", "search ")))
    assert counts == {"candidate": "1", "search": "1"}


def test_no_survivor_shows_near_misses_and_keeps_what_was_built(copy_of_searched):
    before = digests(copy_of_searched)
    change(copy_of_searched, "gates", checks=[{"metric": "size_bytes", "maximum": 1000}])
    done = snakemake(copy_of_searched)
    assert done.returncode != 0
    assert "none of 2 candidates passes the gates on the tuning rows. The nearest:" in done.stdout
    assert "candidate 1: block_size 32" in done.stdout
    assert "MISSED" in done.stdout
    assert "Add options to quantize.search" in done.stdout
    after = digests(copy_of_searched)
    assert after == {name: digest for name, digest in before.items() if name != "results/search.json"}
