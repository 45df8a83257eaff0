"""Data and base models that lie on Azure: what is mounted, what a step reads of it, and what records and `verify` say of it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_azureml import loaded, small_plan
from tiny import ROOT, make_rows, write_params

from scripts import fetch_model
from slmake import params
from slmake.azureml import pipeline, service, step
from slmake.errors import UserError
from slmake.packaging import contents
from slmake.packaging.provenance import provenance
from slmake.plan import Plan
from slmake.sources.fetching import fetch, fetch_rows
from slmake.sources.mounted import ORIGINS
from slmake.sources.schemes import parse
from tools import verify

MODEL = "azureml://registries/azureml/models/Phi-3/versions/7"
ROWS = "azureml://datastores/blobs/paths/a/rows.jsonl"


def given(**changes: object) -> params.Params:
    """The project's parameters with `section={field: value}` replaced."""
    sections = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, fields in changes.items():
        sections[section].update(fields)
    return params.Params.model_validate(sections)


def test_data_and_model_on_azure_take_the_place_of_those_in_params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    everything = params.load(ROOT / "params.yaml")
    written = parse(everything.fetch_model.source).full
    chosen = loaded(tmp_path, data="azureml:phrases:3", model=MODEL, model_type="mlflow_model")
    assert pipeline._data(everything, chosen) == (
        {"data": ("data/dataset.json", "azureml:phrases:3", "uri_file")},
        {"data/dataset.json": {"text": "azureml:phrases:3", "path": "data/dataset.json", "sha256": None}},
    )
    # The sum in params.yaml is that of the model there.
    assert pipeline._model(everything, chosen) == (
        ("data/model", MODEL, "mlflow_model"),
        {written: {"text": MODEL, "path": "data/model", "sha256": None}},
    )
    assert pipeline._model(everything, loaded(tmp_path, model="hf:org/name@v1")) == (
        None,
        {written: {"text": "hf:org/name@v1", "path": None, "sha256": None}},
    )
    with pytest.raises(UserError, match=r"data names train, eval, prepare\.source in params\.yaml names train"):
        pipeline._data(everything, loaded(tmp_path, data={"train": "azureml:a:1", "eval": "azureml:b:1"}))


@pytest.mark.parametrize("settings", [{}, {"model": MODEL}])
def test_a_model_that_params_names_is_mounted_as_itself(tmp_path, settings):
    total = "c" * 64
    everything = given(fetch_model={"source": f"{MODEL}#sha256={total}", "sha256": None})
    mount, origins = pipeline._model(everything, loaded(tmp_path, **settings))
    assert mount == ("data/model", MODEL, "custom_model")
    assert origins == {MODEL: {"text": MODEL, "path": "data/model", "sha256": total}}


def test_a_mounted_file_keeps_its_sum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    total = "b" * 64
    everything = given(prepare={"source": f"{ROWS}#sha256={total}"})
    assert pipeline._data(everything, loaded(tmp_path)) == (
        {"data": ("data/rows.jsonl", ROWS, "uri_file")},
        {ROWS: {"text": ROWS, "path": "data/rows.jsonl", "sha256": total}},
    )


def test_files_of_one_name_are_mounted_apart(tmp_path, monkeypatch):
    """Of two files in one place the rule would read one twice."""
    monkeypatch.chdir(tmp_path)
    uris = {split: f"azureml://datastores/blobs/paths/{split}/rows.json" for split in ("train", "eval", "test")}
    everything = given(prepare={"source": {split: f"{uri}#etag=0x1" for split, uri in uris.items()}})
    mounts, origins = pipeline._data(everything, loaded(tmp_path))
    assert [mount.uri for mount in mounts.values()] == list(uris.values())
    assert len({mount.local for mount in mounts.values()}) == 3
    assert {uri: origin["path"] for uri, origin in origins.items()} == {
        uri: mounts[f"data_{split}"].local for split, uri in uris.items()
    }


def test_one_text_cannot_stand_for_two_files(tmp_path):
    """What is mounted is found by the source's text."""
    everything = given(prepare={"source": {"train": "data/dataset.json", "test": "data/dataset.json"}})
    with pytest.raises(UserError, match=r"data/dataset\.json stands for several splits"):
        pipeline._data(everything, loaded(tmp_path, data={"train": "azureml:a:1", "test": "azureml:b:1"}))
    mounts, origins = pipeline._data(everything, loaded(tmp_path, data={"train": "azureml:a:1", "test": "azureml:a:1"}))
    assert [mount.uri for mount in mounts.values()] == ["azureml:a:1"] * 2
    assert origins["data/dataset.json"]["text"] == "azureml:a:1"


@pytest.mark.parametrize(
    ("chosen", "data"), [({"split": "train[:9]"}, ROWS), ({"config": "small"}, ROWS), ({}, "azureml:phrases:3")]
)
def test_one_file_cannot_stand_for_a_dataset_of_which_rows_are_chosen(tmp_path, chosen, data):
    """Nor can an asset, of which only the name in params.yaml says how its file is read."""
    everything = given(prepare={"source": "hf:org/rows@v1", **chosen})
    with pytest.raises(UserError, match="hf:org/rows@v1 names several files"):
        pipeline._data(everything, loaded(tmp_path, data=data))
    mounts, _ = pipeline._data(given(prepare={"source": "hf:org/rows@v1"}), loaded(tmp_path, data=ROWS))
    assert mounts == {"data": ("data/rows.jsonl", ROWS, "uri_file")}


