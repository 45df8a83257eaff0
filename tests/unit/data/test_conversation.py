"""Conversations of several turns: which turns are trained, tools and tool calls, long conversations, bad input."""

import datetime
import json

import pytest
from prepared import CHAT, WHOLE, other_chat, write_rows
from test_chat import PLAIN, THINKING

from slmake.data.chat import ChatTemplate
from slmake.data.conversation import read_conversation

END = "<|end|>"
TOOLS = (
    "{% if tools %}<|start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ m.content }}<|end|>\n", "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{{ '\\n' }}"
)
SCHEMA = {
    "type": "function",
    "function": {"name": "stock", "parameters": {"type": "object", "properties": {"part": {"type": "string"}}}},
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def call(arguments: object = None, **more: object) -> dict:
    function = {"name": "stock", "arguments": {"part": "tube"} if arguments is None else arguments}
    return assistant(None, tool_calls=[{"type": "function", "function": function}], **more)


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "Be short."}
TALK = [SYSTEM, user("Any tubes?"), call(), tool("3"), assistant("Three."), user("And pumps?"), assistant("None.")]


@pytest.fixture
def prepared(build, tokenizer_folder, tmp_path):
    """Train, eval and test of conversations: prepared(turns or rows, template=…, field=value…)."""
    return lambda rows, template=TOOLS, **fields: build(
        [{"messages": row} if isinstance(row, list) else row for row in rows] if isinstance(rows, list) else rows,
        base=other_chat(tokenizer_folder, tmp_path / f"base-{len(list(tmp_path.iterdir()))}", template),
        **{**WHOLE, **CHAT, "max_seq_len": 512, **fields},
    )


def learned(tokenizer, example: dict) -> list[str]:
    """The texts with a loss of a sequence, one for each answer."""
    parts, open_part = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        if label == -100:
            open_part = False
            continue
        assert label == token
        if not open_part:
            parts.append([])
        parts[-1].append(label)
        open_part = True
    return [tokenizer.decode(part) for part in parts]


CALL = '<call>stock {"part": "tube"}</call>' + END


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, [CALL, "Three." + END, "None." + END]), ({"train_on": "last"}, ["None." + END])],
)
def test_all_answers_or_the_last(prepared, tokenizer, fields, expected):
    """One sequence holds the whole conversation, and the loss is on each answer with its end."""
    built = prepared([{"messages": TALK, "tools": [SCHEMA]}], **fields)
    (example,) = built.train
    assert learned(tokenizer, example) == expected
    whole = tokenizer.decode(example["input_ids"])
    assert whole == example["prompt"] + "None." + END
    assert whole.startswith('<|start|>tools\n{"type": "function", "function": {"name": "stock"')
    assert example["turns"] == ([3, 5, 7] if not fields else [7])
    assert built.report["answer_tokens"]["train"] == sum(label != -100 for label in example["labels"])


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0, "train": True}]
)
def test_turns_left_out(prepared, tokenizer, flag):
    turns = [*TALK[:4], assistant("Three.", **flag), *TALK[5:6], assistant("None.", weight=1, train=True, loss=True)]
    (example,) = prepared([turns]).train
    assert learned(tokenizer, example) == [CALL, "None." + END]
    assert example["turns"] == [3, 7]
    assert flag.keys().isdisjoint(tokenizer.decode(example["input_ids"]))


@pytest.mark.parametrize(
    "write",
    [
        lambda: {"messages": TALK, "tools": json.dumps([SCHEMA])},
        lambda: {
            "messages": [call('{"part": "tube"}') if turn == call() else turn for turn in TALK],
            "tools": [SCHEMA],
        },
        lambda: {
            "messages": [
                assistant("", tool_calls='[{"name": "stock", "arguments": {"part": "tube"}}]')
                if turn == call()
                else turn
                for turn in TALK
            ],
            "tools": [SCHEMA],
        },
        lambda: {
            "messages": [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]} if turn["content"] else turn
                for turn in TALK
            ],
            "tools": [SCHEMA],
        },
        lambda: {
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "Any tubes?"},
                {"from": "function_call", "value": '{"name": "stock", "arguments": {"part": "tube"}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Three."},
                {"from": "human", "value": "And pumps?"},
                {"from": "gpt", "value": "None."},
            ],
            "tools": json.dumps([SCHEMA]),
        },
    ],
)
def test_tools_and_calls_as_text_or_objects(prepared, write):
    """However tools, calls and contents are written, the same tokens are trained."""
    plain, other = prepared([{"messages": TALK, "tools": [SCHEMA]}]), prepared([write()], name="other")
    assert (other.folder / "train.parquet").read_bytes() == (plain.folder / "train.parquet").read_bytes()


