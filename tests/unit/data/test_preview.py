"""A row as the model sees it: in the terminal, and as a page of the report."""

import pytest
from prepared import CHAT, WHOLE, other_chat
from test_chat import PLAIN
from tiny import make_rows

from slmake.data.preview import pieces, sequences
from slmake.reporting.pages import rows_page
from tools import preview

TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c ünï 👍"},
    {"role": "assistant", "content": "dé 👩‍👧"},
]


def printed(capsys, built, base, *arguments: object) -> str:
    capsys.readouterr()
    preview.main([str(part) for part in ["--dataset", built.folder, "--base", base, *arguments]])
    return capsys.readouterr().out


def test_pieces_are_the_text(tokenizer):
    """Nothing is lost: characters of several tokens stand together, special tokens are marked, and ids add up."""
    text = "<|start|>user\nünï 👍👩‍👧<|end|>\n"
    ids = tokenizer(text)["input_ids"]
    parts = list(pieces(tokenizer, ids, [-100] * 4 + ids[4:]))
    assert "".join(part.text for part in parts) == text
    assert [number for part in parts for number in part.ids] == ids
    assert [part.text for part in parts if part.special] == ["<|start|>", "<|end|>"]
    assert not any("�" in part.text for part in parts)
    assert not parts[0].trained
    assert parts[-1].trained
    cut = list(pieces(tokenizer, tokenizer("👍")["input_ids"][:-1], [-100] * 3))
    assert "".join(part.text for part in cut) == "�"


def test_a_row_in_a_terminal(build, tokenizer_folder, tokenizer, capsys):
    built = build(make_rows(12), **WHOLE)
    example = next(example for example in built.train if example["row"] == 3)
    out = printed(capsys, built, tokenizer_folder, "--row", 3)
    trained = sum(label != -100 for label in example["labels"])
    assert out.splitlines()[0] == f"row 3 · train · {len(example['input_ids'])} tokens, {trained} of them trained"
    assert out.partition("\n")[2] == f"{example['prompt']}⟦{example['answer']}<|end|>⟧\n\n"
    first = printed(capsys, built, tokenizer_folder)
    assert first.startswith("row 1 · train · ")
    assert first.count("row ") == 1


def test_token_ids(build, tokenizer_folder, capsys):
    built = build(make_rows(12), **WHOLE)
    example = built.train[1]
    lines = printed(capsys, built, tokenizer_folder, "--row", example["row"], "--tokens").splitlines()[1:-1]
    assert len(lines) == len(example["input_ids"])
    for position, (line, token, label) in enumerate(zip(lines, example["input_ids"], example["labels"], strict=True)):
        assert line.split()[:2] == [str(position), str(token)]
        assert ("trained" in line) == (label != -100)


def test_colours(build, tokenizer_folder, tokenizer):
    ids = tokenizer("joy<|end|>")["input_ids"]
    parts = [*pieces(tokenizer, tokenizer("Q\x1b: ")["input_ids"], [-100] * 4), *pieces(tokenizer, ids, ids)]
    assert preview.shown(parts, True) == "Q␛: \033[32mjoy\033[7m<|end|>\033[0m\033[32m\033[0m"
    assert preview.shown(parts, False) == "Q␛: ⟦joy<|end|>⟧"


@pytest.mark.parametrize("strategy", ["line-by-line", "packing", "join"])
def test_what_was_cut_is_counted(build, tokenizer_folder, tokenizer, strategy):
    """A prompt that lost tokens at its start, alone or among others in its sequence; padding is no part of a row."""
    rows = make_rows(12)
    rows[4]["phrase"] = "long " * 40
    whole = build(rows, name="whole", max_seq_len=256, **WHOLE)
    built = build(rows, max_seq_len=64, strategy=strategy, pad_to_max_len=strategy == "line-by-line", **WHOLE)
    full = {example["row"]: len(example["input_ids"]) for example in whole.train}
    shown = list(sequences(built.folder, tokenizer))
    assert sorted(sequence.row for sequence in shown) == list(range(1, 13))
    for sequence in shown:
        assert len(sequence.ids) == min(64, full[sequence.row])
        assert sequence.cut == max(0, full[sequence.row] - 64)
        assert ("tokens of the prompt cut off" in sequence.summary()) == (sequence.row == 5)


def test_conversations(build, tokenizer_folder, tmp_path, tokenizer, capsys):
    base = other_chat(tokenizer_folder, tmp_path / "base", PLAIN)
    built = build([{"messages": TALK * 12}], base=base, **CHAT, **WHOLE)
    out = printed(capsys, built, base, "--row", 1)
    assert out.startswith("row 1 · train · turns ")
    assert f" · {built.report['dropped_turns']['turns']} earliest turns dropped" in out
    assert "<|start|>assistant\n⟦dé 👩‍👧<|end|>⟧" in out


def test_a_row_that_is_nowhere(build, tokenizer_folder, refused, capsys):
    built = build(make_rows(12), **WHOLE)
    folder = ["--dataset", str(built.folder), "--base", str(tokenizer_folder)]
    with pytest.raises(SystemExit):
        preview.main([*folder, "--row", "13"])
    assert "preview: error: row 13 is in no split of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        preview.main(["--dataset", "nothing", "--base", str(tokenizer_folder)])
    assert "preview: error: nothing: no dataset here." in capsys.readouterr().err


def test_ten_rows_are_a_page(build):
    """The report shows the first ten sequences of train; a row's text cannot become markup."""
    rows = make_rows(24)
    rows[0]["phrase"] = "<b>bold</b> & <script>"
    built = build(rows, **WHOLE)
    examples = built.report["examples"]
    assert [example["title"].split(" · ")[0] for example in examples] == [f"row {i}" for i in range(1, 11)]
    page = rows_page(examples)
    assert page.count('<div class="row">') == 10
    assert '<span class="trained">sadness</span><span class="trained special">&lt;|end|&gt;</span>' in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; &lt;script&gt;" in page
    assert "<script" not in page


def test_long_rows_are_shown_from_their_end(build, monkeypatch):
    from slmake.data import preview as module

    monkeypatch.setattr(module, "SHOWN", 8)
    example = build(make_rows(12), **WHOLE).report["examples"][0]
    assert example["title"].endswith("· the last 8 tokens are shown")
    assert example["parts"][-1] == ["<|end|>", True, True]
    assert "### Text" not in "".join(text for text, *_ in example["parts"])
