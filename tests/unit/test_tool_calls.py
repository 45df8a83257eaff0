"""Calls of functions: the form is the chat template's, guidance holds answers to it, and answers are read in it."""

import json
import math
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
from prepared import other_chat
from served import CHAT, CLOCK, TEMPLATE, TEXT, WEATHER, export

from slmake import generation, openai_api
from slmake.answer_stream import Stream
from slmake.data.chat import ChatTemplate
from slmake.data.conversation import read_conversation
from slmake.data.tokenize import load_tokenizer
from slmake.generation import Sampling
from slmake.tool_calls import CallForm, json_guidance, refuse_endless


@pytest.fixture(scope="module")
def model(tmp_path_factory, base) -> generation.Exported:
    return generation.Exported(export(base, tmp_path_factory.mktemp("calls") / "onnx"), CHAT)


def answer(model: generation.Exported, guidance: tuple[str, str], new_tokens: int = 80, seed: int = 1) -> str:
    prompt = model.encode(model.chat_prompt([{"role": "user", "content": "Hi"}]))
    return "".join(Stream(model, prompt, new_tokens, Sampling(temperature=1.0, seed=seed, guidance=guidance)))


def other_template(model: generation.Exported, folder: Path, template: str, **form: object) -> generation.Exported:
    shutil.copytree(model.folder, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return generation.Exported(folder, {**CHAT, **form})


def test_the_form_is_found_in_the_template(model):
    assert CallForm.of(model) == CallForm("<tool_call>\n", "\n</tool_call>", "name", "arguments")


@pytest.mark.parametrize("prefix", ["", "<think></think>"])
def test_what_stands_before_every_answer_is_no_part_of_a_call(model, tmp_path, prefix):
    """Qwen3 writes an empty think block before a call as before a text, also where models are not asked behind it."""
    shows = "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    template = TEMPLATE.replace("{{ m.content }}", shows)
    other = other_template(model, tmp_path / "onnx", template, chat={**CHAT["chat"], "answer_prefix": prefix})
    assert CallForm.of(other) == CallForm.of(model)


def test_a_template_with_other_keys_and_no_frame(model, tmp_path):
    """As Llama 3.1 writes calls."""
    template = (
        TEMPLATE.replace("<tool_call>\n", "").replace("\n</tool_call>", "").replace('"arguments"', '"parameters"')
    )
    other = other_template(model, tmp_path / "onnx", template)
    form = CallForm.of(other)
    assert form == CallForm("", "", "name", "parameters")
    text = answer(other, form.guidance(other, [WEATHER]))
    content, [(name, arguments)] = form.read(text, ["weather"])
    assert (content, name, set(arguments)) == ("", "weather", {"city", "days"})
    assert form.read(f"It is {text}", ["weather"]) == (f"It is {text}", [])


def test_a_call_that_is_cut_in_its_closing_mark_is_a_call(model):
    form, call = CallForm.of(model), '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}'
    for rest in ("", "\n</tool", "\n</tool_call>"):
        assert form.read(f"It is{call}{rest}", ["weather"]) == ("It is", [("weather", {"city": "Bern"})])


BOOK = {  # with the keys in the order of OpenAI's documentation
    "name": "book",
    "description": "Book a day.",
    "parameters": {"type": "object", "properties": {"day": {"type": "string", "default": None}}},
    "strict": None,
}


@pytest.mark.parametrize(
    ("trained", "asked"),
    [
        ({"type": "function", "function": BOOK}, {"type": "function", "function": BOOK}),
        ({"function": BOOK, "type": "function"}, {"function": BOOK, "type": "function"}),
        ({"function": BOOK}, {"type": "function", "function": BOOK}),
        (BOOK, {"type": "function", "function": BOOK}),
        ({"type": "function", **BOOK}, {"type": "function", "function": BOOK}),
    ],
    ids=["wrapped", "type last", "without type", "bare", "flat"],
)
def test_the_server_asks_with_tools_and_calls_as_training_wrote_them(model, base, tmp_path, trained, asked):
    """OpenAI's form is the only one that clients can send; the order of keys is theirs."""
    template = TEMPLATE.replace("[{{ m.role }}]", "[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]")
    template = template.replace("<tool_call>", "<tool_call>{{ call | tojson }}")
    call = {"id": "a", "type": "function", "function": {"name": "book", "arguments": {"day": "Monday", "at": 1}}}
    turns = [
        {"role": "user", "content": "Book", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done", "name": "book", "tool_call_id": "a"},
    ]
    chat = ChatTemplate(load_tokenizer(other_chat(base, tmp_path / "base", template)), {}, "2024-01-01")
    row = read_conversation([*turns, {"role": "assistant", "content": "Done"}], json.dumps([trained]))
    sent = {**call, "function": {"arguments": json.dumps(call["function"]["arguments"]), "name": "book"}}
    turns[1]["tool_calls"] = [sent]
    request = openai_api.Chat.model_validate_json(json.dumps({"messages": turns, "tools": [asked]}))
    prompt = openai_api.chat_job(other_template(model, tmp_path / "onnx", template), request).prompt
    assert prompt == chat.asked(row.turns[:-1], row.tools)
    assert "[user Ann]" in prompt
    assert "[tool book]" in prompt


@pytest.mark.parametrize("text", ["a\u0007b\u001b", "\\u0007", "\\\u0007", "\b\f\u007f\u2028", '"\\"'])
def test_texts_of_a_tool_are_what_the_template_reads(model, text):
    """The runtime's reader of templates knows no escapes with four digits."""
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    prompt = model.chat_prompt([{"role": "user", "content": "Hi"}], [tool])
    assert json.dumps(text, ensure_ascii=False) in prompt


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 1e15, math.inf])
def test_numbers_that_the_runtime_writes_in_another_way_are_refused(model, number):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"const": number}}}}}
    asked = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match=r"the runtime writes the number .* in another way than training\."):
        model.chat_prompt(asked, [tool])
    with pytest.raises(ValueError, match=r"has the number .* in its tools or calls"):
        read_conversation([*asked, {"role": "assistant", "content": "Hello"}], [tool["function"]])


