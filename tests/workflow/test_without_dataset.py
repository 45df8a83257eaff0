"""A build without a section prepare: [quantize] alone, then measured, gated, packaged and reported."""

import json

import yaml
from project import change, new_project, planned, run, snakemake

KL, RATIO = {"metric": "kl_mean", "maximum": 1.0}, {"metric": "perplexity", "maximum_ratio": 1.5, "against": "base"}


def test_a_model_is_quantized_measured_and_packaged_without_a_dataset(base, tmp_path):
    project = new_project(tmp_path / "project", base)
    content = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    del content["prepare"]
    content["all"]["stages"] = ["quantize"]
    content["gates"] = {"checks": [KL, RATIO]}
    (project / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (project / "data" / "dataset.json").unlink()
    done = snakemake(project)
    assert done.returncode == 0, done.stdout
    assert (project / "build" / "onnx-int4" / "model.onnx").is_file()
    assert "no dataset; perplexity of 20 fixed texts: base " in done.stdout
    assert "int4 against base, at 500 places of the texts: mean KL " in done.stdout
    asked = run(project, "python", "-m", "tools.ask", "Name three rivers.", "--max-new-tokens", "4")
    assert asked.returncode == 0, asked.stdout

    change(project, "all", stages=["rehearse", "quantize", "evaluate", "gates", "package", "report"])
    assert planned(project) == {"rehearse", "gates", "package", "report"}
    done = snakemake(project)
    assert done.returncode == 0, done.stdout
    assert planned(project) == set()
    judged = json.loads((project / "results" / "gates.json").read_text())["gates"]
    assert [gate["metric"] for gate in judged] == ["kl_mean", "perplexity", "tokenizer_differences"]
    assert "export" in json.loads((project / "results" / "estimate.json").read_text())["checks"]
    card = (project / "build" / "package" / "README.md").read_text()
    assert "- No dataset: the model was not scored on a task." in card
    assert "on 20 fixed texts" in card
    assert "| accuracy" not in card
    assert "No dataset: 20 fixed texts" in (project / "build" / "report" / "overview.html").read_text()
    assert "Continuations" in (project / "build" / "report" / "wrong_answers.html").read_text()
    bill = json.loads((project / "build" / "package" / "bom.cdx.json").read_text())
    assert not [part for part in bill["components"] if part["type"] == "data"]
    verified = run(project, "python", "-m", "tools.verify")
    assert verified.returncode == 0, verified.stdout

    done = run(project, "python", "-m", "slmake.platforms.dvc_yaml")
    assert done.returncode == 0, done.stdout
    document = yaml.safe_load((project / "dvc.yaml").read_text())
    assert document["stages"]["prepare"]["params"] == ["all.container"]
    assert "plots" not in document  # nothing is right or wrong
