"""evaluate.metrics: what each metric says of real forms of answers, a user's own function, and what is refused."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
from tiny import write_params

from slmake import params
from slmake.errors import UserError
from slmake.params.metrics import ARGUMENTS, parse
from slmake.scoring import answer_metrics, gates, metrics

# A call as four models' chat templates write it, and in the form of OpenAI's interface.
CALL = {"name": "book", "arguments": {"day": "Monday", "hours": [9, 10]}}
WRITTEN = {
    "Qwen3": '<tool_call>\n{"name": "book", "arguments": {"day": "Monday", "hours": [9, 10]}}\n</tool_call>',
    "Llama 3.1": '{"name": "book", "parameters": {"hours": [9, 10], "day": "Monday"}}',
    "Mistral": '[TOOL_CALLS][{"name": "book", "arguments": {"day": "Monday", "hours": [9, 10]}, "id": "abc123def"}]',
    "SmolLM3": 'Let me look.\n<tool_call>{"name":"book","arguments":{"day":"Monday","hours":[9,10]}}</tool_call>',
    "OpenAI": '{"type": "function", "function": {"name": "book", "arguments": "{\\"day\\": \\"Monday\\", \\"hours\\": [9, 10]}"}}',
}


def rows(expected: list[str], prompts: list[str] | None = None) -> types.SimpleNamespace:
    """What of `Questions` the metrics read."""
    return types.SimpleNamespace(
        rows=list(range(10, 10 + len(expected))), texts=prompts or [""] * len(expected), expected=expected
    )


def scored(entry: str | dict, expected: str, *answers: str) -> list[float]:
    return answer_metrics.numbers_of(parse(entry), rows([expected] * len(answers)), list(answers)).tolist()


def test_every_metric_has_a_function():
    assert set(ARGUMENTS) == set(answer_metrics.PLAIN) | set(answer_metrics.WITH_ARGUMENT)
    assert {name for name, argument in ARGUMENTS.items() if argument} == set(answer_metrics.WITH_ARGUMENT)


def test_contains():
    assert scored("contains", "Paris", "It is  paris.", "London", "") == [1, 0, 0]


def test_json_valid():
    answers = [
        '{"a": [1, null]}',
        " null ",
        '```json\n{"a": 1}\n```',
        '```  \n\n{"a": 1}\n\n```',
        '```json {"a": 1}\n```',
        "{'a': 1}",
        '{"a": NaN}',
        '{"a": 1} done',
        "[" * 9999,
        "",
    ]
    assert scored("json_valid", "{}", *answers) == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.timeout(20)
def test_a_long_run_of_line_ends_takes_no_time():
    lines = "\n" * 10**6
    assert scored("json_valid", "{}", f"```{lines}x", f"```{lines}{{}}{lines}```") == [0, 1]


@pytest.mark.parametrize("answer", ['{"price": 1e999}', '{"price": 1%s}' % ("0" * 5000), "[" * 300 + "]" * 300])
def test_an_answer_that_cannot_be_judged_is_not_valid_and_stops_nothing(tmp_path, answer):
    file = tmp_path / "schema.json"
    schema = {"properties": {"price": {"multipleOf": 0.01}}, "items": {"$ref": "#"}}
    file.write_text(json.dumps(schema), encoding="utf-8")
    score = answer_metrics.function_of(parse({"json_schema": str(file)}))
    assert [score("", "", text) for text in ('{"price": 19.99}', answer)] == [1.0, 0.0]


def test_json_schema(tmp_path):
    file = tmp_path / "booking.json"
    schema = {"type": "object", "required": ["day"], "properties": {"day": {"enum": ["Monday"]}}}
    file.write_text(json.dumps(schema), encoding="utf-8")
    entry = {"json_schema": str(file)}
    assert parse(entry).file == str(file)
    assert scored(entry, "", '{"day": "Monday"}', '{"day": "Sunday"}', "{}", "Monday") == [1, 0, 0, 0]


def test_regex_takes_the_whole_answer():
    assert scored({"regex": r"\d{4}-\d\d"}, "", "2026-11", " 2026-11\n", "on 2026-11", "2026-1") == [1, 1, 0, 0]


def test_numeric_takes_the_last_number():
    answers = ["The answer is 1,250.5", "1250.49", "3 apples cost 1250.6", "none", "1.2505e3", "-1250.5"]
    assert scored({"numeric": 0.05}, "= 1250.5", *answers) == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\u22125", -5),
        ("it is -5", -5),
        ("**-5**, +6", 6),
        ("10^-3", -3),
        ("3-5", 5),  # a range, as the next two
        ("5%-10%", 10),
        ("a\u22123", 3),
        ("2024-05-17", 17),
        ("17.05.2024", 2024),
        ("1,234,567", 1234567),
        ("$1,000.50.", 1000.5),
        ("-1,234%", -1234),
        ("3,14", 3.14),  # a decimal comma
        ("-0,125.", -0.125),
        ("1234,567", 1234.567),
        ("1.234,56", 1234.56),
        ("1.234.567,8e1", 12345678),
        ("[1,2,3]", 3),
        ("[1,2,345]", 345),
        ("12,34,567", 1234567),  # as in India
        ("Rs. 5,00,000", 500000),
        ("1,23,456.5", 123456.5),
        ("10,20,30", 30),
        ("1, 2", 2),
        ("1\u00a0234", 1234),
        ("100 200 300", 300),
        ("Step 3 100 apples", 100),
        ("1\u202f234\u202f567", 1234567),
        ("-12\u00a0345,67 €", -12345.67),
        ("1'234.50", 1234.5),
        ("1\u2019234", 1234),
        ("1.234.567", 1234567),
        ("in 2024 500 came", 500),  # no groups, as the next three
        ("1\u2009234\u20095678", 5678),
        ("1 2 3", 3),
        ("1 234'567", 234567),
        ("12,", 12),
        (".5", 0.5),
        ("5.", 5),
        ("1e5", 1e5),
        ("1.5e\u22123", 0.0015),
        ("½ x²", None),
        ("9" * 5000, float("inf")),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert answer_metrics.last_number(text) == number


@pytest.mark.parametrize(
    ("expected", "given", "same"),
    [
        ('{"n": 1}', '{"n": 1.0}', 1),
        ('{"n": [{"m": 2.50}]}', '{"n": [{"m": 25e-1}]}', 1),
        ('{"n": 1, "m": null}', '{"m": null, "n": 1e0}', 1),
        ('{"n": 1}', '{"n": true}', 0),
        ('{"n": 0}', '{"n": null}', 0),
        ('{"n": 1}', '{"n": "1"}', 0),
        ('{"n": [1, 2]}', '{"n": [2, 1]}', 0),
        ('{"n": 1}', "[" * 450 + "]" * 450, 0),
    ],
)
def test_arguments_that_are_equal_in_json_are_equal(expected, given, same):
    calls = [f'{{"name": "f", "arguments": {arguments}}}' for arguments in (expected, given)]
    as_text = f'{{"name": "f", "arguments": {json.dumps(given)}}}'
    assert scored("tool_arguments", calls[0], calls[1], as_text) == [same, same]
    twice, both = f"{calls[0]}{calls[0]}", f"{calls[1]}{calls[0]}"
    assert scored("tool_arguments", twice, both, calls[0]) == [same, 0]


@pytest.mark.parametrize("form", WRITTEN)
def test_tool_calls_of_every_form(form):
    assert answer_metrics.tool_calls(WRITTEN[form]) == [CALL]
    other = WRITTEN[form].replace("Monday", "Friday")
    assert scored("tool_name", WRITTEN[form], WRITTEN["Qwen3"], other, "Which day?") == [1, 1, 0]
    assert scored("tool_arguments", WRITTEN[form], WRITTEN["Llama 3.1"], other, "Which day?") == [1, 0, 0]


def test_rows_without_a_tool_call_do_not_count():
    numbers = answer_metrics.numbers_of(parse("tool_name"), rows([WRITTEN["Qwen3"], "Hello!"]), ["Hi", "Hi"])
    assert numbers[0] == 0
    assert np.isnan(numbers[1])
    figures = answer_metrics.score({"tool_name": numbers}, metrics.resamples(2, 100, 1))
    assert figures["tool_name"] == 0


def test_means_intervals_and_drops():
    weights = metrics.resamples(100, 4000, 7)
    before, after = np.array([1.0] * 80 + [0.0] * 20), np.array([1.0] * 70 + [0.0] * 30)
    figures = answer_metrics.score({"own": before}, weights)
    assert figures["own"] == 0.8
    assert figures["own_low"] == pytest.approx(0.72, abs=0.011)  # 1.96 standard errors of 4 points
    assert figures["own_high"] == pytest.approx(0.88, abs=0.011)
    lost = answer_metrics.drop({"own": before}, {"own": after}, weights)
    assert lost["own"] == 0.1
    assert lost["own_low"] == pytest.approx(0.04, abs=0.011)  # only ten rows differ
    assert lost["own_high"] == pytest.approx(0.16, abs=0.011)


def test_resamples_without_any_of_its_rows_do_not_count():
    """Three rows of 316, all right: no interval down to 0."""
    numbers = np.full(316, np.nan)
    numbers[:3] = 1.0
    figures = answer_metrics.score({"tool_name": numbers}, metrics.resamples(316, 2000, 1))
    assert (figures["tool_name"], figures["tool_name_low"], figures["tool_name_high"]) == (1.0, 1.0, 1.0)


def write_function(folder: Path, body: str) -> str:
    file = folder / "mine.py"
    file.write_text(f"def polite(prompt, expected, answer):\n    {body}\n", encoding="utf-8")
    return f"{file}:polite"


def test_a_function_of_ones_own(tmp_path):
    entry = write_function(tmp_path, "return answer.count('please') / len(prompt)")
    numbers = answer_metrics.numbers_of(parse(entry), rows(["", ""], ["four", "five"]), ["please, please", "now"])
    assert numbers.tolist() == [0.5, 0]


def test_a_metrics_file_may_define_classes(tmp_path):
    """dataclasses, pydantic and pickle look for a class's module by its name."""
    text = "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n@dataclass\nclass Reply:\n    text: str\n"
    body = "def size(prompt, expected, answer):\n    return len(pickle.loads(pickle.dumps(Reply(answer))).text)\n"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        more = body.replace("len(", f"{name == 'two':d} + len(")
        (tmp_path / name / "mine.py").write_text(text + more, encoding="utf-8")
    made = [answer_metrics.function_of(parse(f"{tmp_path}/{name}/mine.py:size")) for name in ("one", "two")]
    assert [function("", "", "abc") for function in made] == [3, 4]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('tone')", "polite on row 10 (answer 'hello'): KeyError: 'tone'. Correct the function."),
        ("raise SystemExit(0)", "polite on row 10 (answer 'hello'): SystemExit: 0."),
        ("return 1e308", "polite on row 10 (answer 'hello'): it returned 1e+308, not a finite number."),
        ("return float('nan')", "polite on row 10 (answer 'hello'): it returned nan, not a finite number."),
        ("return 'good'", "it returned 'good', not a finite number."),
        ("return None", "polite has nothing to score in any row."),
    ],
)
def test_its_errors_name_the_row(tmp_path, body, message):
    with pytest.raises(UserError) as caught:
        answer_metrics.values_of([parse(write_function(tmp_path, body))], rows([""]), ["hello"])
    assert message in str(caught.value)


