"""Model card: training, rows and gates. Bill of materials: the models that were read."""

import json

import pytest
from package_script import GATE, SLOW, pack
from tiny import ROOT

from slmake import params
from slmake.errors import UserError
from slmake.packaging import card, contents, sbom
from slmake.reporting import pages

REPORTED = {"truncated": 0, "duplicates": {"removed_from_train": 0}}
CURVE = "step,epoch,loss,learning_rate,processes,threads\n2,0.25,2.1,0.0002,1,4\n3,0.375,2.0,0.0001,1,4\n"


@pytest.mark.parametrize(
    ("settings", "shown", "hidden"),
    [
        ({"num_train_epochs": 6.0}, "| `num_train_epochs` | `6.0` |", "max_steps"),
        ({"max_steps": 3}, "| `max_steps` | `3` |", "num_train_epochs"),
        ({"keep_best": True}, "0.375 epochs. The adapter with the best loss on the eval rows was kept.", "max_steps"),
    ],
    ids=["epochs", "steps", "best"],
)
def test_the_card_says_how_far_the_training_went(tmp_path, settings, shown, hidden):
    file = tmp_path / "train_loss.csv"
    file.write_text(CURVE, encoding="utf-8")
    section = params.Finetune(**settings).model_dump(mode="json")
    text = "\n".join(card.training_part(section, contents.trained(file)))
    assert "It was trained for 3 steps, 0.375 epochs." in text
    assert shown in text
    assert hidden not in text
    assert text.count("was kept") == bool(settings.get("keep_best"))


def test_the_provenance_says_how_many_threads_trained(parts, packed, tmp_path):
    def recorded(folder) -> dict:
        statement = json.loads((folder / "provenance.intoto.json").read_text(encoding="utf-8"))
        return statement["predicate"]["buildDefinition"]["internalParameters"]

    (tmp_path / "train_loss.csv").write_text(CURVE, encoding="utf-8")
    trained = recorded(pack(parts, tmp_path / "run", ["--losses", tmp_path / "train_loss.csv"]))
    assert trained["training"] == {"processes": 1, "threads": 4}
    assert "training" not in recorded(packed)  # nothing was trained here


@pytest.mark.parametrize("curve", ["", "step,epoch\n", "step,epoch\n3,many\n"], ids=["empty", "no line", "no number"])
def test_a_damaged_loss_curve_is_refused(tmp_path, curve):
    file = tmp_path / "train_loss.csv"
    file.write_text(curve, encoding="utf-8")
    with pytest.raises(UserError, match="Remove it and run snakemake"):
        contents.trained(file)


def facts_of(answers: int, limit: int | None) -> dict:
    """What a build knows that scored the test split's answers, of 24 rows, up to a limit."""
    dataset = {
        "rows": {"read": 72, "train": 40, "eval": 8, "test": 24},
        "sequences": {"train": 40, "eval": 8, "test": answers},
        "source": {"train": {"source": "data/rows.json"}},
    }
    metrics = {"test_rows": min(limit or answers, answers), "int4": {"accuracy": 0.5, "rouge_l": 0.5}}
    facts = {"base": {"source": "data/base"}, "adapter": None, "dataset": dataset, "metrics": metrics, "limit": limit}
    return facts | {"quantize": {}, "last": "int4"}


@pytest.mark.parametrize(
    ("limit", "rows", "scores"),
    [
        (None, "24 held out for the scores below.", "On the 24 held-out rows."),
        (100, "24 held out for the scores below.", "On the 24 held-out rows."),
        (24, "24 held out for the scores below.", "On the 24 held-out rows."),
        (8, "24 held out (the scores below are of the first 8).", "On the first 8 held-out rows."),
    ],
)
def test_the_card_says_which_rows_were_scored(limit, rows, scores):
    facts = facts_of(24, limit)
    assert f"40 to train on, 8 for the loss during training, {rows}" in "\n".join(card.ingredients(facts, True))
    assert card.scored_on(facts).startswith(scores)


@pytest.mark.parametrize(
    ("limit", "rows", "scores"),
    [
        (None, "24 held out for the scores below.", "On the 60 answers of the held-out rows."),
        (
            24,
            "24 held out (the scores below are of the first 24 of their 60 answers).",
            "On the first 24 answers of the held-out rows.",
        ),
    ],
)
def test_of_conversations_answers_are_counted(limit, rows, scores):
    facts = facts_of(60, limit)
    assert rows in "\n".join(card.ingredients(facts, True))
    assert card.scored_on(facts).startswith(scores)
    shown = pages._rows_read(facts["dataset"] | REPORTED, facts["metrics"]["test_rows"], True)
    assert ("of whose 60 answers the first 24 are scored" in shown) == bool(limit)
    assert "40 to train on" in shown