def test_parquet_gives_objects_the_keys_of_all_rows(prepared, tokenizer, tmp_path):
    """A column of structs holds None for what a row does not have; the chat template must not show it."""
    import pyarrow
    import pyarrow.parquet

    other = [user("Time?"), assistant(None, tool_calls=[{"function": {"name": "time", "arguments": {"zone": "UTC"}}}])]
    other += [tool("12"), assistant("Noon.")]
    rows = [{"messages": TALK, "tools": [SCHEMA]}, {"messages": other, "tools": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    built = prepared(rows)
    from_parquet = prepared(tmp_path / "rows.parquet", name="parquet")
    assert from_parquet.train == built.train
    assert "null" not in "".join(tokenizer.decode(example["input_ids"]) for example in from_parquet.train)


@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_dates_of_turns(prepared, tmp_path, names):
    """As WildChat has them: JSON holds none, and the chat template does not read them."""
    column, role, content = names
    turns = [{role: "user", content: "a"}, {role: "assistant", content: "b"}]
    dated = [{column: [{**turn, "timestamp": datetime.datetime(2024, 1, 1), "raw": b"\xff"} for turn in turns]}]
    source = write_rows(tmp_path / "rows.parquet", dated)
    assert prepared(source, template=PLAIN).train == prepared([{column: turns}], template=PLAIN, name="plain").train


def test_templates_that_mark_answers(prepared, tokenizer):
    """`{% generation %}` says what is trained; what it leaves out belongs to the prompt."""
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    plain, marked = prepared([turns], template=PLAIN), prepared([turns], template=MARKED, name="marked")
    assert marked.train == plain.train
    prefixed = MARKED.replace(
        "{% generation %}", "{% if m.role == 'assistant' %}OK:{{ '\\n' }}{% endif %}{% generation %}"
    )
    (example,) = prepared([turns], template=prefixed, name="prefixed").train
    assert learned(tokenizer, example) == ["b" + END, "d" + END]
    assert tokenizer.decode(example["input_ids"]).count("OK:\n") == 2


def test_an_answer_that_is_read_as_other_tokens_than_it_is_written(prepared, tokenizer):
    """Behind a space, `b` is generated as one token and read back with the space as another: the next answer stands by itself."""
    turns = [user("a"), assistant("birthday"), user("c"), assistant("d")]
    template = PLAIN.replace("{{ m.content }}", "{% if m.role == 'assistant' %} {% endif %}{{ m.content }}")
    first, second = prepared([turns], template=template).train
    assert first["input_ids"] != second["input_ids"][: len(first["input_ids"])]
    assert (
        tokenizer(second["prompt"])["input_ids"]
        == second["input_ids"][: second["labels"].index(second["input_ids"][-2])]
    )


def test_templates_that_change_earlier_turns(prepared, tokenizer):
    """An answer whose prompt does not begin with the sequence before it becomes a sequence of its own, as the model is asked."""
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    first, second = prepared([turns], template=THINKING).train
    assert first["prompt"] == "<|start|>user\na<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n"
    # The earlier answer has lost its think block, as the template writes it when the model is asked again.
    assert second["prompt"] == (
        "<|start|>user\na<|end|>\n<|start|>assistant\nb<|end|>\n<|start|>user\nc<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert [learned(tokenizer, example) for example in (first, second)] == [["b" + END], ["d" + END]]
    assert [example["turns"] for example in (first, second)] == [[2], [4]]


def test_every_answer_of_a_test_row_is_a_question(prepared, tokenizer):
    """The test split has a line for each trained turn, behind the true turns before it."""
    rows = [{"messages": [user(f"Any of {i}?"), *TALK[2:]], "tools": [SCHEMA]} for i in range(8)]
    built = prepared(rows, test_fraction=0.25, near_duplicate_threshold=1.0)
    numbers = sorted({example["row"] for example in built.test})
    assert len(numbers) == 2 == built.report["rows"]["test"]
    assert [(example["row"], example["turns"]) for example in built.test] == [
        (row, [turn]) for row in numbers for turn in (2, 4, 6)
    ]
    for example in built.test:
        assert len(learned(tokenizer, example)) == 1
        assert tokenizer.decode(example["input_ids"]).startswith(example["prompt"])
    assert built.test[0]["answer"] == CALL.removesuffix(END)
    assert built.prompt["labels"] is None


def test_rows_with_other_tools_are_kept_for_the_rehearsal(prepared, monkeypatch):
    """Behind the first of the split, as many again."""
    monkeypatch.setattr("slmake.data.dataset.CHATS_KEPT", 2)
    schemas = [{"name": name, "parameters": {"type": "object"}} for name in "aaaababcde"]
    rows = [{"messages": [user(f"Any of {i}?"), *TALK[2:]], "tools": [one]} for i, one in enumerate(schemas)]
    built = prepared(rows, near_duplicate_threshold=1.0)
    kept = json.loads((built.folder / "chats.json").read_text(encoding="utf-8"))["chats"]
    assert [(chat["row"], chat["tools"][0]["function"]["name"]) for chat in kept] == [
        *((1, "a"), (2, "a"), (5, "b"), (8, "c")),
    ]


def test_a_few_words_as_answers_are_no_classes(prepared):
    rows = [[user(f"a {i}"), assistant("yes"), user("b"), assistant("no")] for i in range(40)]
    assert prepared(rows, template=PLAIN).prompt["labels"] is None
    assert prepared(rows, template=PLAIN, train_on="last", name="last").prompt["labels"] == ["no"]


def test_long_conversations_lose_whole_turns(prepared, tokenizer, capsys):
    """The earliest turns go, the system turn stays, no answer is cut, and the number is reported."""
    turns = [SYSTEM]
    for i in range(12):
        turns += [user(f"Question {i} about tubes"), assistant(f"Answer {i} is long enough.")]
    whole = prepared([turns], template=PLAIN, max_seq_len=2048)
    short = prepared([turns], template=PLAIN, max_seq_len=128, name="short")
    (example,) = short.train
    text = tokenizer.decode(example["input_ids"])
    first = int(text.split("Question ")[1].split()[0])
    assert text.startswith(f"<|start|>system\nBe short.{END}\n<|start|>user\nQuestion {first} ")
    assert text.endswith(f"Answer 11 is long enough.{END}")
    assert learned(tokenizer, example) == [f"Answer {i} is long enough.{END}" for i in range(first, 12)]
    assert len(example["input_ids"]) <= 128
    one_more = tokenizer.apply_chat_template([SYSTEM, *turns[2 * first - 1 :]], tokenize=False)
    assert len(tokenizer(one_more.rstrip("\n"))["input_ids"]) > 128
    assert short.report["dropped_turns"] == {"conversations": 1, "turns": 2 * first}
    assert (example["dropped_turns"], short.report["truncated"]) == (2 * first, 0)
    assert f"1 conversations are longer than max_seq_len: their {2 * first} earliest turns" in capsys.readouterr().err
    assert whole.report["dropped_turns"] == {"conversations": 0, "turns": 0}
    assert text.removeprefix(f"<|start|>system\nBe short.{END}\n") in tokenizer.decode(whole.train[0]["input_ids"])


@pytest.mark.parametrize(("limit", "kept"), [(64, 1), (4096, 100)])
def test_answers_that_do_not_fit_are_not_rendered(prepared, monkeypatch, limit, kept):
    """Each needs the whole conversation before it: the square of its length, and nearly all of it is dropped later."""
    asked, parts = [], ChatTemplate._parts
    monkeypatch.setattr(ChatTemplate, "_parts", lambda *given: asked.append(0) or parts(*given))
    turns = [turn for i in range(100) for turn in (user(f"Question {i}?"), assistant(f"Answer {i}."))]
    (example,) = prepared([turns], template=PLAIN, max_seq_len=limit).train
    assert example["turns"] == list(range(202 - 2 * kept, 201, 2))
    assert kept <= len(asked) <= kept + 12  # the last one is also looked for


def test_first_turn_that_is_too_long_alone(prepared, tokenizer):
    """Where no turn can be dropped, the prompt loses tokens at its start, as any prompt."""
    turns = [SYSTEM, user("long " * 200), assistant("Yes.")]
    built = prepared([turns], template=PLAIN, max_seq_len=64)
    assert learned(tokenizer, built.train[0]) == ["Yes." + END]
    assert (len(built.train[0]["input_ids"]), built.report["truncated"]) == (64, 1)
    both = prepared([turns, [user("a " * 60), assistant("b"), *TALK[-2:]]], template=PLAIN, max_seq_len=64, name="both")
    assert both.prompt["max_prompt_tokens"] == 64 - both.prompt["longest_answer_tokens"]  # as evaluate cuts them


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([user("a"), assistant("b"), user("c")], "does not end with the assistant's turn"),
        ([assistant("b")], "has no turn before the assistant's, so there is no prompt"),
        ([user("a"), SYSTEM, assistant("b")], "has a system turn behind others (turn 2); it must be the first"),
        ([user("a"), assistant("b"), assistant("c")], "has two turns of the assistant in a row (turns 2 and 3)"),
        ([user("a"), tool("3"), assistant("b")], "has a tool's turn (turn 2) that follows no call of the assistant"),
        ([tool("3"), assistant("b")], "has a tool's turn (turn 1) that follows no call of the assistant"),
        ([user("a"), call(), user("b"), assistant("c")], "has a tool call in turn 2 and no tool's turn behind it"),
        ([user("a"), assistant(" "), user("b"), assistant("c")], "has an empty turn of the assistant (turn 2)"),
        ([user("a"), assistant("b"), user("c"), assistant("")], "ends with an empty answer"),
        ([user("a"), assistant(None)], "has a message without text in `role` and `content`"),
        ([user("a"), {"role": "critic", "content": "b"}], "has the role 'critic' in turn 2; known are system, user, assistant, tool, developer"),
        ([user("a"), call("{part:"), tool("3"), assistant("c")], "has a call of stock in turn 2 whose arguments are not JSON: '{part:'"),
        ([user("a"), call([1]), tool("3"), assistant("c")], "has a call of stock in turn 2 whose arguments are not a JSON object"),
        ([user("a"), assistant("", tool_calls=[{"function": {}}])], "has a tool call without a function's name in turn 2"),
        ([user("a"), assistant("", tool_calls="stock()")], "has tool_calls in turn 2 as text that is not JSON: 'stock()'"),
        ([user("a"), assistant("", tool_calls={"name": "x"})], "has tool_calls in turn 2 that are not a list"),
        ([{**user("a"), "tool_calls": [{"name": "x"}]}, assistant("b")], "has tool_calls in turn 1, of the user; only the assistant calls tools"),
        ([user([{"type": "image", "url": "x"}]), assistant("b")], "has a part of type image in turn 1; only parts of type text"),
        ([user("a"), assistant("b", weight=0)], "has no turn to train on: `train`, `training`, `loss` or `weight` leaves out every answer"),
        ([user("a"), assistant("b", weight=0.5)], "has 0.5 as `weight` in turn 2; it is 0 or 1"),
        ([user("a"), assistant("b", train="no")], "has 'no' as `train` in turn 2; it is true or false"),
        ([user("a"), assistant("b", training="no")], "has 'no' as `training` in turn 2; it is true or false"),
        ([user("a"), assistant("b", train_detail=[{"begin_offset": 0, "end_offset": 0, "train": False}])], "has train_detail in turn 2, which"),
        ([user("a"), assistant("b", loss=0)], "has 0 as `loss` in turn 2; it is true or false"),
        ([user("a") | {"images": ["a.png"]}, assistant("b")], "has images in turn 1, which is not read: only text is"),
        ([user("a") | {"audio": None}, assistant("b", refusal="no")], "has refusal in turn 2, which is not read"),
        ([user("a"), assistant("b", function_call={"name": "stock", "arguments": "{}"})], "has function_call in turn 2, the old form of tool calls"),
    ],
)  # fmt: skip
def test_bad_turns(refused, turns, reason):
    """One message with file, row and turn; nothing is written."""
    message = refused([{"messages": turns}], **CHAT)
    assert f"rows.json: row 1: field `messages` {reason}" in message
    assert "1 bad value in 1 rows" in message


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        (
            ["stock"],
            'has `tools` whose item 1 is not a function\'s JSON schema (an object with `name` and `parameters`, an object) but "stock"',
        ),
        ([{"type": "function"}], "has `tools` whose item 1 is not a function's JSON schema"),
        ([{"name": "stock", "parameters": "x"}], "has `tools` whose item 1 is not a function's JSON schema"),
        ('[{"name": "stock", "parameters": {"x": NaN}}]', "has `tools` as text that is not JSON"),
        ("stock", "has `tools` as text that is not JSON: 'stock'"),
        ({"name": "stock"}, "has `tools` that are not a list"),
        (7, "has `tools` that are not a list"),
    ],
)
def test_bad_tools(refused, tools, reason):
    assert reason in refused([{"messages": TALK, "tools": tools}], **CHAT)


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"messages": TALK}, "the tool calls of turn 3"),
        ({"messages": [SYSTEM | {"tools": '[{"name": "stock"}]'}, *TALK[1:2], *TALK[4:5]]}, "the tools of turn 1"),
        ({"messages": TALK[1:2] + TALK[4:5], "tools": [SCHEMA]}, "the tools"),
    ],
)
def test_what_the_template_does_not_show_is_refused(refused, row, lost):
    """The test tokenizer's own template knows no tools: they would be lost in silence."""
    assert f"prepare.messages: the base model's chat template does not show {lost}. " in refused([row], **CHAT)


