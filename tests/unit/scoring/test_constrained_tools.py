"""`constrain: tools`: an answer is text or a call that fits the row's tools, in evaluate, in a package and in the server."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from evaluate_script import export
from served import CHAT, CLOCK, TEMPLATE, WEATHER, serving
from test_constrained import run
from tiny import make_rows, write_params

from scripts import prepare, rehearse
from slmake import generation, params
from slmake.constraints import constrained
from slmake.errors import UserError
from slmake.generation import Sampling
from slmake.prompts import load_prompt
from slmake.rehearsal import checks
from slmake.scoring import onnx_runner
from slmake.scoring.constrained import calls_fit
from slmake.tool_calls import CallForm

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
FORM = CallForm("<tool_call>\n", "\n</tool_call>", "name", "arguments")
MARK_ID = 510  # a free id of the tiny vocabulary


def prepared(folder: Path, base: Path, tools: list[list | None]) -> Path:
    """The dataset of conversations whose answer is a call; their tools in turn."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    plain = {"role": "assistant", "content": "Warm."}
    rows = []
    for number, row in enumerate(make_rows(24)):
        given = tools[number % len(tools)]
        turns = [{"role": "user", "content": row["phrase"]}, answer if given else plain]
        rows.append({"messages": turns, "tools": given})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    section = {"source": str(folder / "rows.json"), "text_template": None, "answer": None, "messages": "messages"}
    section |= {"max_seq_len": 512, "test_fraction": 0.5, "eval_fraction": 0}
    file = write_params(folder / "prepare.yaml", prepare=section)
    given = {"params": file, "base": base, "output": folder / "dataset", "report": folder / "dataset.json"}
    prepare.main([str(part) for name, path in given.items() for part in (f"--{name}", path)])
    return folder / "dataset"


@pytest.fixture(scope="module")
def chat_base(base, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("tools") / "base"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def onnx(chat_base) -> Path:
    return export(chat_base, chat_base.parent / "onnx", "fp32")


@pytest.fixture(scope="module")
def model(onnx) -> generation.Exported:
    return generation.Exported(onnx, CHAT)


@pytest.fixture(scope="module")
def same_tools(chat_base, tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("same"), chat_base, [[WEATHER, CLOCK]])


def written(model: generation.Exported, wanted: str, guidance: tuple[str, str]) -> str:
    """What a model writes that wants to write a text, as far as guidance lets it, and then anything."""
    ids = iter(map(int, model.tokenizer.encode(wanted)))

    def look(generator) -> None:
        logits = generator.get_logits()
        if (token := next(ids, None)) is not None:
            logits[...] -= 1000
            logits[..., token] += 2000
            generator.set_logits(logits)

    prompt = model.encode(model.chat_prompt([{"role": "user", "content": "Hi"}]))
    return model.text(model.generate(prompt, 200, look, sampling=Sampling(guidance=guidance)))


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ("It is warm, 3 < 4", "It is warm, 3 < 4"),
        (CALL, CALL),
        (f"Let me look. {CALL}", f"Let me look. {CALL}"),
        ("<tool_calls", "<tool_calls"),
    ],
    ids=["text", "call", "text and call", "nearly the mark"],
)
def test_texts_and_calls_are_let_through(model, wanted, shown):
    assert written(model, wanted, FORM.guidance(model, [WEATHER], optional=True)).startswith(shown)


@pytest.mark.parametrize(
    "wanted", ["<tool_call>oops", "<tool_call>\n{}", CALL.replace("Rome", "Bonn"), CALL.replace("weather", "rain")]
)
def test_what_begins_as_a_call_ends_as_one(model, wanted):
    text = written(model, wanted, FORM.guidance(model, [WEATHER], optional=True))
    assert not text.startswith(wanted)
    assert calls_fit(FORM, [WEATHER], text)
    assert FORM.read(text, ["weather"])[1][0][0] == "weather"


