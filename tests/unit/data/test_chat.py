"""Chat templates: what belongs to the prompt, dates, variables, and templates that do not end."""

import contextlib
import json
import time

import pytest
from prepared import CHAT, WHOLE, other_chat
from tiny import make_rows

from slmake.bounded_jinja import bounded
from slmake.data.chat import ChatTemplate
from slmake.data.conversation import read_conversation
from slmake.data.tokenize import load_tokenizer
from slmake.errors import UserError

PLAIN = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
# Writes an empty think block before the last answer, as Qwen3 does; `enable_thinking: false` puts it into the generation prompt.
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content }}"
    "\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
DATED = "{{ '<|start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|end|>\n' }}" + PLAIN
BRACKETS = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}<|end|>{% endif %}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Tone of: {phrase}"}, {"role": "assistant", "content": "{tone}"}]


def turns_column(rows: list[dict]) -> list[dict]:
    return [
        {"turns": [{"role": "user", "content": row["phrase"]}, {"role": "assistant", "content": row["tone"]}]}
        for row in rows
    ]


def prefix_of(template: ChatTemplate) -> str:
    """The answer prefix of a dataset of one plain conversation."""
    template.learn(read_conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "joy"}]))
    return template.answer_prefix


@pytest.fixture
def chat(tokenizer_folder, tmp_path, tokenizer):
    """A chat template over the test tokenizer: chat(template, options, date)."""
    from slmake.data.tokenize import load_tokenizer

    def make(template: str, options: dict | None = None, date: str = "2024-01-01") -> ChatTemplate:
        folder = other_chat(tokenizer_folder, tmp_path / f"base{len(list(tmp_path.iterdir()))}", template)
        return ChatTemplate(load_tokenizer(folder), options or {}, date)

    return make


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("column", [False, True])
def test_think_block_belongs_to_the_prompt(build, tokenizer, tmp_path, tokenizer_folder, options, column):
    """The trained answer is the label and what closes the turn, however the rows are given."""
    base = other_chat(tokenizer_folder, tmp_path / "base", THINKING)
    rows = make_rows(24)
    given = {"messages": "turns", **CHAT} if column else {"messages": MESSAGES, **CHAT}
    built = build(turns_column(rows) if column else rows, base=base, chat_template_kwargs=options, **given, **WHOLE)
    for example, row in zip(built.train, rows, strict=True):
        assert example["prompt"].endswith("<|start|>assistant\n<think>\n\n</think>\n\n")
        assert tokenizer.decode([label for label in example["labels"] if label != -100]) == f"{row['tone']}<|end|>"
    chat = built.prompt["chat"]
    assert (chat["template_kwargs"], chat["date"]) == (options, "2024-01-01")
    if column:
        assert chat["answer_prefix"] == ("" if options else "<think>\n\n</think>\n\n")
    else:
        assert built.prompt["prompt"].endswith("<think>\n\n</think>\n\n")


def test_reasoning_of_the_data_stays_in_the_answer(chat):
    """Only what the template writes by itself belongs to the prompt."""
    question = {"role": "user", "content": "?"}
    head, answer = chat(THINKING).split([question, {"role": "assistant", "content": "<think>so</think>joy"}])
    assert head == "<|start|>user\n?<|end|>\n<|start|>assistant\n"
    assert answer == "<think>\nso\n</think>\n\njoy<|end|>"


THOUGHT = "<think>\nso\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"


def thinking_rows(thinks, turns: int = 1) -> list[dict]:
    """Conversations of some turns, of which the answers that `thinks(row, turn)` names begin with a thought."""
    rows = []
    for number, row in enumerate(make_rows(24)):
        answers = [(THOUGHT if thinks(number, turn) else "") + row["tone"] for turn in range(turns)]
        pairs = [[("user", f"{row['phrase']} {turn}"), ("assistant", text)] for turn, text in enumerate(answers)]
        rows.append({"turns": [{"role": role, "content": text} for pair in pairs for role, text in pair]})
    return rows


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize(
    ("thinks", "prefix"),
    [
        (lambda *_: False, EMPTY),
        (lambda *_: True, ""),
        (lambda row, turn: row % 2, ""),
        (lambda row, turn: (row, turn) == (23, 0), ""),
        (lambda row, turn: (row, turn) != (23, 0), ""),
    ],
    ids=["none", "all", "half", "one", "all-but-one"],
)
def test_one_prompt_for_answers_with_and_without_a_thought(
    build, tokenizer, tmp_path, tokenizer_folder, thinks, prefix, turns
):
    """Whoever asks does not know the answer: the generation prompt, and behind it what prompt.json records."""
    base = other_chat(tokenizer_folder, tmp_path / "base", THINKING)
    rows = thinking_rows(thinks, turns)
    built = build(
        rows, base=base, messages="turns", test_fraction=0.3, eval_fraction=0.0, near_duplicate_threshold=1.0, **CHAT
    )
    assert built.prompt["chat"]["answer_prefix"] == prefix
    assert len(built.test) > 4
    for example in [*built.train, *built.test]:
        turn = example["turns"][-1]
        content = rows[example["row"] - 1]["turns"][turn - 1]["content"]
        expected = content if prefix or content.startswith("<think>") else EMPTY + content
        assert example["prompt"].endswith(f"<|end|>\n<|start|>assistant\n{prefix}")
        assert example["prompt"].count("<think>") == bool(prefix) + rows[example["row"] - 1]["turns"][1][
            "content"
        ].count("<think>") * (turn > 2)
        assert example["answer"] == expected
        start = max(i for i in range(1, len(example["labels"])) if example["labels"][i - 1] == -100)
        assert tokenizer.decode(example["labels"][start:]) == f"{expected}<|end|>"
        assert example["input_ids"][:start] == tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]


