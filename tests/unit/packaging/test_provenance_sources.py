"""The provenance names a fetched adapter, and the execution provider that the exported model's figures were taken on."""

import hashlib
import json
from pathlib import Path

import pytest
from merge_script import make_adapter
from package_script import SCORES, pack
from tiny import ROOT, make_rows, write_params

from slmake import params
from slmake.packaging import contents
from slmake.packaging.provenance import provenance
from slmake.plan import Plan
from slmake.sources.fetching import fetch
from slmake.sources.schemes import parse
from tools import verify

STAGES = ["merge", "quantize", "evaluate", "gates", "package"]


def definition(statement: dict) -> dict:
    return statement["predicate"]["buildDefinition"]


def test_a_changed_adapter_is_named(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_adapter(base, tmp_path / "data" / "adapter")
    record = fetch(parse("data/adapter"), "model", tmp_path / "downloads", None).record
    statement = provenance({}, [], {}, {"base": {"source": "x"}, "adapter": record, "dataset": {"source": {}}})
    assert definition(statement)["resolvedDependencies"] == [
        {"name": "data/adapter", "digest": {"sha256": record["sha256"]}}
    ]
    assert definition(statement)["internalParameters"]["adapter"] == record
    file = write_params(tmp_path / "params.yaml", all={"stages": STAGES}, adapter={"source": "data/adapter"})
    assert verify.changed_inputs(statement, file) == []
    weights = tmp_path / "data" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert verify.changed_inputs(statement, file) == ["data/adapter: changed since the package was made; build again"]


@pytest.mark.parametrize("start", ["", "./", ".//", "own/../"])
def test_inputs_are_the_same_however_their_names_are_written(tmp_path, monkeypatch, start):
    """From params.yaml to the provenance and back: no name is left over on one side, and a change is seen."""
    monkeypatch.chdir(tmp_path)
    for name in ("slmake", "scripts", "envs", "rules", "containers", "Snakefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "own").mkdir()
    (tmp_path / "LICENSE").touch()
    (tmp_path / "own" / "rows.json").write_text(json.dumps(make_rows(8)))
    (tmp_path / "own" / "mine.py").write_text("def polite(prompt, expected, answer):\n    return 1\n")
    file = write_params(
        tmp_path / "params.yaml",
        prepare={"source": f"{start}own/rows.json"},
        evaluate={"metrics": [f"{start}own/mine.py:polite"]},
    )
    everything = params.load(file)
    plan = Plan(everything)
    rows = fetch(plan.sources[0], "data", tmp_path / "downloads", None).record
    recorded = {"base": {"source": "x"}, "adapter": None, "dataset": {"source": {"train": rows}}}
    statement = provenance({}, [*map(Path, plan.materials())], contents.sections(everything), recorded)
    assert verify.changed_inputs(statement, file) == []
    (tmp_path / "own" / "mine.py").write_text("")
    assert [
        line.endswith("own/mine.py: changed since the package was made; build again")
        for line in verify.changed_inputs(statement, file)
    ] == [True]


def test_a_package_of_an_adapter_of_ones_own_names_none(packed):
    named = definition(json.loads((packed / "provenance.intoto.json").read_text(encoding="utf-8")))
    assert "adapter" not in named["internalParameters"]
    assert named["internalParameters"]["providers"] == {"fp32": {"exported_for": "cpu", "scored_on": "cpu"}}


def test_a_package_names_its_fetched_adapter(parts, tmp_path):
    report = {"source": "hf:org/adapter@1234", "sha256": "a" * 64, "size_bytes": 7}
    (tmp_path / "adapter.json").write_text(json.dumps(report), encoding="utf-8")
    folder = pack(parts, tmp_path / "run", options=["--adapter", tmp_path / "adapter.json"])
    named = definition(json.loads((folder / "provenance.intoto.json").read_text(encoding="utf-8")))
    assert {"name": "hf:org/adapter@1234", "digest": {"sha256": "a" * 64}} in named["resolvedDependencies"]
    assert named["internalParameters"]["adapter"] == report
    card = (folder / "README.md").read_bytes()
    assert b"- Adapter, made elsewhere: `hf:org/adapter@1234`." in card
    subjects = json.loads((folder / "provenance.intoto.json").read_text(encoding="utf-8"))["subject"]
    assert {"name": "README.md", "digest": {"sha256": hashlib.sha256(card).hexdigest()}} in subjects


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"int4": SCORES}, {"int4": {"exported_for": "cuda", "scored_on": "cuda"}}),
        (
            {"int4": SCORES, "providers": {"int4": {"exported_for": "cuda", "scored_on": "cpu"}}},
            {"int4": {"exported_for": "cuda", "scored_on": "cpu"}},
        ),
        ({"merged": SCORES}, {}),
    ],
    ids=["on its own", "on another", "not scored"],
)
def test_the_provider_that_figures_were_taken_on(metrics, expected):
    assert contents.providers({"precision": "int4", "execution_provider": "cuda"}, metrics) == expected
