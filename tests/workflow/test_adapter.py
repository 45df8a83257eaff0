"""An adapter that another trainer made goes through the pipeline like one of ours."""

import json

import pytest
import torch
from merge_script import make_adapter
from project import change, new_project, planned, snakemake
from safetensors.torch import load_file

STAGES = ["merge", "quantize", "evaluate", "gates", "package", "report"]


@pytest.fixture
def project(base, tmp_path):
    """A tiny project with an adapter in data/adapter, and nothing built."""
    folder = new_project(tmp_path / "project", base)
    make_adapter(base, folder / "data" / "adapter", use_rslora=True)
    change(folder, "all", stages=STAGES)
    change(folder, "adapter", source="data/adapter")
    return folder


def test_it_is_merged_exported_scored_and_packaged(project, base):
    done = snakemake(project)
    assert done.returncode == 0, done.stdout
    metrics = json.loads((project / "results" / "metrics.json").read_text())
    assert {"base", "adapter", "merged", "int4"} <= metrics.keys()
    assert metrics["parity"]["merged_vs_adapter"]["top1_agreement"] == 1.0
    before = load_file(base / "model.safetensors")
    merged = load_file(project / "build" / "merged" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    pair = load_file(project / "data" / "adapter" / "adapter_model.safetensors")
    b, a = (pair[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "BA")
    assert torch.equal(merged[name], before[name] + (b @ a) * (8 / 4**0.5))  # alpha 8, rank 4, rank-stabilized
    assert "- Adapter, made elsewhere: `data/adapter`." in (project / "build" / "package" / "README.md").read_text()
    assert "data/adapter" in (project / "build" / "report" / "overview.html").read_text()
    assert json.loads((project / "results" / "adapter.json").read_text())["source"] == "data/adapter"
    statement = json.loads((project / "build" / "package" / "provenance.intoto.json").read_text())
    assert "data/adapter" in {
        entry["name"] for entry in statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    # It is an input like the data: by content.
    assert planned(project) == set()
    make_adapter(project / "data" / "base", project / "data" / "adapter", std=0.2, use_rslora=True)
    assert {"adapter", "merge", "quantize"} <= planned(project)


def test_an_adapter_of_another_base_stops_before_the_merge(project):
    from tiny import make_model

    other = make_model(project / "other", hidden_size=32)
    make_adapter(other, project / "data" / "adapter")
    done = snakemake(project, "build/merged")
    assert done.returncode != 0
    assert "it belongs to another base model" in done.stdout
    assert "Error in rule adapter" in done.stdout
    assert not (project / "build" / "merged").exists()


@pytest.mark.parametrize(
    ("stages", "source", "message"),
    [
        (["merge"], None, "all.stages: merge needs finetune, or an adapter from elsewhere"),
        (["finetune", "merge"], "data/adapter", "adapter.source: finetune in all.stages makes the adapter itself"),
    ],
)
def test_where_an_adapter_comes_from_is_said_once(project, stages, source, message):
    change(project, "all", stages=stages)
    change(project, "adapter", source=source)
    done = snakemake(project, "-n")
    assert done.returncode != 0
    assert message in done.stdout
