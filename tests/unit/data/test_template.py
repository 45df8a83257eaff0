"""From rows to prompts and answers: text templates, chats, and bad values."""

import contextlib
import json

import pytest
from prepared import CHAT, END, WHOLE, other_chat, write_rows
from tiny import make_rows


def test_braces_in_a_text_template(build):
    built = build(make_rows(24), text_template='{{"text": "{phrase}", "tone": }}\n{tone}', **WHOLE)
    phrase = make_rows(1)[0]["phrase"]
    assert built.train[0]["prompt"] == f'{{"text": "{phrase}", "tone": }}\n'


def test_literal_braces_around_the_answers_name(build):
    """`{{tone}}` is the text {tone}, not the place of the answer."""
    built = build(make_rows(24), text_template="Write {{tone}} for {phrase}: {tone}", **WHOLE)
    assert built.train[0]["prompt"] == f"Write {{tone}} for {make_rows(1)[0]['phrase']}: "
    assert built.train[0]["answer"] == "sadness"


def test_braces_in_rows_are_text(build):
    rows = [{**row, "phrase": row["phrase"] + " {tone} {0} }{"} for row in make_rows(24)]
    assert build(rows, **WHOLE).train[0]["prompt"] == f"### Text: {rows[0]['phrase']}\n### The tone is:\n"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"text_template": "{phrase} {"},
            "prepare.text_template: Single '{' encountered in format string. Write {{ and }}",
        ),
        ({"text_template": "{phrase!r} {tone}"}, "`{phrase!r}` is not a plain field name such as {phrase}."),
        ({"text_template": "{phrase:>10} {tone}"}, "`{phrase:>10}` is not a plain field name such as {phrase}."),
        ({"text_template": "{phrase} {phrase:} {tone}"}, "`{phrase:}` is not a plain field name such as {phrase}."),
        ({"text_template": "\ud83d {phrase} {tone}"}, "prepare.text_template: holds half a surrogate pair"),
        ({"text_template": "{0} {tone}"}, "prepare.text_template: `{0}` is not a plain field name such as {phrase}."),
        ({"text_template": "no field"}, "prepare.text_template: no placeholder such as {phrase} in it."),
        ({"text_template": "{phrase}"}, "nothing stands before the answer, so there is no prompt."),
        (
            {"answer": "mood"},
            "prepare.answer: `mood` is not a placeholder of text_template. Placeholders: phrase, tone.",
        ),
    ],
)
def test_template_errors(refused, fields, reason):
    assert reason in refused(make_rows(24), **fields)


def test_answer_never_stands_in_the_prompt(build):
    """`{tone:}` with an empty format is either the answer's place or refused; it must not leak into the prompt."""
    with contextlib.suppress(SystemExit):
        built = build(make_rows(24), text_template="{phrase} {tone:}", **WHOLE)
        assert built.train[0]["prompt"] == make_rows(1)[0]["phrase"] + " "


MESSAGES = [
    {"role": "system", "content": 'Answer with one word, such as {{"joy"}}.'},
    {"role": "user", "content": "Tone of: {phrase}"},
    {"role": "assistant", "content": "{tone}"},
]


def test_messages_as_templates(build, tokenizer):
    """The chat template frames the turns; the loss is on the assistant's turn and ends with one end token."""
    rows = make_rows(96)
    built = build(rows, messages=MESSAGES, **CHAT)
    for example in built.train + built.test:
        row = rows[example["row"] - 1]
        assert example["prompt"] == (
            '<|start|>system\nAnswer with one word, such as {"joy"}.<|end|>\n'
            f"<|start|>user\nTone of: {row['phrase']}<|end|>\n<|start|>assistant\n"
        )
        labels = example["labels"]
        start = next(i for i, label in enumerate(labels) if label != -100)
        assert tokenizer.decode(example["input_ids"][:start]) == example["prompt"]
        assert tokenizer.decode(labels[start:]) == row["tone"] + "<|end|>"
        assert labels[-1] == END
        assert labels.count(END) == 1
    assert built.prompt["add_special_tokens"] is False
    assert built.prompt["fields"] == ["phrase"]


def test_inference_fills_the_chat_prompt_alike(build):
    built = build(make_rows(96), messages=MESSAGES, **CHAT)
    example = built.test[0]
    phrase = make_rows(96)[example["row"] - 1]["phrase"]
    assert built.prompt["prompt"].format(phrase=phrase) == example["prompt"]


