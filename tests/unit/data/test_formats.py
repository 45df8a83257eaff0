"""The usual layouts of chats and instructions, detected from the rows or named."""

import json

import pytest
from prepared import CHAT, WHOLE, other_chat, write_rows
from tiny import make_rows

from slmake.data.conversation import refuse_unread
from slmake.data.formats import alpaca_fields, alpaca_turns

ROWS = make_rows(24)
LAYOUTS = {
    "messages": [
        {"messages": [{"role": "user", "content": row["phrase"]}, {"role": "assistant", "content": row["tone"]}]}
        for row in ROWS
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": row["phrase"]}, {"from": "gpt", "value": row["tone"]}], "id": "x"}
        for row in ROWS
    ],
    "alpaca": [{"instruction": row["phrase"], "input": "", "output": row["tone"]} for row in ROWS],
    "prompt_completion": [
        {
            "prompt": [{"role": "user", "content": row["phrase"]}],
            "completion": [{"role": "assistant", "content": row["tone"]}],
        }
        for row in ROWS
    ],
}
NONE = {"messages": None, **CHAT}


@pytest.fixture
def plain(tokenizer_folder, tmp_path):
    """The test tokenizer without a chat template."""
    return other_chat(tokenizer_folder, tmp_path / "plain", None)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_chats(build, tokenizer, tmp_path, capsys, layout, ending):
    """Detected or named: the same prompts and answers, and one line that says what was detected."""
    source = write_rows(tmp_path / f"rows{ending}", LAYOUTS[layout])
    built = build(source, **NONE, **WHOLE)
    assert f"prepare: the rows are read as {layout} (prepare.format)\n" in capsys.readouterr().err
    for example, row in zip(built.train, ROWS, strict=True):
        assert example["prompt"] == f"<|start|>user\n{row['phrase']}<|end|>\n<|start|>assistant\n"
        assert tokenizer.decode([label for label in example["labels"] if label != -100]) == f"{row['tone']}<|end|>"
    named = build(source, name="named", format=layout, **NONE, **WHOLE)
    assert "the rows are read as" not in capsys.readouterr().err
    assert (named.folder / "train.parquet").read_bytes() == (built.folder / "train.parquet").read_bytes()


