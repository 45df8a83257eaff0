"""Schemas are complete in themselves: no file and no address is read for them."""

import functools
import json
import time
import urllib.request

import pytest

from slmake import json_schemas, patterns
from slmake.errors import UserError

X = {"x": {"type": "integer"}}
SLOW = "^(a|a)*$"
# Every definition asks twice for the next one: 2^30 steps.
DOUBLING = {"$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)} | {"a30": {}}}
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
        ({"patternProperties": {"^[ab]$": {}}, "additionalProperties": False}, True),
        ({"patternProperties": {"^a$": {}}, "additionalProperties": False}, False),
        ({"patternProperties": {"^a$": {}}, "additionalProperties": {"type": "string"}}, True),
        ({"patternProperties": {"^b$": {"type": "integer"}}}, False),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, False),
        ({"$schema": DRAFT_7, "patternProperties": {"^(a|b)$": {}}, "additionalProperties": False}, True),
        ({"properties": {"a": {}}, "unevaluatedProperties": False}, False),
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
        (
            DOUBLING | {"$ref": "#/$defs/a0"},
            "a value needs more than 50,000 steps: its .ref multiply. Write it shorter",
        ),
        (functools.reduce(lambda part, _: {"not": part}, range(400), {}), "nested too deeply"),
        ({"$schema": "http://json-schema.org/draft-03/schema#", "extends": {"type": "object"}}, "draft-03 is not read"),
        ({"patternProperties": {SLOW: {}}}, "takes longer than 1 s"),
        ({"pattern": "a{99999999999999}"}, "the repetition number is too large"),
        (
            {"patternProperties": {"a": {}}, "unevaluatedProperties": False},
            "unevaluatedProperties with patternProperties",
        ),
        ({"$ref": "#/x/a", "x": {"a": {"properties": 5}}}, "5 is not of type 'object'"),
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


NESTED = functools.reduce(lambda inner, _: [inner], range(300), [])
UNTELLABLE = {
    "infinite": ({"multipleOf": 0.01}, float("inf")),
    "nested": ({"items": {"$ref": "#"}}, NESTED),
    "without end": ({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, [1]),
    "without end, denied": ({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"not": {"$ref": "#/$defs/a"}}}}, [1]),
    "doubling": (DOUBLING | {"items": {"$ref": "#/$defs/a0"}}, [1]),
}


@pytest.mark.parametrize(("schema", "value"), UNTELLABLE.values(), ids=UNTELLABLE.keys())
@pytest.mark.parametrize("named", [{}, {"$schema": DRAFT_7}], ids=["", "draft 7"])
def test_a_value_that_cannot_be_judged_is_not_valid(schema, value, named):
    made, begin = json_schemas.validator(named | schema), time.process_time()
    assert made.is_valid(value) is False
    assert made.is_valid([]) is True
    assert time.process_time() - begin < 20


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": SLOW},
        {"patternProperties": {SLOW: {}}},
        {"patternProperties": {SLOW: {}}, "additionalProperties": False},
    ],
)
@pytest.mark.parametrize("named", [{}, {"$schema": DRAFT_7}], ids=["", "draft 7"])
def test_a_pattern_is_matched_within_a_time_limit_wherever_it_stands(monkeypatch, schema, named):
    """Of the root, too, to which a $ref leads back: jsonschema goes on there with what $schema names."""
    monkeypatch.setattr(patterns, "HARD", ())
    monkeypatch.setattr(json_schemas, "compiled", functools.cache(patterns.Pattern))
    made = json_schemas.validator(named | schema | {"items": {"$ref": "#"}})
    hard = "a" * 40 + "!"
    assert made.is_valid([hard if "pattern" in schema else {hard: 1}]) is False


@pytest.mark.parametrize(
    ("items", "good"),
    [
        ([1, True, "1", [1], [True], {"a": 1}, {"a": True}, None, 0, False], True),
        ([1, 1.0], False),
        ([{"a": [1], "b": 2}, {"b": 2.0, "a": [1.0]}], False),
        ([[1, 2], [2, 1]], True),
        ([[], {}], True),
        ([{"a": i} for i in range(20_000)], True),
    ],
)
def test_items_that_are_there_twice(items, good):
    assert json_schemas.validator({"uniqueItems": True}).is_valid(items) == good
    assert json_schemas.validator({"uniqueItems": False}).is_valid(items)


@pytest.mark.parametrize(
    ("step", "values", "others"),
    [
        (0.01, [19.99, 0.29, 0.07, 1.1, 5, -4.35, 0, 10**400, 1e300], [0.005, 19.999, 1e-300, float("inf")]),
        (0.1, [0.3, 0.7, 1e-1], [0.35, 0.30000000000000004]),
        (3, [9, 9.0, -3, 3 * 10**30], [10, 9.5, 1e22]),
        (1e-300, [1e300, 0.1, 1e-299], [1.5e-300]),
        (1e300, [2e300, 0], [1e299, 0.1]),
        (10**4000, [10**4001], [1, 1e308]),
    ],
)
def test_multiples_are_those_of_the_decimals_as_written(step, values, others):
    made, begin = json_schemas.validator({"items": {"multipleOf": step}}), time.process_time()
    assert [value for value in values if not made.is_valid([value])] == []
    assert [value for value in others if made.is_valid([value])] == []
    assert made.is_valid([True, "0.005", None])
    assert time.process_time() - begin < 5


def test_every_price_is_a_multiple_of_a_cent():
    made = json_schemas.validator({"items": {"multipleOf": 0.01}})
    assert made.is_valid([cents / 100 for cents in range(10_000)])