def test_answers_of_which_some_begin_with_an_empty_thought_are_no_labels(build, tmp_path, tokenizer_folder):
    """A label is what all answers of a class are, with the tokens of all."""
    base = other_chat(tokenizer_folder, tmp_path / "base", THINKING)
    for name, thinks in (("mixed", lambda row, _: row % 12 == 0), ("plain", lambda *_: False)):
        built = build(thinking_rows(thinks), name=name, base=base, messages="turns", **CHAT, **WHOLE)
        assert built.prompt["labels"] == (None if name == "mixed" else sorted({row["tone"] for row in make_rows(24)}))


# As DeepSeek-R1-Distill's template does: what the model thought is left out of every answer.
DROPPING = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")


def test_an_answer_of_which_the_template_drops_a_part_is_refused(chat):
    """A model that learned it could never give the expected answer."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>so</think>joy"}]
    with pytest.raises(UserError, match="does not show all of the answer"):
        chat(DROPPING).split(turns)
    turns[1]["content"] = "joy"
    assert chat(DROPPING).split(turns)[1] == "joy<|end|>"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_field_of_its_own_is_refused(refused, tmp_path, tokenizer_folder, field):
    """It would belong to the prompt of the test, and to nobody's prompt later."""
    base = other_chat(tokenizer_folder, tmp_path / "base", THINKING)
    rows = turns_column(make_rows(24))
    rows[3]["turns"][1][field] = "because"
    message = refused(rows, base=base, messages="turns", **CHAT)
    assert f"has {field} in turn 2" in message
    rows[3]["turns"][1][field] = None
    assert field not in json.dumps(read_conversation(rows[3]["turns"]).turns)


def test_white_space_before_the_answer_belongs_to_the_prompt(chat):
    head, answer = chat(BRACKETS).split([{"role": "user", "content": "?"}, {"role": "assistant", "content": "joy"}])
    assert (head, answer) == ("[INST] ? [/INST] ", "joy<|end|>")
    assert prefix_of(chat(BRACKETS)) == " "


def test_plain_template_has_no_prefix(chat):
    head, answer = chat(PLAIN).split([{"role": "user", "content": "?"}, {"role": "assistant", "content": "joy"}])
    assert (head, answer) == ("<|start|>user\n?<|end|>\n<|start|>assistant\n", "joy<|end|>")
    assert prefix_of(chat(PLAIN)) == ""