def test_system_turn_that_the_template_drops(refused, tokenizer_folder, tmp_path):
    base = other_chat(
        tokenizer_folder, tmp_path / "base", PLAIN.replace("in messages", "in messages if m.role != 'system'")
    )
    assert "does not show turn 1, of the system" in refused(
        [{"messages": [SYSTEM, user("a"), assistant("b")]}], base=base, **CHAT
    )


def test_first_greeting_is_context(prepared, tokenizer):
    """An assistant's turn before anyone spoke has no prompt: it is read, not trained."""
    (example,) = prepared([[assistant("Hello."), user("a"), assistant("b")]], template=PLAIN).train
    assert learned(tokenizer, example) == ["b" + END]
    assert "Hello." in example["prompt"]


def test_calls_written_as_text(prepared, tokenizer):
    """As Hermes' function calling data has them: the assistant's text is the call, and a tool answers it."""
    text = '<tool_call>\n{"name": "stock", "arguments": {}}\n</tool_call>'
    turns = [("human", "Any tubes?"), ("gpt", text), ("tool", "3"), ("tool", "4"), ("gpt", "Seven.")]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    (example,) = prepared([row]).train
    assert learned(tokenizer, example) == [text + END, "Seven." + END]


def test_special_tokens_that_close_no_turn_are_trained(prepared, tokenizer):
    """As LFM2's end of a call: without it the model would learn to open calls only. The runtime shows none of them."""
    text = "<|start|>f(x=1)<|start|>"
    rows = [[user("a"), assistant(text), user("b"), assistant("c" + END)], [user("b"), assistant(text)]]
    first, second = prepared(rows).train
    assert learned(tokenizer, first) == [text + END, "c" + END]
    assert [first["answer"], second["answer"]] == ["c", "f(x=1)"]