@pytest.mark.parametrize("layout", ["messages", "sharegpt", "prompt_completion"])
def test_conversations_as_json_text(build, tmp_path, layout):
    """As a CSV file holds them."""
    texts = [
        {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        for row in LAYOUTS[layout]
    ]
    built = build(write_rows(tmp_path / "rows.csv", texts), **NONE, **WHOLE)
    assert built.train == build(LAYOUTS[layout], name="lists", **NONE, **WHOLE).train
    named = build(texts, name="named", format=layout, **NONE, **WHOLE)
    assert named.train == built.train


def test_other_text_is_no_conversation(refused, build):
    """Such as pandas' text of a list; and a prompt that is JSON of something else stays a text."""
    rows = [{"messages": str(row["messages"])} for row in LAYOUTS["messages"]]
    assert "`messages` is text, and no JSON of a list of messages" in refused(rows, **NONE)
    assert "is not a list of messages: it has text that is not JSON: \"[{'role'" in refused(
        rows, format="messages", **NONE
    )
    texts = [{**row, "prompt": json.dumps([{"q": row["prompt"]}])} for row in TEXTS]
    assert build(texts, **NONE, **WHOLE).train[0]["prompt"] == texts[0]["prompt"]


@pytest.mark.parametrize("convert", [alpaca_fields, alpaca_turns])
def test_an_input_alone_is_the_instruction(convert):
    rows = [{"instruction": text, "input": "Do it", "output": "yes"} for text in ("", " ", "Please:")]
    prompts = [row["instruction"] if isinstance(row, dict) else row[0]["content"] for row in map(convert, rows)]
    assert prompts == ["Do it", "Do it", "Please:\n\nDo it"]


def test_inputs_and_system_fields(build):
    """Alpaca's input stands below the instruction where there is one; a system field is the first turn."""
    rows = [
        {"instruction": f"Do {i}", "input": "this" * (i % 2), "output": "yes", "system": "Be short."} for i in range(8)
    ]
    first, second = build(rows, **NONE, **WHOLE).train[:2]
    assert first["prompt"] == "<|start|>system\nBe short.<|end|>\n<|start|>user\nDo 0<|end|>\n<|start|>assistant\n"
    assert "<|start|>user\nDo 1\n\nthis<|end|>" in second["prompt"]


@pytest.mark.parametrize("chat", [True, False])
def test_numbers_as_outputs(build, plain, chat):
    """As text, like the labels of a template."""
    rows = [{"instruction": f"Do {i}", "output": output} for i, output in enumerate([7, 2.5, True, "yes"])]
    built = build(rows, **({} if chat else {"base": plain}), **NONE, **WHOLE)
    assert [row["answer"] for row in built.train] == ["7", "2.5", "true", "yes"]


def test_outputs_that_are_no_text(refused):
    rows = [{"instruction": "Do it", "output": output} for output in ("yes", [1])]
    assert "row 2: field `output` is there, but `output` is not text" in refused(rows, **NONE)


def test_alpaca_without_a_chat_template(build, plain):
    rows = [{"instruction": f"Do {i}", "input": "this" * (i % 2) or None, "output": "yes"} for i in range(8)]
    built = build(rows, base=plain, **NONE, **WHOLE)
    assert built.train[0]["prompt"] == "### Instruction:\nDo 0\n\n### Response:\n"
    assert built.train[1]["prompt"] == "### Instruction:\nDo 1\n\nthis\n\n### Response:\n"
    assert built.prompt["fields"] == ["instruction"]


def test_prompts_and_completions_as_text(build):
    rows = [{"prompt": f"Q: {i}\nA: ", "completion": f"{i + 1}"} for i in range(8)]
    built = build(rows, **NONE, **WHOLE)
    assert (built.train[1]["prompt"], built.train[1]["answer"]) == ("Q: 1\nA: ", "2")
    assert built.prompt["prompt"] == "{prompt}"


def test_earlier_turns_of_an_instruction(build, tokenizer):
    """LLaMA-Factory's `history`: its pairs are turns behind the system's, and their answers are trained, as in any chat."""
    row = {"instruction": "Do it", "output": "yes", "system": "Be short.", "history": [["First?", "no"], ["So?", "ok"]]}
    rows = [row, {**row, "history": []}, {**row, "history": None}]
    first, *others = build(rows, **NONE, **WHOLE).train
    assert first["prompt"] == (
        "<|start|>system\nBe short.<|end|>\n<|start|>user\nFirst?<|end|>\n<|start|>assistant\nno<|end|>\n<|start|>user\nSo?<|end|>\n"
        "<|start|>assistant\nok<|end|>\n<|start|>user\nDo it<|end|>\n<|start|>assistant\n"
    )
    assert first["turns"] == [3, 5, 7]
    assert [example["turns"] for example in others] == [[3], [3]]


@pytest.mark.parametrize("system", ["Be short.", [{"type": "text", "text": "Be short."}]], ids=["text", "parts"])
@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rows_system_text_is_the_first_turn(build, layout, name, system):
    """In every layout of chats; without text in it, the field changes nothing."""
    rows = [{**row, name: text} for row, text in zip(LAYOUTS[layout][:4], (system, None, " ", ""), strict=True)]
    first, *others = build(rows, **NONE, **WHOLE).train
    start = "<|start|>system\nBe short.<|end|>\n<|start|>user\n"
    assert first["prompt"] == f"{start}{ROWS[0]['phrase']}<|end|>\n<|start|>assistant\n"
    assert all(example["prompt"].startswith("<|start|>user\n") for example in others)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_text_that_is_the_first_turn_already(build, role):
    talk = [{"role": role, "content": "Be short."}, *LAYOUTS["messages"][0]["messages"]]
    rows = [{"system": "Be short. ", "system_prompt": "Be short.", "messages": talk}, {"messages": talk}]
    once, alone = build(rows, messages="messages", **CHAT, **WHOLE).train
    assert once["prompt"] == alone["prompt"]
    assert once["prompt"].count("Be short.") == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"system": "Be long."}, "begins with a system turn that differs from `system` of the row. Keep one of them"),
        ({"system": "Be short.", "system_prompt": "Be long."}, "stands beside two system texts that differ, `system` and `system_prompt`."),
        ({"system": {"os": "Linux"}}, 'stands beside `system`, which is not text: {"os": "Linux"}'),
    ],
)  # fmt: skip
def test_system_texts_that_contradict_each_other(refused, more, reason):
    talk = [{"role": "system", "content": "Be short."}, *LAYOUTS["messages"][0]["messages"]]
    assert f"row 1: field `messages` {reason}" in refused([{"messages": talk, **more}], **NONE)


