"""The project's own params.yaml, and the pages generated from the models."""

import json

import jsonschema
import pytest
import yaml
from tiny import ROOT

from slmake import params
from slmake.params import docs
from slmake.params.errors import models_in

SECTIONS = [
    *(
        "all",
        "fetch_model",
        "prepare",
        "rehearse",
        "adapter",
        "finetune",
        "merge",
        "quantize",
        "evaluate",
        "gates",
        "package",
        "report",
    ),
    "publish",
]


# The project's own file


def test_the_projects_file_is_valid():
    assert params.load(ROOT / "params.yaml").model_fields_set == set(SECTIONS)


def test_the_projects_file_hides_no_default():
    """Every field of every section is written out, so that the file alone tells what was built."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert set(content) == set(params.Params.model_fields) == set(SECTIONS)
    for name, field in params.Params.model_fields.items():
        assert set(content[name]) == set(models_in(field.annotation)[0].model_fields), name
    source = content["prepare"]["source"]
    assert isinstance(source, str) or set(source) == set(params.Files.model_fields)


# Generated pages


def test_generated_pages_are_up_to_date(tmp_path):
    """`make docs` would change nothing."""
    docs.write_docs(tmp_path)
    for name in ("params.md", "params.schema.json"):
        assert (ROOT / "docs" / name).read_bytes() == (tmp_path / name).read_bytes(), f"{name}: run `make docs`"
    assert (tmp_path / "params.md").read_text(encoding="utf-8") == docs.reference()


def test_reference_has_every_field():
    """A heading per section and a row per field, with default, bounds and meaning."""
    page = docs.reference()
    assert [line[4:-1] for line in page.splitlines() if line.startswith("## ")] == SECTIONS
    assert "| `lora_r` | `16` | integer ≥ 1 ≤ 1024 | Rank of the update. |" in page
    assert "| `source` | required | string or `Files` |" in page
    assert "| `learning_rate` | `0.0002` | number > 0 ≤ 1 |" in page
    for field in params.Params.model_fields.values():
        for name, info in models_in(field.annotation)[0].model_fields.items():
            assert f"| `{name}` | " in page
            assert info.description, name
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {5}


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads((ROOT / "docs" / "params.schema.json").read_text(encoding="utf-8"))


def test_schema_allows_no_other_names(schema):
    objects = [schema, *schema["$defs"].values()]
    assert len(objects) == 20
    for described in objects:
        assert described["type"] == "object"
        assert described["additionalProperties"] is False


def test_schema_accepts_the_projects_file(schema):
    """An editor that uses the schema underlines nothing in params.yaml."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(content)] == []


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("finetune", "lora_r", 0),
        ("finetune", "lora_r", "16"),
        ("finetune", "lora_rr", 8),
        ("quantize", "precision", "int5"),
        ("prepare", "test_fraction", 0.6),
        ("fetch_model", "trust_remote_code", True),
        ("fetch_model", "sha256", "abc"),
    ],
)
def test_schema_refuses_what_load_refuses(schema, write, section, field, value):
    content = yaml.safe_load(write().read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(content)
    content.setdefault(section, {})[field] = value
    assert not validator.is_valid(content)