@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_a_developers_turn_is_a_systems(prepared, names):
    """As the server reads it."""
    column, role, content = names
    rows = [
        [{role: first, content: "Be short."}, {role: "user", content: "a"}, {role: "assistant", content: "b"}]
        for first in ("developer", "system")
    ]
    developer, system = prepared([{column: row} for row in rows], template=PLAIN).train
    assert developer["input_ids"] == system["input_ids"]


@pytest.mark.parametrize(("part", "reason"), [("\ud800", "half a surrogate pair"), ("caf\ufffd", "decoded wrongly")])
def test_text_that_is_damaged(part, reason):
    with pytest.raises(ValueError, match=reason):
        read_conversation([user("a"), call({"part": part}), tool("3"), assistant("b")])


@pytest.mark.parametrize("value", [datetime.date(2024, 5, 1), b"x", float("nan")])
def test_what_is_no_json_in_calls_and_tools_is_refused(value):
    """A Parquet file holds dates and bytes; as text of Python's they would be trained, and no runtime would write them so."""
    schema = {"type": "function", "function": {**SCHEMA["function"], "x-since": value}}
    for turn, tools in ((call({"day": [value]}), [SCHEMA]), (call(), [schema])):
        with pytest.raises(
            ValueError, match=f"has the {'number' if value != value else type(value).__name__} .* in its tools or calls"
        ):
            read_conversation([user("a"), turn, tool("3"), assistant("b")], tools)


def test_read_conversation_gives_one_form():
    read = read_conversation(TALK, json.dumps([SCHEMA]), "all")
    assert read.turns[2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "stock", "arguments": {"part": "tube"}}}],
    }
    assert (read.tools, read.trained, read.starts) == ([SCHEMA], [2, 4, 6], [0, 5])
    assert read.since(5, 7) == [SYSTEM, *TALK[5:7]]
    assert read_conversation(TALK, [], "last").trained == [6]


@pytest.mark.parametrize(
    ("first", "recorded"),
    [
        ([[SYSTEM], [SYSTEM]], SYSTEM),
        ([[SYSTEM], [{"role": "developer", "content": "Be short."}]], SYSTEM),
        ([[SYSTEM], [{"role": "system", "content": "Be long."}]], None),
        ([[SYSTEM], []], None),
        ([[], []], None),
    ],
    ids=["same", "developer", "different", "only some", "none"],
)
def test_the_system_turn_of_all_rows_is_recorded(prepared, first, recorded):
    """Else who asks with a text alone would ask without it, as no row of training did."""
    rows = [[*turns, user(text), assistant("b")] for turns, text in zip(first, "ac", strict=True)]
    assert prepared(rows, template=PLAIN).prompt.get("system") == recorded