@pytest.mark.parametrize("names", [("instruction", "output"), ("prompt", "completion")])
def test_what_a_text_cannot_hold_of_a_chat(build, refused, plain, names):
    """A system text and tools would be lost; other text in a field of these names is none."""
    rows = [{**dict(zip(names, (f"Do {i}", "yes"), strict=True)), "tools": "hammer", "system": ""} for i in range(4)]
    schema = [{"name": "f", "parameters": {}}]
    for more in (
        {"system": "Be short."},
        {"system_prompt": "Be short."},
        {"tools": schema},
        {"tools": json.dumps(schema)},
    ):
        message = refused([{**row, **more} for row in rows], base=plain, **NONE)
        assert f"row 1: field `{names[1]}` stands beside `{next(iter(more))}`, which would be lost: " in message
    assert len(build(rows, base=plain, **NONE, **WHOLE).train) == 4


@pytest.mark.parametrize("history", [[["First?"]], ["First?"], {"a": 1}])
def test_earlier_turns_that_are_no_pairs(refused, history):
    message = refused([{"instruction": "Do it", "output": "yes", "history": history}], **NONE)
    assert "row 1: field `output` has `history`" in message or "field `output` has a `history`" in message


@pytest.mark.parametrize("names", [("instruction", "output"), ("prompt", "completion")])
def test_earlier_turns_that_a_text_cannot_hold(refused, plain, names):
    row = dict(zip(names, ("Do it", "yes"), strict=True))
    for history in ([["First?", "no"]], '[["First?", "no"]]'):
        message = refused([{**row, "history": history}], base=plain, **NONE)
        assert (
            f"row 1: field `{names[1]}` stands beside `history`, which would be lost: these rows become plain text."
            in message
        )


@pytest.mark.parametrize("with_chat", [True, False])
def test_a_text_called_history_is_no_turn(build, plain, with_chat):
    rows = [{"instruction": f"Do {i}", "output": "yes", "history": "User: hi"} for i in range(4)]
    built = build(rows, base=None if with_chat else plain, **NONE, **WHOLE)
    assert "User: hi" not in built.train[0]["prompt"]


TEXTS = [{"prompt": f"Q: {row['phrase']}\nA: ", "completion": row["tone"]} for row in ROWS]


@pytest.mark.parametrize("mark", ["label", "kto_tag"])
@pytest.mark.parametrize("rows", [*LAYOUTS.values(), TEXTS], ids=[*LAYOUTS, "texts"])
def test_answers_marked_as_bad_are_not_trained(refused, rows, mark):
    """Rows of preferences (KTO), of which a trainer of answers would learn the bad ones, too."""
    marked = [{**row, mark: i % 2 == 0} for i, row in enumerate(rows)]
    message = refused(marked, **NONE)
    assert "12 bad values in 24 rows" in message
    assert (
        f"stands beside `{mark}`: false, which marks a bad answer (KTO), and would be trained. Remove such rows"
        in message
    )


@pytest.mark.parametrize("mark", [0, 0.0, "0", "False", "false ", "FALSE"])
def test_a_bad_answer_is_marked_by_a_number_or_text_too(mark):
    """As CSV holds truth values, and as some datasets write them."""
    with pytest.raises(ValueError, match="which marks a bad answer"):
        refuse_unread({"label": mark})


def test_labels_that_mark_no_bad_answer(build):
    """Accepted: good answers only, labels that are other text, and truth values that are the answer itself."""
    for label in [True, "true", 1, "joy", 2, "", None]:
        refuse_unread({"label": label, "kto_tag": label})
    for i, label in enumerate([True, None]):
        rows = [{**row, "label": label} for row in TEXTS[:4] + TEXTS[8:12]]
        assert len(build(rows, name=f"kept{i}", **NONE, **WHOLE).train) == 8
    rows = [{"phrase": row["phrase"], "label": i % 2 == 0} for i, row in enumerate(ROWS)]
    built = build(rows, name="answers", text_template="{phrase}\n{label}", **WHOLE)
    assert [row["answer"] for row in built.train[:2]] == ["true", "false"]


def test_the_old_form_of_tools_is_refused(refused):
    rows = [{**row, "functions": [{"name": "f", "parameters": {}}]} for row in LAYOUTS["messages"]]
    assert "row 1: field `messages` stands beside `functions`, the old form of `tools`. Write them" in refused(
        rows, **NONE
    )


@pytest.mark.parametrize("name", ["image", "images", "videos", "audio"])
@pytest.mark.parametrize("rows", [*LAYOUTS.values(), TEXTS], ids=[*LAYOUTS, "texts"])
def test_media_are_not_dropped(build, refused, rows, name):
    """A text that asks about a picture is no training example without it; an empty field is none."""
    message = refused([{**row, name: ["x.jpg"]} for row in rows], **NONE)
    assert f"stands beside `{name}`, which is not read: only text is trained. Remove such rows" in message
    assert len(build([{**row, name: []} for row in rows[:4]], **NONE, **WHOLE).train) == 4