def test_files_are_checked_before_any_model_is_asked(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "list.json").write_text('{"type": "nonsense"}', encoding="utf-8")
    wrong = {
        f"{tmp_path}/absent.py:f": "no such file",
        f"{tmp_path}/broken.py:f": "the file cannot be run: SyntaxError",
        write_function(tmp_path, "pass").replace(":polite", ":rude"): "there is no such function in the file",
    }
    for entry, message in wrong.items():
        with pytest.raises(UserError, match=message):
            answer_metrics.function_of(parse(entry))
    for name, message in (("absent.json", "no such file"), ("list.json", "not a JSON Schema: 'nonsense'")):
        with pytest.raises(UserError, match=message):
            answer_metrics.function_of(parse({"json_schema": str(tmp_path / name)}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["rougeL"], "unknown metric `rougeL`; known: contains, json_valid"),
        ([{"json_valid": "x"}], "json_valid takes no argument"),
        (["regex"], "regex needs a pattern"),
        ([{"regex": 42}], "regex needs a pattern as text: put 42.0 in quotes"),
        ([{"regex": "("}], "`(` is no regular expression"),
        ([{"numeric": -1}], "a tolerance of at least 0"),
        ([{"regex": "a", "contains": "b"}], "one metric per entry"),
        (["metrics/mine.py:not valid"], "path/to/file.py:function"),
        (["contains", "contains"], "two figures would be called `contains`"),
        (["mine.py:accuracy"], "two figures would be called `accuracy`"),
    ],
)
def test_wrong_entries(tmp_path, entries, message):
    file = write_params(tmp_path / "params.yaml", evaluate={"metrics": entries})
    with pytest.raises(UserError) as caught:
        params.load(file)
    assert message in str(caught.value)