@pytest.mark.parametrize("source", ["data/parts", "data/parts/*.jsonl"])
def test_every_file_of_a_folder_or_pattern_is_mounted(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "parts").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / "data" / "parts" / name).write_text("{}")
    everything = given(prepare={"source": source})
    files = [f"data/parts/{name}.jsonl" for name in "ab"]
    assert pipeline._data(everything, loaded(tmp_path)) == (
        {f"data_{number}": (file, file, "uri_file") for number, file in enumerate(files)},
        {},  # the step finds them there
    )
    with pytest.raises(UserError, match=r"names several files, and data in azureml/settings\.yaml one"):
        pipeline._data(everything, loaded(tmp_path, data="azureml:phrases:3"))
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(UserError, match="lies outside the project's folder"):
        pipeline._data(given(prepare={"source": source.replace("data", "../data")}), loaded(tmp_path))


def test_a_step_is_sent_params_as_written_and_what_lies_elsewhere_beside_it(tmp_path, monkeypatch):
    """What Azure holds, or what the settings replace, is not sent as code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "base").mkdir(parents=True)
    (tmp_path / "data" / "base" / "model.safetensors").write_text("large")
    (tmp_path / "Snakefile").touch()
    plan = small_plan()
    plan.rules["fetch_model"]["input"].append("data/base")
    origins = {"data/base": {"text": MODEL, "path": "data/model", "sha256": None}}
    pipeline.write_code(plan._replace(origins=origins))
    for rule in plan.rules:
        folder = pipeline.CODE / rule
        sent = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
        assert {name: sent[name] for name in ("fetch_model", "prepare")} == {
            name: plan.sections[name] for name in ("fetch_model", "prepare")
        }
        assert json.loads((folder / step.ORIGINS_FILE).read_text(encoding="utf-8")) == origins
        assert not (folder / "data").exists()
    before = step.sums(pipeline.CODE / "finetune")
    plan.sections["gates"]["min_accuracy"] = 0.99
    pipeline.write_code(plan._replace(origins=origins))
    assert step.sums(pipeline.CODE / "finetune") == before  # Azure ML reuses what it trained
    pipeline.write_code(plan)
    assert (pipeline.CODE / "fetch_model" / "data" / "base" / "model.safetensors").exists()
    assert not (pipeline.CODE / "fetch_model" / step.ORIGINS_FILE).exists()


def test_a_step_tells_its_rule_what_is_mounted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nprintf %s "${ORIGINS}" > told\n')
    program.chmod(0o755)
    monkeypatch.setattr(step.sys, "executable", str(program))
    step.run("prepare", ["build/dataset"])
    assert Path("told").read_text() == ""
    Path("azureml").mkdir()
    step.ORIGINS_FILE.write_text('{"a": "b"}')
    step.run("prepare", ["build/dataset"])
    assert Path("told").read_text() == '{"a": "b"}'


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Tells what is mounted, as a step does, in a folder with a model's file and a dataset's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model").mkdir()
    (tmp_path / "data" / "model" / "config.json").write_text("{}")
    (tmp_path / "data" / "rows.jsonl").write_text("{}\n")

    def tell(**origins: tuple) -> None:
        texts = {
            source: {"text": text, "path": path, "sha256": total} for source, (text, path, total) in origins.items()
        }
        monkeypatch.setenv(ORIGINS, json.dumps(texts))

    return tell


def test_a_mounted_source_is_recorded_as_itself(told, tmp_path):
    """With the version that the registry's own download records; an ETag, which a mounted file has not, is not claimed."""
    total = hashlib.sha256(b"{}\n").hexdigest()
    told(**{MODEL: (MODEL, "data/model", None), ROWS: (ROWS, "data/rows.jsonl", None)})
    model = fetch(parse(MODEL), "model", tmp_path / "downloads", None)
    assert model.path == Path("data/model")
    assert {name: model.record[name] for name in ("source", "pin")} == {"source": MODEL, "pin": {"version": "7"}}
    [(path, name)], record = fetch_rows(parse(f"{ROWS}#etag=0x1"), tmp_path / "downloads", None)
    assert (path, name) == (Path("data/rows.jsonl"), ROWS)
    assert record == {"source": ROWS, "pin": {}, "sha256": total, "size_bytes": 3}


def test_a_sum_of_a_mounted_file_is_checked(told, tmp_path):
    total = hashlib.sha256(b"{}\n").hexdigest()
    told(**{ROWS: (ROWS, "data/rows.jsonl", total)})
    _, record = fetch_rows(parse(f"{ROWS}#sha256={total}"), tmp_path / "downloads", None)
    assert record["pin"] == {"sha256": total}
    told(**{ROWS: (ROWS, "data/rows.jsonl", "b" * 64)})
    with pytest.raises(UserError, match=rf"rows\.jsonl is not what was asked for: sha256 {total}, expected bbbb"):
        fetch_rows(parse(f"{ROWS}#sha256={'b' * 64}"), tmp_path / "downloads", None)