def test_a_mark_that_is_one_token(model, tmp_path):
    folder = Path(shutil.copytree(model.folder, tmp_path / "onnx"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": MARK_ID, "content": "<tool_call>", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    other = generation.Exported(folder, CHAT)
    guidance = FORM.guidance(other, [WEATHER], optional=True)
    assert f"<[{MARK_ID}]>" in guidance[1]
    assert written(other, CALL, guidance).startswith(CALL)
    assert written(other, "It is warm", guidance).startswith("It is warm")
    assert calls_fit(FORM, [WEATHER], written(other, "<tool_call>oops", guidance))


def test_calls_as_mistral_writes_them(model, tmp_path):
    """A special token, which no answer's text shows, and a list of calls with names of their own."""
    folder = Path(shutil.copytree(model.folder, tmp_path / "onnx"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": MARK_ID, "content": "[TOOL_CALLS]", **flags, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    old = """<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>"""
    new = """{{ '[TOOL_CALLS] [' if loop.first else ', ' }}{"name": "{{ call.function.name }}", "arguments": """
    new += """{{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}{{ ']' if loop.last }}"""
    assert old in TEMPLATE
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace(old, new), encoding="utf-8")
    other = generation.Exported(folder, CHAT)
    form = CallForm.of(other)
    assert form == CallForm("[TOOL_CALLS] [", "]", "name", "arguments", "id", ("[TOOL_CALLS]",))
    guidance = form.guidance(other, [WEATHER, CLOCK], optional=True)
    assert f"<[{MARK_ID}]>" in guidance[1]
    weather = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}, "id": "abcdefgh1"}'
    clock = '{"name": "clock", "arguments": {}, "id": "abcdefgh2"}'
    for wanted in (f"[{weather}]", f"[{weather}, {clock}]"):
        text = written(other, f"[TOOL_CALLS] {wanted}", guidance)
        assert text.lstrip().startswith(wanted)
        content, calls = form.read(wanted, ["weather", "clock"])
        assert (content, calls[0]) == ("", ("weather", {"city": "Rome", "days": 2}))
        assert [name for name, _ in calls] == ["weather", "clock"][: len(calls)]
        assert len(calls) == wanted.count('"name"')
        assert calls_fit(form, [WEATHER, CLOCK], wanted)
    assert written(other, "It is warm", guidance).startswith("It is warm")
    assert calls_fit(form, [WEATHER], written(other, "[TOOL_CALLS]oops", form.guidance(other, [WEATHER])).strip())
    assert not calls_fit(form, [WEATHER], '[{"name": "rain", "arguments": {}, "id": "abcdefgh1"}]')


def test_calls_without_a_mark(model):
    """As Llama 3.1 writes them: a JSON object is a call."""
    form = CallForm("", "", "name", "parameters")
    guidance = form.guidance(model, [WEATHER], optional=True)
    assert written(model, "It is {warm}", guidance).startswith("It is {warm}")
    assert calls_fit(form, [WEATHER], written(model, '{"name": "rain"', guidance))
    assert not calls_fit(form, [WEATHER], '{"name": "rain"')


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ("It is warm.", True),
        (CALL, True),
        (f"{CALL}\n{CALL}", True),
        (CALL.replace("Rome", "Bonn"), False),
        (CALL.replace("weather", "rain"), False),
        (CALL.replace(', "days": 2', ""), False),
        (CALL.removesuffix("}\n</tool_call>"), False),
    ],
)
def test_what_counts_as_valid(answer, valid):
    assert calls_fit(FORM, [WEATHER, CLOCK], answer) is valid


def test_rows_are_held_to_their_own_tools(tmp_path, chat_base, onnx):
    """Half of the rows have tools; the others are free."""
    dataset = prepared(tmp_path, chat_base, [[WEATHER], None])
    form = json.loads((dataset / "prompt.json").read_text(encoding="utf-8"))
    assert form["tools"] == []
    metrics, timings, rows = run(tmp_path, dataset, onnx, constrain="tools", metrics=["tool_name"], max_new_tokens=8)
    assert (metrics["valid"], metrics["constrained_valid"]) == (1, 1)  # an untrained model writes no mark
    assert (metrics["tool_name"], metrics["constrained_tool_name"]) == (0, 0)
    assert metrics["constrained_tool_name_low"] == 0
    assert timings["constrained_latency_ms_p50"] > 0
    assert [row["fp32"] for row in rows] == [row["fp32_constrained"] for row in rows]


def test_a_package_has_the_tools_that_all_rows_have(same_tools, onnx):
    form = json.loads((same_tools / "prompt.json").read_text(encoding="utf-8"))
    assert form["tools"] == [WEATHER, CLOCK]
    held = constrained(form, "tools", partial(generation.Exported, onnx))
    assert (held["constrain"], held["guidance"]["kind"]) == ("tools", "lark_grammar")
    model = generation.Exported(onnx, held)
    assert '"name": "clock"' in model.prompt("Hi")
    assert calls_fit(FORM, [WEATHER, CLOCK], written(model, "<tool_call>oops", model.sampling.guidance))


def test_the_server_holds_answers_to_the_tools_of_the_request(same_tools, onnx):
    import openai

    form = json.loads((same_tools / "prompt.json").read_text(encoding="utf-8"))
    model = generation.Exported(onnx, constrained(form, "tools", partial(generation.Exported, onnx)))
    seen, make = [], model.generator
    model.generator = lambda *arguments: seen.append(arguments[2].guidance) or make(*arguments)
    with serving(model) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        client.chat.completions.create(**asked)
        client.chat.completions.create(**asked, tools=[WEATHER])
        client.chat.completions.create(**asked, tools=[WEATHER], tool_choice="none")
    free, chosen, none = seen
    assert (free, none) == (None, None)
    assert "weather" in chosen[1]
    assert "clock" not in chosen[1]
    assert "TEXT" in chosen[1]


@pytest.mark.parametrize("constraint", ["labels", "tools"])
@pytest.mark.parametrize("stage", ["evaluate", "package"])
def test_rehearse_refuses_what_the_dataset_does_not_have(stage, constraint, tmp_path):
    file = write_params(tmp_path / "params.yaml", **{stage: {"constrain": constraint}})
    form = {"labels": None}
    with pytest.raises(UserError, match=f"{stage}.constrain: {constraint}: the dataset"):
        rehearse.refuse_what_is_not_there(params.load(file), form)
    rehearse.refuse_what_is_not_there(params.load(file), {"labels": ["joy"], "tools": []})


@pytest.mark.parametrize(
    ("city", "reasons"),
    [
        ({"minItems": 1}, {}),
        (
            {"uniqueItems": True},
            dict.fromkeys(["evaluate", "package"], "answers cannot be held to this lark_grammar: "),
        ),
        (
            {"pattern": "^(a|a)*$"},
            {"evaluate": "tools: the parameters of 'weather' are no JSON Schema that can be checked"},
        ),
    ],
)
def test_rehearse_tries_the_tools_of_the_dataset(tmp_path, chat_base, onnx, city, reasons):
    parameters = {"type": "object", "properties": {"city": city}}
    dataset = prepared(
        tmp_path, chat_base, [[{"type": "function", "function": {"name": "weather", "parameters": parameters}}]]
    )
    for stage in ("evaluate", "package"):
        checked = params.load(write_params(tmp_path / "params.yaml", **{stage: {"constrain": "tools"}}))
        model = onnx_runner.load(onnx, load_prompt(dataset))
        if stage in reasons:
            with pytest.raises(UserError, match=rf"{stage}\.constrain: {reasons[stage]}"):
                checks.try_constraints(checked, dataset, model)
        else:
            checks.try_constraints(checked, dataset, model)


@pytest.mark.parametrize("constraint", ["labels", "tools"])
def test_without_a_dataset_it_is_refused_at_once(constraint, tmp_path):
    changes = {"all": {"stages": ["quantize", "evaluate", "gates", "package"]}, "prepare": None}
    gates = {"min_accuracy": None, "max_accuracy_drop": None, "max_tokenizer_differences": None}
    file = write_params(tmp_path / "params.yaml", **changes, gates=gates, package={"constrain": constraint})
    with pytest.raises(UserError, match=f"package.constrain: without a dataset there are no {constraint}"):
        params.load(file)


def test_a_model_without_tools_in_its_template_is_refused(base, tmp_path, same_tools, refused):
    folder = export(base, tmp_path / "onnx", "fp32")
    message = refused(run, tmp_path, same_tools, folder, constrain="tools", max_new_tokens=4)
    assert "evaluate.constrain: tools: this model takes no tools" in message


@pytest.mark.parametrize("value", ["1e999", "1" + "0" * 5000, "[" * 300 + "]" * 300, "[" * 9000 + "]" * 9000])
def test_arguments_that_cannot_be_judged_do_not_fit(value):
    """The scores of all other rows stand."""
    parameters = {"properties": {"a": {"multipleOf": 0.01, "items": {"$ref": "#/properties/a"}}}}
    tool = {"type": "function", "function": {"name": "pay", "parameters": parameters}}
    answer = '<tool_call>\n{"name": "pay", "arguments": {"a": %s}}\n</tool_call>'
    assert calls_fit(FORM, [tool], answer % "0.5")
    assert not calls_fit(FORM, [tool], answer % value)
