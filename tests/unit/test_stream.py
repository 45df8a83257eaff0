"""Answers while they are generated: the pieces are the whole answer, stop strings and limits end it, sampling follows its seed."""

import json

import pytest
from served import CHAT, TEXT, export

from slmake import answer_stream, generation, openai_api
from slmake.answer_stream import Stream
from slmake.generation import Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory, base) -> generation.Exported:
    return generation.Exported(export(base, tmp_path_factory.mktemp("stream") / "onnx"), TEXT)


def sampled(seed: int) -> Sampling:
    return Sampling(temperature=1.5, top_p=0.95, seed=seed)


@pytest.fixture(scope="module")
def prompt(model) -> list[int]:
    return model.encode(model.prompt("We buried the old dog"))


def test_pieces_are_the_answer_that_is_scored(model, prompt):
    stream = Stream(model, prompt, 8)
    pieces = list(stream)
    expected = model.generate(prompt, 8)
    assert stream.tokens == expected
    assert "".join(pieces) == stream.text == model.decode(expected)
    assert stream.finish == "length"


def test_pieces_of_sampled_text_are_the_whole_of_it(model, prompt):
    """Bytes of a character that stand in two tokens, and white space at the ends, are never given too early."""
    texts = set()
    for seed in range(40):
        stream = Stream(model, prompt, 24, sampled(seed))
        given = ""
        for piece in stream:
            given += piece
            assert answer_stream.INCOMPLETE not in piece or answer_stream.INCOMPLETE in model.decode(stream.tokens)
        assert given == stream.text == model.decode(stream.tokens)
        texts.add(given)
    assert len(texts) > 20


def test_a_seed_gives_the_same_answer_and_another_seed_another(model, prompt):
    first, again, other = (Stream(model, prompt, 24, sampled(seed)) for seed in (3, 3, 4))
    texts = ["".join(stream) for stream in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    greedy = Stream(model, prompt, 8, Sampling(seed=3))
    list(greedy)
    assert greedy.tokens == model.generate(prompt, 8)


def test_a_stop_string_ends_the_answer_before_it(model, prompt):
    whole = Stream(model, prompt, 24, sampled(5))
    list(whole)
    stop = whole.text[4:7]
    stream = Stream(model, prompt, 24, sampled(5), [stop])
    assert "".join(stream) == stream.text == whole.text[: whole.text.index(stop)].rstrip()
    assert stream.finish == "stop"
    assert len(stream.tokens) < len(whole.tokens)
    without = Stream(model, prompt, 24, sampled(5), ["no such text"])
    assert "".join(without) == whole.text
    begun = Stream(model, prompt, 24, sampled(5), [whole.text[-2:] + "never"])  # held back, then given
    assert "".join(begun) == whole.text


def test_an_end_token_ends_the_answer(model, prompt):
    stream = Stream(model, prompt, 8, Sampling(guidance=("regex", "joy|fear")))
    assert "".join(stream) in ("joy", "fear")
    assert stream.finish == "stop"


def test_guidance_of_the_form_holds_every_answer(model, base):
    held = generation.Exported(model.folder, {**TEXT, "guidance": {"kind": "regex", "data": "joy|fear"}})
    assert held.answer("We buried the old dog", new_tokens=8) in ("joy", "fear")
    assert model.answer("We buried the old dog", new_tokens=8) not in ("joy", "fear")
    broken = generation.Exported(model.folder, {**TEXT, "guidance": {"kind": "regex", "data": "(joy"}})
    with pytest.raises(ValueError, match="answers cannot be held to this regex: "):
        broken.answer("We buried the old dog")


def test_an_answer_that_does_not_fit_is_refused_with_the_figures(model):
    with pytest.raises(
        ValueError, match=r"too long: 510 tokens with the template, and 3 for the answer; the model reads 512\."
    ):
        model.fitting(range(510), 3)
    assert len(model.fitting(range(509), 3)) == 509


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        (["phrase"], '{"a": 1}', ['{"a": 1}']),
        (["a", "b"], '{"b": "2", "a": "1"}', ["1", "2"]),
        (["a", "b"], '{"a": "1"}', None),
        (["a", "b"], "text", None),
        (["a", "b"], "[1]", None),
        (["a", "b"], "[" * 100_000, None),
        (["a", "b"], '{"a": 5, "b": true}', ["5", "true"]),
    ],
)
def test_texts_of_several_fields_are_a_json_object(model, fields, text, expected):
    several = generation.Exported(model.folder, {**TEXT, "prompt": "x", "fields": fields})
    if expected is None:
        with pytest.raises(ValueError, match=r"the template has the fields a, b: give a JSON object with each\."):
            openai_api.field_texts(several.form, text)
    else:
        assert openai_api.field_texts(several.form, text) == expected
    assert openai_api.field_texts(CHAT, text) == [text]


@pytest.mark.parametrize("value", ["null", "1e999", "1.0", '{"x": 1}', "[1]"])
def test_values_that_training_has_no_text_of_are_refused(model, value):
    several = generation.Exported(model.folder, {**TEXT, "prompt": "{a} {b}", "fields": ["a", "b"]})
    with pytest.raises(ValueError, match=r"the field b is .*: give it as a text, as the data has it\."):
        openai_api.field_texts(several.form, f'{{"a": "x", "b": {value}}}')


def test_chats_show_tools_as_training_did(model, base):
    """The runtime by itself would write "str" for "string"."""
    from served import TEMPLATE, WEATHER
    from transformers import AutoTokenizer

    chat = generation.Exported(model.folder, CHAT)
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["parameters"]["properties"]["city"] = {
        "type": "string",
        "description": "'quoted' \"ü\" {{x}} {% y %}",
    }
    turns = [{"role": "user", "content": 'Höw "is" it?'}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
    turns += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "{}", "tool_call_id": "1"},
    ]
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(
        turns, tools=[tool, WEATHER], chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert chat.chat_prompt(turns, [tool, WEATHER]) == expected
    with pytest.raises(ValueError, match="NUL character"):
        chat.chat_prompt([{"role": "user", "content": "a\0b"}])