def test_what_takes_a_source_s_place_is_recorded_and_says_whose(told, tmp_path):
    told(
        **{
            "data/rows.jsonl": ("azureml:phrases:3", "data/rows.jsonl", None),
            "hf:org/old@v1": ("hf:org/new@v2", None, None),
        }
    )
    everything = given(prepare={"source": "./data/rows.jsonl"}, fetch_model={"source": "hf:org/old@v1"})
    assert Plan(everything).data == []  # no file of the project
    [(path, name)], record = fetch_rows(parse("./data/rows.jsonl"), tmp_path / "downloads", None)
    assert (path, name) == (Path("data/rows.jsonl"), "data/rows.jsonl")  # its ending says how it is read
    expected = {"source": "azureml:phrases:3", "pin": {"version": "3"}, "in_place_of": "data/rows.jsonl"}
    assert {name: record[name] for name in expected} == expected
    model = parse(everything.fetch_model.source)
    assert (model.kind, model.full, model.in_place_of) == ("hf", "hf:org/new@v2", "hf:org/old@v1")
    assert parse("hf:org/other@v1").in_place_of == ""


def test_a_model_in_place_of_another_has_not_its_sum(told, tmp_path, base, capsys):
    """`fetch_model.sha256` is that of the model in params.yaml; messages name the one that was read."""
    (tmp_path / "data" / "model" / "config.json").unlink()
    shutil.copytree(base, tmp_path / "data" / "model", dirs_exist_ok=True)
    file = write_params(tmp_path / "params.yaml", fetch_model={"source": "data/old", "sha256": "b" * 64})

    def fetched() -> dict:
        fetch_model.main(["--params", str(file), "--output", "build/base", "--report", "results/base.json"])
        return json.loads(Path("results/base.json").read_text(encoding="utf-8"))

    told(**{"data/old": ("azureml:phi:3", "data/model", None)})
    record = fetched()
    assert (record["source"], record["in_place_of"]) == ("azureml:phi:3", "data/old")
    assert "azureml:phi:3 is in build/base" in capsys.readouterr().err
    shutil.rmtree("build")
    Path("results/base.json").unlink()
    told(**{"data/old": ("data/old", "data/model", None)})
    with pytest.raises(SystemExit):
        fetched()
    assert "expected bbbb" in capsys.readouterr().err


def test_a_run_s_tags_name_the_model_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    everything = given(fetch_model={"source": "hf:org/old@v1", "sha256": None})
    plan = small_plan()._replace(model=None)
    plan.sections["fetch_model"]["source"] = everything.fetch_model.source
    assert service.tags(everything, plan)["base_model"] == "hf:org/old@v1"
    _, origins = pipeline._model(everything, loaded(tmp_path, model="hf:org/new@v2"))
    assert service.tags(everything, plan._replace(origins=origins))["base_model"] == "hf:org/new@v2"


def test_verify_knows_what_azure_read_in_place_of_the_project_s_data(tmp_path, monkeypatch):
    """Of an untouched project it says nothing; of changed settings, and of changed parameters, what changed."""
    monkeypatch.chdir(tmp_path)
    for name in ("slmake", "scripts", "envs", "rules", "containers", "Snakefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(make_rows(8)))
    (tmp_path / "LICENSE").touch()
    file = write_params(tmp_path / "params.yaml", prepare={"source": "data/dataset.json"})
    everything = params.load(file)
    origins = {"data/dataset.json": {"text": "azureml:phrases:3", "path": "data/dataset.json", "sha256": None}}
    with monkeypatch.context() as step_s:
        step_s.setenv(ORIGINS, json.dumps(origins))
        plan = Plan(everything)
        rows = fetch(plan.sources[0], "dataset", tmp_path / "downloads", None).record
        recorded = {"base": {"source": "x"}, "adapter": None, "dataset": {"source": {"train": rows}}}
        statement = provenance({}, [*map(Path, plan.materials())], contents.sections(everything), recorded)
    (tmp_path / "data" / "dataset.json").write_text("what is here was not read")
    loaded(tmp_path, data="azureml:phrases:3")
    assert verify.changed_inputs(statement, file, tmp_path / "settings.yaml") == []
    loaded(tmp_path, data="azureml:phrases:4", model=MODEL)
    for settings in ("settings.yaml", "none.yaml"):
        assert verify.changed_inputs(statement, file, Path(settings)) == [
            f"azureml:phrases:3: read on Azure ML in place of data/dataset.json, and {settings} does not name it now; build again"
        ]
    loaded(tmp_path, data="azureml:phrases:3")
    write_params(file, prepare={"source": "data/dataset.json", "seed": 43})
    assert verify.changed_inputs(statement, file, tmp_path / "settings.yaml") == [
        "params.yaml#prepare: changed since the package was made; build again"
    ]