@pytest.mark.parametrize("number", [1e-7, 1e22, 0.5, -3.0, 5])
def test_numbers_of_a_schema_are_what_the_template_reads(model, number):
    """The runtime's reader knows no exponents."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"minimum": number}}}}}
    prompt = model.chat_prompt([{"role": "user", "content": "Hi"}], [tool])
    written = re.search(r'"minimum": ?([^}\s]+)', prompt)[1]
    assert float(written) == number


@pytest.mark.parametrize("count", [1000, 1001])
def test_schemas_of_many_objects_are_refused(count):
    """The runtime's time grows with the square of their number, while all other requests wait."""
    schema = {
        "properties": {f"p{number}": {"type": "string"} for number in range(count - 2)}
    }  # and the two around them
    if count > 1000:
        with pytest.raises(ValueError, match="of its objects at most 1000 can be followed"):
            refuse_endless(schema)
    else:
        refuse_endless(schema | {"enum": ["x"] * 5000})


@pytest.mark.parametrize("name", ["minItems", "maxItems", "minProperties", "maxProperties"])
def test_schemas_that_count_without_end_are_refused(name):
    """The runtime would take all memory."""
    with pytest.raises(ValueError, match=f"{name} is 1000000; at most 1000 can be followed"):
        json_guidance({"properties": {"a": {"items": [{name: 10**6}]}}})
    assert json_guidance({name: 10})


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "integer", "multipleOf": 999983}, "multipleOf come to 999983; at most 10000"),
        ({"type": "number", "multipleOf": 1e-9}, "multipleOf come to 1e[+]09; at most 10000"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf come to 988027; at most 10000"),
        (
            {"allOf": [{"pattern": f"x{number}.*y"} for number in range(20)]},
            "patterns under allOf, or beside a .ref, at most 1",
        ),
        ({"anyOf": [True] * 20000}, "lists and objects at most 10000"),
        ({"required": ["x"] * 20000}, "lists and objects at most 10000"),
    ],
)
def test_schemas_that_take_minutes_are_refused(schema, reason):
    """The runtime compiles them while all other requests wait."""
    with pytest.raises(ValueError, match=reason):
        json_guidance({"properties": {"a": schema}})