def test_braces_of_the_chat_template_survive(build, tmp_path, tokenizer_folder):
    """Braces that the chat template writes, that a content escapes and that a row holds all come out as they are."""
    chat = "{% for m in messages %}{{ '{' + m['role'] + '}' }}{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}{{ '{assistant}' }}{% endif %}"
    base = other_chat(tokenizer_folder, tmp_path / "base", chat)
    rows = [{**row, "phrase": "{x} " + row["phrase"]} for row in make_rows(24)]
    messages = [{"role": "user", "content": "{{json}} {phrase}"}, {"role": "assistant", "content": "{tone}"}]
    built = build(rows, base=base, messages=messages, **CHAT, **WHOLE)
    assert built.train[0]["prompt"] == "{user}{json} " + rows[0]["phrase"] + "<|end|>{assistant}"


def chat_rows(count: int) -> list[dict]:
    """Rows with a column of messages: every second one has two rounds."""
    rows = []
    for i, row in enumerate(make_rows(count)):
        earlier = [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "Hi {name}"}] * (i % 2)
        turns = [{"role": "user", "content": row["phrase"]}, {"role": "assistant", "content": row["tone"]}]
        rows.append({"turns": earlier + turns, "id": str(i)})
    return rows


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_messages_as_a_column(build, tokenizer, tmp_path, ending):
    """With `train_on: last`, only the last assistant turn is trained on, whatever the number of turns."""
    rows = chat_rows(24)
    built = build(write_rows(tmp_path / f"rows{ending}", rows), messages="turns", train_on="last", **CHAT, **WHOLE)
    assert len(built.train) == 24
    phrase = rows[1]["turns"][2]["content"]
    assert built.train[1]["prompt"] == (
        "<|start|>user\nHello 1<|end|>\n<|start|>assistant\nHi {name}<|end|>\n"
        f"<|start|>user\n{phrase}<|end|>\n<|start|>assistant\n"
    )
    for example, row in zip(built.train, rows, strict=True):
        scored = [label for label in example["labels"] if label != -100]
        assert tokenizer.decode(scored) == row["turns"][-1]["content"] + "<|end|>"
        assert tokenizer.decode(example["input_ids"][: -len(scored)]) == example["prompt"]
    assert built.prompt["prompt"] is None


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("Hello", "field `turns` is not a list of messages"),
        ([], "field `turns` is not a list of messages"),
        ([{"role": "user"}], "field `turns` has a message without text in `role` and `content`"),
        ([{"role": "user", "content": "Hi"}], "field `turns` does not end with the assistant's turn"),
        ([{"role": "assistant", "content": " "}], "field `turns` ends with an empty answer"),
        ([{"role": "assistant", "content": "Hi"}], "field `turns` has no turn before the assistant's"),
        ("", "field `turns` is not a list of messages"),
    ],
)
def test_bad_messages_are_named(refused, tmp_path, turns, reason):
    rows = chat_rows(24)
    rows[7]["turns"] = turns
    source = write_rows(tmp_path / "rows.json", rows)
    assert f"  {source}: row 8: {reason}" in refused(source, messages="turns", **CHAT)


def test_half_a_surrogate_pair_in_messages(refused, tmp_path):
    rows = chat_rows(24)
    rows[7]["turns"][0]["content"] = "\ud83d"
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    message = refused(source, messages="turns", **CHAT)
    assert f"  {source}: row 8: field `turns` holds half a surrogate pair" in message


def test_turns_that_the_chat_template_does_not_take(refused, tmp_path, tokenizer_folder):
    """Told with the row, for a column; with the parameter, for templates."""
    picky = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}{{ messages }}"
    )
    base = other_chat(tokenizer_folder, tmp_path / "base", picky)
    rows = chat_rows(24)
    rows[0]["turns"] = [{"role": "system", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    source = write_rows(tmp_path / "rows.json", rows[:1])
    message = refused(source, base=base, messages="turns", **CHAT)
    assert (
        f"  {source}: row 1: field `turns`: the base model's chat template does not take it: the user must" in message
    )
    messages = [{"role": "system", "content": "{phrase}"}, {"role": "assistant", "content": "{tone}"}]
    message = refused(make_rows(24), base=base, messages=messages, **CHAT)
    assert message == "prepare.messages: the base model's chat template does not take it: the user must begin"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("", "prepare.messages: an empty name. Name the column"),
        ([{"role": "assistant", "content": "{tone}"}], "prepare.messages: nothing stands before the answer"),
    ],
)
def test_messages_without_a_prompt(refused, messages, reason):
    assert refused(make_rows(24), messages=messages, **CHAT).startswith(reason)