@pytest.mark.parametrize("tuned", [True, False])
def test_nothing_is_said_of_a_training_that_was_not(tuned):
    form = {"labels": None, "fields": ["phrase"], "prompt": "{phrase}"}
    text = "\n".join([*card.usage(form, tuned), *card.ingredients(facts_of(24, None), tuned)])
    assert ("trained on is in prompt.json" in text) == ("40 to train on" in text) == tuned
    assert ("scored with is in prompt.json" in text) == ("on which nothing was trained here" in text) == (not tuned)
    shown = pages._rows_read(facts_of(24, None)["dataset"] | REPORTED, 24, tuned)
    assert ("40 to train on" in shown) == tuned
    assert ("nothing was trained" in shown) == (not tuned)


@pytest.mark.parametrize(
    ("limit", "rows"), [(None, "test split"), (10, "first 10 of the 24 answers of the test split")]
)
def test_head_and_bill_say_that_a_part_was_scored(limit, rows):
    facts = facts_of(24, limit) | {"task": "text-generation", "architecture": "llama"}
    head = card.metadata(params.Package(), facts, None)
    assert (
        head["model-index"][0]["results"][0]["dataset"]["type"] == "part of the " * bool(limit) + "held-out test split"
    )
    bill = sbom.bill_of_materials("x", "MIT", "use", facts, {}, [ROOT / "envs" / "cpu.lock"])
    analysis = bill["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]
    assert {metric["slice"] for metric in analysis["performanceMetrics"]} == {rows}


def test_the_bill_names_torch_which_stands_beside_the_lock(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.write_text("numpy==0.1\n", encoding="utf-8")
    monkeypatch.setattr(sbom, "installed", lambda package: "2.0+cpu")
    (torch,) = [part for part in sbom.libraries([lock]) if part["name"] == "torch"]
    assert (torch["version"], torch["purl"]) == ("2.0+cpu", "pkg:pypi/torch@2.0%2Bcpu")
    assert {"name": "slmake:locked", "value": "no"} in torch["properties"]
    monkeypatch.setattr(sbom, "installed", lambda package: None)
    assert [part["name"] for part in sbom.libraries([lock])] == ["numpy"]


def test_the_bill_is_of_the_environment_that_is_here(monkeypatch):
    """Also where a GPU trains and scores what is exported for CPUs; of what no environment here has, nothing is said."""
    cpu, cuda, added = (ROOT / "envs" / f"{name}.lock" for name in ("cpu", "cuda", "lm-eval"))
    pinned = {lock: sbom.locked(lock)[0] for lock in (cpu, cuda, added)}
    for here, absent in ((cpu, cuda), (cuda, cpu)):
        there = {name: min(versions) for name, versions in (pinned[here] | pinned[added]).items()}
        monkeypatch.setattr(sbom, "installed", there.get)
        listed = {part["name"]: part["version"] for part in sbom.libraries([cpu, cuda])}
        assert listed == {name: there[name] for name in pinned[here]}
        assert not listed.keys() & (pinned[absent].keys() - pinned[here].keys())
        assert sbom.libraries([cpu, cuda, added])[-1]["name"] in pinned[added].keys() - pinned[here].keys()


@pytest.mark.parametrize(
    ("gates", "listed", "text"),
    [
        ([], False, "No gate was set for this model."),
        ([GATE], True, "Gates that this model passed:"),
        ([SLOW], False, "It passed gates on time. They are not listed"),
        ([GATE, SLOW], True, "It also passed gates on time. They are not listed"),
    ],
    ids=["none", "score", "time", "both"],
)
def test_the_card_says_that_there_are_gates_on_time(gates, listed, text):
    lines = "\n".join(card.gates_part(gates))
    assert text in lines
    assert ("min_accuracy" in lines) == listed
    assert ("on time" in lines) == (SLOW in gates)
    assert "latency" not in lines


def test_the_bill_of_materials_names_an_adapter_made_elsewhere(parts, packed, tmp_path):
    def models(folder) -> tuple[list[tuple], list[str]]:
        """The models that were read, each with its name and digest, and what the package depends on."""
        bom = json.loads((folder / "bom.cdx.json").read_text(encoding="utf-8"))
        read = [part for part in bom["components"] if part["type"] == "machine-learning-model"]
        named = [(part["bom-ref"], part["name"], part.get("hashes", [{}])[0].get("content")) for part in read]
        return named, bom["dependencies"][0]["dependsOn"]

    base = ("base-model", "hf:org/name@1234", None)
    named, needed = models(packed)
    assert (named, "adapter" in needed) == ([base], False)
    record = tmp_path / "adapter.json"
    record.write_text(json.dumps({"source": "data/adapter", "sha256": "a" * 64}), encoding="utf-8")
    named, needed = models(pack(parts, tmp_path / "run", ["--adapter", record]))
    assert named == [base, ("adapter", "data/adapter", "a" * 64)]
    assert {"base-model", "adapter"} <= set(needed)
    assert sbom.made_from({"base": {"source": "x"}, "adapter": None})[0]["name"] == "x"