def test_a_schema_below_the_bounds_is_taken():
    assert json_guidance({"multipleOf": 0.01, "allOf": [{"pattern": "a"}], "enum": ["x"] * 5000})


@pytest.mark.parametrize(
    ("template", "form", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", {}, "its chat template does not show them"),
        (TEMPLATE.replace("{{ call.function.name }}", "f"), {}, "in a form that is not known"),
        (TEMPLATE, {"prompt": TEXT["prompt"], "fields": ["phrase"]}, "its chat template does not show them"),
    ],
)
def test_models_without_tools_are_refused(model, tmp_path, template, form, reason):
    with pytest.raises(ValueError, match=f"this model takes no tools: .*{reason}"):
        CallForm.of(other_template(model, tmp_path / "onnx", template, **form))


def test_guidance_holds_a_random_model_to_a_call(model):
    form = CallForm.of(model)
    text = answer(model, form.guidance(model, [WEATHER]))
    content, [(name, arguments)] = form.read(text, ["weather"])
    assert (content, name) == ("", "weather")
    assert arguments["city"] in ("Rome", "Oslo")
    assert 1 <= arguments["days"] <= 7
    assert json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")) == {
        "name": "weather",
        "arguments": arguments,
    }


def test_schemas_that_refer_to_themselves_hold_where_they_stand(model):
    """What pydantic makes of an enumeration is a reference; so is a tree. Two tools may use one name for two things."""
    unit = {"type": "object", "properties": {"default": {"$ref": "#/$defs/Unit"}}, "required": ["default"]}
    tree = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://example.com/tree",
        "type": "object",
        "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}, "$id": {"const": "one"}},
        "required": ["kids", "$id"],
        "additionalProperties": False,
    }
    closed = {"additionalProperties": False}
    schemas = {
        "warm": unit | closed | {"$defs": {"Unit": {"enum": ["celsius"]}}},
        "long": unit | closed | {"$defs": {"Unit": {"enum": ["metre"], "title": "Unit"}}},
        "plant": tree,
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": schemas[name]}} for name in schemas]
    form, seen = CallForm.of(model), {}
    for seed in range(24):
        text = answer(model, form.guidance(model, tools), 300, seed)
        if calls := form.read(text, schemas)[1]:  # a long tree is cut
            name, arguments = calls[0]
            jsonschema.validate(arguments, schemas[name])
            seen.setdefault(name, []).append(arguments)
    assert seen.keys() == schemas.keys()
    assert seen["warm"][0] == {"default": "celsius"}
    assert seen["long"][0] == {"default": "metre"}
    assert any(each["kids"] for each in seen["plant"])


def test_calls_are_read_out_of_an_answer():
    form = CallForm("<tool_call>\n", "\n</tool_call>", "name", "arguments")
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    two = '<tool_call>{"name": "clock"}</tool_call>'
    names = ["weather", "clock"]
    assert form.read(f"Let me look. {one}\n{two}", names) == (
        "Let me look.",
        [("weather", {"city": "Rome"}), ("clock", {})],
    )
    for text in (
        "no call",
        '<tool_call>{"name": "other"}</tool_call>',
        '<tool_call>{"name": "weather",',
        "<tool_call>[1]",
    ):
        assert form.read(text, names) == (text, [])


def test_a_tool_without_parameters_takes_any_object(model):
    form = CallForm.of(model)
    kind, grammar = form.guidance(model, [WEATHER, CLOCK])
    assert kind == "lark_grammar"
    assert '"const": "clock"' in grammar
    assert '"arguments": {"type": "object", "$id": ' in grammar


def test_schemas_are_met_without_loose_white_space(model):
    schema = {"type": "object", "properties": {"tone": {"enum": ["joy", "fear"]}}, "required": ["tone"]}
    text = answer(model, json_guidance({**schema, "additionalProperties": False}))
    assert text == json.dumps(json.loads(text))
    assert json.loads(text)["tone"] in ("joy", "fear")
    own = {**schema, "x-guidance": {"whitespace_flexible": False}}
    assert json.loads(json_guidance(own)[1]) == own