def test_messages_need_a_chat_template(refused, tmp_path, tokenizer_folder):
    base = other_chat(tokenizer_folder, tmp_path / "base", None)
    message = refused(make_rows(24), base=base, messages=MESSAGES, **CHAT)
    assert message == "prepare.messages: the base model's tokenizer has no chat template. Use text_template instead."


def test_chat_template_that_rewrites_earlier_turns(refused, tmp_path, tokenizer_folder):
    """Prompt and answer cannot be separated if the template changes the prompt when the answer is added."""
    base = other_chat(tokenizer_folder, tmp_path / "base", "{{ messages | length }}{{ messages[-1]['content'] }}")
    message = refused(make_rows(24), base=base, messages=MESSAGES, **CHAT)
    assert message.startswith("prepare.messages: this chat template changes earlier turns when the answer is added.")


def test_error_in_a_message_names_messages(refused):
    messages = [{"role": "user", "content": "{the phrase}"}, {"role": "assistant", "content": "{tone}"}]
    message = refused(make_rows(24), messages=messages, **CHAT)
    assert "prepare.messages: `{the phrase}` is not a plain field name" in message


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": 1}, 'field `tone` is dict, not text: {"a": 1}'),
        (["joy"], 'field `tone` is list, not text: ["joy"]'),
        ("", "field `tone` is an empty answer"),
        (" \n", "field `tone` is an empty answer"),
        (None, "field `tone` is missing"),
        (
            "j\ufffdy",
            "field `tone` holds the replacement character U+FFFD: text that was not UTF-8 was decoded wrongly",
        ),
    ],
)
def test_bad_value(refused, tmp_path, ending, value, reason):
    """One bad value among 24 rows is reported with its file, row and field."""
    rows = make_rows(24)
    rows[16]["tone"] = value
    source = write_rows(tmp_path / f"rows{ending}", rows)
    assert refused(source) == (
        f"{source}: 1 bad value in 24 rows; correct them and run again.\n  {source}: row 17: {reason}"
    )


def test_numbers_are_labels_and_no_prompts(build, refused, tmp_path):
    """Numbers and truth values are fine as answers, in every format that has them; in a prompt they are an error."""
    values = [0, 1, True, False, 2.5]
    rows = [{**row, "tone": values[i % 5]} for i, row in enumerate(make_rows(30))]
    built = build(rows, name="numbers", **WHOLE)
    assert [row["answer"] for row in built.train[:5]] == ["0", "1", "true", "false", "2.5"]
    source = write_rows(tmp_path / "rows.parquet", [{"phrase": i, "tone": "x"} for i in range(2)])
    message = refused(source)
    assert message.startswith(f"{source}: 2 bad values in 2 rows; correct them and run again.")
    assert f"  {source}: row 2: field `phrase` is int, not text: 1" in message


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_missing_fields_are_named_row_by_row(refused, tmp_path, ending):
    rows = make_rows(30)
    for number in (3, 4, 29):
        del rows[number - 1]["tone"]
    del rows[3]["phrase"]
    source = write_rows(tmp_path / f"rows{ending}", rows)
    assert refused(source).splitlines() == [
        f"{source}: 4 bad values in 30 rows; correct them and run again.",
        f"  {source}: row 3: field `tone` is missing",
        f"  {source}: row 4: field `phrase` is missing",
        f"  {source}: row 4: field `tone` is missing",
        f"  {source}: row 29: field `tone` is missing",
    ]


def test_long_lists_of_bad_rows_are_cut(refused, tmp_path):
    rows = make_rows(30)
    for row in rows[5:]:
        del row["tone"]
    source = write_rows(tmp_path / "rows.json", rows)
    message = refused(source).splitlines()
    assert message[0] == f"{source}: 25 bad values in 30 rows; correct them and run again."
    assert message[1:21] == [f"  {source}: row {number}: field `tone` is missing" for number in range(6, 26)]
    assert message[21:] == ["  and 5 more"]


def test_field_that_no_row_has(refused, tmp_path):
    source = write_rows(tmp_path / "rows.json", [{"phrase": row["phrase"], "tones": "x"} for row in make_rows(24)])
    assert refused(source) == (
        f"{source}: the template's field `tone` is in no row. Fields there: phrase, tones. Did you mean `tones`?"
    )


def test_a_field_that_is_null_everywhere_is_called_so(refused, tmp_path):
    rows = [{"phrase": row["phrase"], "tone": None} for row in make_rows(24)]
    source = write_rows(tmp_path / "rows.parquet", rows)
    assert (
        refused(source) == f"{source}: the template's field `tone` has no value in any row: all are null. Fill it in."
    )