def test_gates_on_them(tmp_path):
    checks = [
        {"metric": "polite", "minimum": 0.5, "interval": "worst"},
        {"metric": "contains", "maximum_drop": 0.05},
    ]
    settings = {
        "evaluate": {"metrics": ["mine.py:polite", "contains"]},
        "gates": {"checks": checks, "min_accuracy": None},
    }
    section = params.load(write_params(tmp_path / "params.yaml", **settings)).gates
    model = {"accuracy": 1.0, "accuracy_low": 1.0, "accuracy_high": 1.0, "polite_low": 0.4, "polite_high": 0.8}
    figures = {
        "test_rows": 100,
        "merged": model | {"polite": 0.6, "contains": 0.9},
        "int4": model | {"polite": 0.6, "contains": 0.8},
        "drop": {"int4_vs_merged": {"contains": 0.1, "contains_low": 0.0, "contains_high": 0.2}},
    }
    judged = {entry["metric"]: entry for entry in gates.judge(section, figures)}
    assert (judged["polite"]["passed"], judged["polite"]["missed_by"]) == (False, 0.1)
    assert (judged["contains"]["passed"], judged["contains"]["missed_by"]) == (False, 0.05)
    settings["evaluate"] = {"metrics": ["contains"]}
    with pytest.raises(UserError, match="unknown metric `polite`"):
        params.load(write_params(tmp_path / "params.yaml", **settings))