def test_documents_beside_a_chat_are_not_dropped(build, refused):
    """A standard variable of chat templates: answers may be drawn from them."""
    rows = [{**row, "documents": [{"title": "t", "text": "the fact"}]} for row in LAYOUTS["messages"]]
    assert "stands beside `documents`, which no chat template is given" in refused(rows, **NONE)
    assert len(build([{**row, "documents": []} for row in rows[:4]], **NONE, **WHOLE).train) == 4


def test_options_of_the_chat_template_are_those_of_all_rows(build, refused):
    """TRL's field of a row: refused where it says something else than params.yaml."""

    def rows(options: object) -> list[dict]:
        return [{**row, "chat_template_kwargs": options} for row in LAYOUTS["messages"][:4]]

    message = refused(rows({"enable_thinking": False}), **NONE)
    assert 'stands beside `chat_template_kwargs` {"enable_thinking": false}, which differ from prepare.' in message
    for i, options in enumerate([{}, None, {"enable_thinking": False}]):
        fields = {"chat_template_kwargs": {"enable_thinking": False, "other": 1}} if options else {}
        assert len(build(rows(options), name=f"kept{i}", **fields, **NONE, **WHOLE).train) == 4


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"train_detail": [{"train": False}]}, "has train_detail in turn 2"),
        ({"reasoning": "Hm."}, "has reasoning in turn 2"),
        ({"images": ["a.png"]}, "has images in turn 2, which is not read: only text is trained"),
        ({"from": ["gpt"]}, "has a turn from ['gpt']; known are human"),
    ],
)
def test_what_turns_of_sharegpt_say_more(refused, more, reason):
    """As in the other layouts of chats."""
    rows = [[row["conversations"][0], {**row["conversations"][1], **more}] for row in LAYOUTS["sharegpt"]]
    named = [{"conversations": row} for row in rows]
    assert f"field `conversations` {reason}" in refused(named, **NONE)


@pytest.mark.parametrize("layout", ["messages", "sharegpt"])
def test_chats_need_a_chat_template(refused, plain, layout):
    assert "tokenizer has no chat template" in refused(LAYOUTS[layout], base=plain, **NONE)


# Templates over nested fields, and words for values


def test_nested_fields(build):
    """`{text.phrase}` is the field of an object, in the prompt and in the answer; prompt.json has plain names."""
    rows = [{"text": {"phrase": row["phrase"]}, "meta": {"tone": row["tone"]}} for row in ROWS]
    built = build(rows, text_template="Q: {text.phrase}\nA: {meta.tone}", **WHOLE)
    assert (built.train[0]["prompt"], built.train[0]["answer"]) == (f"Q: {ROWS[0]['phrase']}\nA: ", ROWS[0]["tone"])
    assert (built.prompt["prompt"], built.prompt["fields"]) == ("Q: {text_phrase}\nA: ", ["text_phrase"])
    named = build(rows, name="named", text_template="Q: {text.phrase}\nA: {meta.tone}", answer="meta.tone", **WHOLE)
    assert (named.folder / "train.parquet").read_bytes() == (built.folder / "train.parquet").read_bytes()


def test_nested_fields_that_are_not_there(refused):
    rows = [{"text": {"phrase": "x"} if i else "plain", "tone": "joy"} for i in range(4)]
    assert "row 1: field `text.phrase` is missing" in refused(rows, text_template="{text.phrase}\n{tone}")
    assert "field `text.phrases` is in no row" in refused(rows, text_template="{text.phrases}\n{tone}")


@pytest.mark.parametrize("value", [int, str, float, lambda i: f"{i}.0"])
def test_words_for_values(build, value):
    """Keys are compared as text; YAML's numbers are fine, and a whole number may be written 1 or 1.0."""
    tones = ["sadness", "joy", "fear", "surprise"]
    rows = [{"phrase": row["phrase"], "tone": value(tones.index(row["tone"]))} for row in ROWS]
    built = build(rows, labels=dict(enumerate(tones)), **WHOLE)
    assert [row["answer"] for row in built.train] == [row["tone"] for row in ROWS]
    assert built.prompt["labels"] == sorted(tones)


def test_words_for_truth_values(build):
    rows = [{"phrase": row["phrase"], "tone": i % 2 == 0} for i, row in enumerate(ROWS)]
    built = build(rows, labels={True: "good", False: "bad"}, **WHOLE)
    assert [row["answer"] for row in built.train[:2]] == ["good", "bad"]


def test_value_without_a_word(refused, tmp_path):
    rows = [{**row, "tone": 1} for row in ROWS]
    rows[4]["tone"] = 7
    message = refused(rows, labels={0: "bad", 1: "good"})
    assert "row 5: field `tone` is '7', which prepare.labels does not name: 0, 1" in message
