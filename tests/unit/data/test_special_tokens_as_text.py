"""Special tokens that answers hold as text, such as SmolLM2's <filename>: the runtime leaves them out of what it answers."""

import shutil
from pathlib import Path

import pytest
from prepared import CHAT, WHOLE
from tiny import make_rows

from slmake.data.tokenize import load_tokenizer

TEXT = {"text_template": "{phrase}\n{tone}"}
TURNS = [{"role": "user", "content": "{phrase}"}, {"role": "assistant", "content": "{tone}"}]
ROWS = make_rows(24)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder) -> Path:
    """The test tokenizer with a special token that looks like text."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("special") / "base"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens = [AddedToken(name, special=True) for name in ("<filename>", "<reponame>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def rows(end: str, column: bool = False) -> list[dict]:
    made = [{"phrase": row["phrase"], "tone": f"{row['tone']} {end}"} for row in ROWS]
    if not column:
        return made
    pairs = [[("user", row["phrase"]), ("assistant", row["tone"])] for row in made]
    return [{"turns": [{"role": role, "content": text} for role, text in pair]} for pair in pairs]


@pytest.mark.parametrize("end", ["<filename>", "<|end|>"])
@pytest.mark.parametrize("fields", [TEXT, {"messages": "turns", **CHAT}], ids=["text", "chats"])
def test_they_are_named_and_trained(build, base, capsys, fields, end):
    """An end token at an answer's end closes it, and nothing is said."""
    built = build(rows(end, "messages" in fields), base=base, **fields, **WHOLE)
    warning = "warning: answers hold <filename>: special tokens of this model, which the runtime leaves out"
    assert (warning in " ".join(capsys.readouterr().err.split())) == (end == "<filename>")
    trained = load_tokenizer(base).decode([label for label in built.train[0]["labels"] if label != -100])
    assert trained.startswith(f"{ROWS[0]['tone']} <filename>" if end == "<filename>" else ROWS[0]["tone"])


@pytest.mark.parametrize("words", [("class", "class <filename>"), ("class <filename>", "class <filename><reponame>")])
@pytest.mark.parametrize("named", [True, False], ids=["prepare.labels", "data"])
def test_labels_that_differ_in_them_only_are_refused(base, refused, words, named):
    values = [str(number) if named else word for number, word in enumerate(words)]
    given = [{"phrase": row["phrase"], "tone": values[i % 2]} for i, row in enumerate(ROWS)]
    labels = {"labels": dict(enumerate(words))} if named else {}
    message = refused(given, base=base, **TEXT, **labels)
    assert "some rows have the label 'class' with <filename>" in message
    assert "special tokens are no part of an answer there, so these are one label" in message


def test_open_answers_may_differ_in_them_only(build, base, capsys):
    given = [
        {"phrase": row["phrase"], "tone": f"answer {i // 2}" + " <filename>" * (i % 2)}
        for i, row in enumerate(make_rows(140))
    ]
    assert len(build(given, base=base, **TEXT, **WHOLE).train) == 140
    assert "warning: answers hold <filename>" in " ".join(capsys.readouterr().err.split())


def test_the_same_end_twice_is_the_same_label(build, base):
    given = [
        {"phrase": row["phrase"], "tone": "class <filename>" + " <filename>" * (i % 2)} for i, row in enumerate(ROWS)
    ]
    assert build(given, base=base, **TEXT, **WHOLE).report["labels"]["train"] == {"class": len(ROWS)}


def test_a_label_of_nothing_else_is_empty(base, refused):
    given = [{"phrase": row["phrase"], "tone": i % 2} for i, row in enumerate(ROWS)]
    assert "is an empty answer" in refused(given, base=base, **TEXT, labels={0: "<filename>", 1: "joy"})


def test_a_template_of_messages_does_not_drop_them(build, base, refused):
    """They were, before the row was trained; as a label, such an answer is refused."""
    assert "has the special token <filename> in it" in refused(rows("<filename>"), base=base, messages=TURNS, **CHAT)
    assert len(build(rows("<|end|>"), base=base, messages=TURNS, **CHAT, **WHOLE).train) == len(ROWS)
