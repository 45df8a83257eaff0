"""Schemas are complete in themselves: no file and no address is read for them."""

import json
import urllib.request

import pytest

from slmake import json_schemas
from slmake.errors import UserError

X = {"x": {"type": "integer"}}
DRAFT_7 = "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize(
    ("schema", "good"),
    [
        ({}, True),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": X}, True),
        ({"properties": {"b": {"$ref": "#/$defs/x"}}, "$defs": X}, False),
        ({"$schema": DRAFT_7, "properties": {"a": {"$ref": "#/definitions/x"}}, "definitions": X}, True),
        (
            {"$id": "https://e.test/s", "$defs": {"x": {"$id": "x", **X["x"]}}, "properties": {"b": {"$ref": "x"}}},
            False,
        ),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, True),
        ({"properties": {"c": {"$ref": "#"}}, "required": ["a"]}, True),
        ({"const": {"$ref": "file:///etc/passwd"}}, False),
        ({"properties": {"$ref": {"type": "string"}}}, True),
        ({"$schema": "https://nobody.test/s", "type": "string"}, False),
    ],
)
def test_a_schema_judges(schema, good):
    assert json_schemas.validator(schema).is_valid({"a": 1, "b": "one"}) == good


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ([], "an object is expected"),
        (True, "an object is expected"),
        ({"$schema": 5}, r"\$schema is no text"),
        ({"type": 3}, "3 is not valid under any of the given schemas"),
        ({"pattern": "("}, r"'\(' is not a 'regex'"),
        ({"$ref": "other.json"}, "'other.json' is not in the schema, and no other file is read. Write it under .defs"),
        ({"properties": {"a": {"items": {"$ref": "file:///etc/passwd"}}}}, "'file:///etc/passwd' is not in the schema"),
        ({"$defs": {"unused": {"$ref": "https://h.test/x.json"}}}, "'https://h.test/x.json' is not in the schema"),
        ({"allOf": [{"$dynamicRef": "x.json#a"}]}, "'x.json#a' is not in the schema"),
        ({"$ref": "#/$defs/x"}, "'#/.defs/x' is not in the schema"),
        ({"$ref": "#/title/x", "title": "t"}, "'#/title/x' is not in the schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}, "leads back to itself without end"),
    ],
)
def test_what_is_no_schema_or_refers_elsewhere_is_refused(tmp_path, monkeypatch, schema, reason):
    def refuse(*arguments, **options) -> None:
        raise AssertionError(f"something was opened: {arguments}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=reason):
        json_schemas.validator(schema)
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema), encoding="utf-8")
    with pytest.raises(UserError, match=f"evaluate.metrics: {file}: not a JSON Schema: .*{reason}"):
        json_schemas.read(file, "evaluate.metrics")


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "not JSON: "), ("[" * 99999, "not JSON: "), (None, "no such file")]
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content, reason):
    file = tmp_path / "schema.json"
    if content:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"package.constrain: {file}: {reason}"):
        json_schemas.read(file, "package.constrain")
