"""fetch_model.chat_template: a user's Jinja file takes the place of the base model's own, wherever that stands."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from fetch_script import fetch, refused
from tiny import ROOT

from slmake.data.chat import ChatTemplate
from slmake.data.tokenize import load_tokenizer

TOOLS = "data/chatml_tools.jinja"
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Open on Sunday?"}]
TOOL = {"name": "hours", "parameters": {"type": "object", "properties": {"day": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "hours", "arguments": {"day": "Sunday"}}}


def test_the_file_takes_the_place_of_every_older_one(tmp_path, base):
    model = Path(shutil.copytree(base, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "old"}), encoding="utf-8")
    (model / "chat_template.json").write_text('{"chat_template": "older"}', encoding="utf-8")
    content = b"{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (tmp_path / "mine.jinja").write_bytes(b"\xef\xbb\xbf" + content)  # as some editors write it
    folder, report = fetch(tmp_path, model, chat_template=str(tmp_path / "mine.jinja"))
    assert load_tokenizer(folder).chat_template.encode() == content
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert not (folder / "chat_template.json").exists()
    digest = hashlib.sha256(b"\xef\xbb\xbf" + content).hexdigest()
    assert report["chat_template"] == {"source": str(tmp_path / "mine.jinja"), "sha256": digest}


def test_without_it_the_model_keeps_its_own(tmp_path, base):
    folder, report = fetch(tmp_path, base, chat_template=None)
    assert (folder / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert "chat_template" not in report


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"{% for m in %}", "not a Jinja template: "),
        (b"\xff{{ messages }}", "not a Jinja template: "),
    ],
    ids=["missing", "syntax", "encoding"],
)
def test_what_is_no_template_is_refused(tmp_path, base, capsys, content, reason):
    if content is not None:
        (tmp_path / "mine.jinja").write_bytes(content)
    message = refused(tmp_path, capsys, base, chat_template=str(tmp_path / "mine.jinja"))
    assert f"fetch_model.chat_template: {tmp_path / 'mine.jinja'}: {reason}" in message


def test_the_shipped_template_shows_tools_and_calls(base):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = (ROOT / TOOLS).read_text(encoding="utf-8")
    chat = ChatTemplate(tokenizer, {}, "2024-01-01")
    head, tail = chat.split([*TURNS, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL])
    assert head.startswith("<|im_start|>system\nBe brief.\n\nFunctions that you may call:\n<tools>\n")
    assert json.dumps(TOOL) in head
    assert head.endswith("<|im_start|>user\nOpen on Sunday?<|im_end|>\n<|im_start|>assistant\n")
    assert tail == '<tool_call>\n{"name": "hours", "arguments": {"day": "Sunday"}}\n</tool_call><|im_end|>'
    head, tail = chat.split([TURNS[1], {"role": "assistant", "content": "No."}])
    assert (head, tail) == ("<|im_start|>user\nOpen on Sunday?<|im_end|>\n<|im_start|>assistant\n", "No.<|im_end|>")