@pytest.mark.parametrize(("date", "written"), [("2024-01-01", "01 Jan 2024"), ("2025-12-31", "31 Dec 2025")])
def test_date_is_that_of_params_yaml(build, tmp_path, tokenizer_folder, date, written):
    """Not today's: the same data give the same bytes tomorrow."""
    base = other_chat(tokenizer_folder, tmp_path / "base", DATED)
    built = build(make_rows(24), base=base, messages=MESSAGES, chat_date=date, **CHAT, **WHOLE)
    assert built.train[0]["prompt"].startswith(f"<|start|>system\nToday: {written}<|end|>\n")
    assert built.prompt["chat"] == {"template_kwargs": {}, "date": date}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end: stopped after 10 s"),
        ("{{ 'x' * 9999999999 }}", "needs more than 2 GB of memory"),
        ("{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "needs more than 2 GB of memory"),
        ("{% for a in range(9999999999) %}{% endfor %}", "needs more than 2 GB of memory"),
        ("{{ messages[0].content }}", "this chat template does not show the answer"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "this chat template does not show the answer"),
        ("{{ raise_exception('not this one') }}", "the base model's chat template does not take it: not this one"),
        ("{{ messages[0].content.nothing.more }}", "the base model's chat template does not take it: "),
        ("{{ 1 // 0 }}", "the base model's chat template does not take it: "),
        ("{{ messages.x() }}", "the base model's chat template does not take it: "),
        ("{% for", "the base model's chat template does not take it: "),
        ("{{ ''.__class__.__mro__ }}", "the base model's chat template does not take it: "),
        ("{% set x = 7**(9**9) %}", "does not take it: it computes with a whole number of more than 100000 bits"),
        ("{{ 5|round(-9**9) }}{{ 5|round(9**9, 'ceil') }}{{ 7 % 4 }}", "this chat template does not show the answer"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself without end, or is nested too deeply"),
        ("{{ " + "(" * 400 + "1" + ")" * 400 + " }}", "calls itself without end, or is nested too deeply"),
        ("{{ " + "not " * 5000 + "1 }}", "calls itself without end, or is nested too deeply"),
        ("{{ " + "1+" * 20_000 + "1 }}", "calls itself without end, or is nested too deeply"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "cannot be compiled: too many statically nested blocks"),
        ("{% if messages %}" * 120 + "{% endif %}" * 120, "cannot be compiled: "),
        ("{% break %}", "cannot be compiled: 'break' outside loop"),
        ("{{ 'x' * 10**6 }}" + PLAIN, "makes a text of 1,000,"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", [False, True])
def test_hostile_templates(refused, tmp_path, tokenizer_folder, template, reason, column):
    """One message within 10 s of processor time and with bounded memory; the limits are taken back."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    base = other_chat(tokenizer_folder, tmp_path / "base", template)
    rows = make_rows(2)
    given = {"messages": "turns"} if column else {"messages": MESSAGES}
    start = time.process_time()
    message = refused(turns_column(rows) if column else rows, base=base, **given, **CHAT)
    assert reason in message
    assert time.process_time() - start < 15
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_turn_that_the_template_does_not_show(refused, tmp_path, tokenizer_folder):
    """A field in it would be lost in silence."""
    template = "{% for m in messages if m.role != 'system' %}" + PLAIN.partition("%}")[2]
    base = other_chat(tokenizer_folder, tmp_path / "base", template)
    messages = [{"role": "system", "content": "Context: {context}"}, *MESSAGES]
    rows = [{**row, "context": "none"} for row in make_rows(4)]
    assert refused(rows, base=base, messages=messages, **CHAT) == (
        "prepare.messages: the chat template does not show turn 1, of the system. Use text_template, or leave the turn out."
    )


def test_bounds_leave_what_ends_in_time_alone():
    with bounded(seconds=5):
        assert json.loads("[1]") == [1]
    with pytest.raises(TimeoutError), bounded(seconds=0.2):  # noqa: PT012
        while True:
            pass
    with pytest.raises(MemoryError), bounded(memory=2**28):
        bytearray(2**30)
    bytearray(2**20)


def test_the_time_is_bounded_where_every_exception_is_swallowed():
    """As jinja does while it computes a template's constants."""
    start = time.process_time()
    with pytest.raises(TimeoutError), bounded(seconds=0.3):  # noqa: PT012
        while time.process_time() - start < 5:
            with contextlib.suppress(Exception):
                while time.process_time() - start < 5:
                    pass
    assert time.process_time() - start < 3


def test_the_turns_of_some_rows_are_kept_for_the_rehearsal(build, monkeypatch):
    """The first of each split, without their last answers; no row of a text template."""
    monkeypatch.setattr("slmake.data.dataset.CHATS_KEPT", 2)
    rows = [
        {"messages": [{"role": "user", "content": row["phrase"]}, {"role": "assistant", "content": row["tone"]}]}
        for row in make_rows(40)
    ]
    built = build(rows, **CHAT)
    kept = json.loads((built.folder / "chats.json").read_text(encoding="utf-8"))["chats"]
    assert len(kept) == 6
    for chat in kept:
        assert chat["turns"] == rows[chat["row"] - 1]["messages"][:1]
        assert chat["file"].endswith("rows.json")
        assert chat["tools"] is None
    assert not (build(make_rows(40), name="texts").folder / "chats.json").exists()


def test_tools_of_a_turn_that_the_template_shows(tokenizer_folder, tmp_path):
    """As Phi-4-mini's does in the system turn."""
    template = "{% for m in messages %}{{ m.content }}{{ m.tools or '' }}<|end|>{% endfor %}"
    chat = ChatTemplate(load_tokenizer(other_chat(tokenizer_folder, tmp_path / "base", template)), {}, "2024-01-01")
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    chat.check_shown(read_conversation([turns[0] | {"tools": "[]"}, *turns[1:]]))


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("closing", ["<|im_end|>", "<|end|>", "", "\n\n", "\n###"])
def test_a_mark_that_the_model_does_not_know_is_refused(build, refused, tmp_path, tokenizer_folder, column, closing):
    """It would be learned as text of every answer, and no answer would be equal to its label."""
    base = other_chat(tokenizer_folder, tmp_path / "base", PLAIN.replace("<|end|>", closing))
    rows = turns_column(make_rows(24)) if column else make_rows(24)
    given = CHAT | WHOLE | {"messages": "turns" if column else MESSAGES}
    if closing == "<|im_end|>":
        message = refused(rows, base=base, **given)
        assert "row 1: the answer 'sadness' is 'sadness<|im_end|>' when its tokens are read back" in message
        assert "fetch_model.chat_template" in message
    else:
        assert build(rows, base=base, **given).prompt["labels"] == ["fear", "joy", "sadness", "surprise"]
