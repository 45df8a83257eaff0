"""`make chat` and `make ask`: a conversation in a terminal, and one question, for models of chats and of texts."""

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from served import CHAT, TEXT, export

from slmake import exported_model, generation
from slmake.errors import UserError
from tools import ask, chat


@pytest.fixture(scope="module")
def onnx(tmp_path_factory, base) -> Path:
    return export(base, tmp_path_factory.mktemp("chat") / "onnx")


@pytest.fixture
def model(onnx) -> generation.Exported:
    return generation.Exported(onnx, CHAT)


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def talk(monkeypatch, capsys, onnx: Path, folder: Path, form: dict, *lines: str, **options: object) -> list[str]:
    """What `make chat` prints for some lines of input."""
    (folder / "prompt.json").write_text(json.dumps(form), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    given = [f"--{name}={value}" for name, value in options.items()]
    chat.main([f"--model={onnx}", f"--dataset={folder}", *given])
    return capsys.readouterr().out.splitlines()


def test_earlier_turns_and_the_system_message_are_read(model):
    conversation = chat.Chat(model, 6)
    conversation.reset("Be kind")
    for text in ("Hi", "Again"):
        turns = [*conversation.turns, turn("user", text)]
        stream = conversation.say(text)
        answer = "".join(stream)
        assert answer == model.decode(model.generate(model.encode(model.chat_prompt(turns)), 6))
        conversation.keep(text, answer)
    assert [entry["role"] for entry in conversation.turns] == ["system", "user", "assistant", "user", "assistant"]
    conversation.reset()
    assert conversation.turns == [turn("system", "Be kind")]
    conversation.reset("Be brief")
    assert conversation.turns == [turn("system", "Be brief")]


def test_a_conversation_that_is_too_long_is_refused_and_can_be_reset(model, capsys):
    conversation = chat.Chat(model, 6)
    conversation.keep("word " * 300, "word " * 300)
    before = list(conversation.turns)
    chat.reply(conversation, "Hi")
    printed = capsys.readouterr().out
    assert "the text is too long: " in printed
    assert "/reset starts a new chat" in printed
    assert conversation.turns == before
    assert chat.command(conversation, "/reset") == "new chat"
    chat.reply(conversation, "Hi")
    assert "6 tokens" in capsys.readouterr().out
    assert len(conversation.turns) == 2


def test_commands(model):
    conversation = chat.Chat(model, 6)
    conversation.keep("a", "b")
    assert chat.command(conversation, "/system Be kind") == "new chat with this system message"
    assert conversation.turns == [turn("system", "Be kind")]
    for line in ("/help", "/system", "/systemic"):
        assert chat.command(conversation, line) == chat.HELP
    with pytest.raises(EOFError):
        chat.command(conversation, "/quit")


def test_a_terminal_chat(monkeypatch, capsys, onnx, tmp_path, model):
    lines = talk(monkeypatch, capsys, onnx, tmp_path, CHAT, "Hi", "", "/reset", "/quit", "never", system="Be kind")
    answer = model.decode(
        model.generate(model.encode(model.chat_prompt([turn("system", "Be kind"), turn("user", "Hi")])), 12)
    )
    assert "\n".join(lines).startswith(f"{chat.HELP}\n{answer}\n  (12 tokens, ")
    assert lines[-1] == "new chat"
    assert lines[-2].endswith(" tokens/s, cut)")


def test_a_model_of_texts_takes_each_line_by_itself(monkeypatch, capsys, onnx, tmp_path):
    model = generation.Exported(onnx, TEXT)
    lines = talk(monkeypatch, capsys, onnx, tmp_path, TEXT, "We danced", "/system Be kind", "We danced")
    answer = model.answer("We danced").split("\n")
    assert lines[1 : 1 + len(answer)] == answer
    assert "this model was not trained on chats: it takes no system message" in lines
    assert lines[-len(answer) - 1 : -1] == answer
    conversation = chat.Chat(model)
    conversation.keep("a", "b")
    assert conversation.turns == []


def test_a_model_of_several_fields_takes_json(monkeypatch, capsys, onnx, tmp_path):
    form = {**TEXT, "prompt": "{a}: {b}\n", "fields": ["a", "b"]}
    lines = talk(monkeypatch, capsys, onnx, tmp_path, form, '{"a": "x", "b": "y"}', "text")
    assert lines[0] == 'each line is a JSON object, such as {"a": "...", "b": "..."}'
    assert lines[-1] == "the template has the fields a, b: give a JSON object with each."
    assert lines[-2].startswith("  (3 tokens, ")


def test_a_system_message_for_a_model_of_texts_is_refused(onnx, tmp_path, refused):
    (tmp_path / "prompt.json").write_text(json.dumps(TEXT), encoding="utf-8")
    message = refused(chat.main, [f"--model={onnx}", f"--dataset={tmp_path}", "--system=Be kind"])
    assert message == "chat: error: --system: this model was not trained on chats: it takes no system message."


@pytest.mark.parametrize("form", [CHAT, TEXT], ids=["chats", "texts"])
def test_ask_answers_every_kind_of_model(onnx, tmp_path, capsys, form):
    (tmp_path / "prompt.json").write_text(json.dumps(form), encoding="utf-8")
    arguments = [f"--model={onnx}", f"--dataset={tmp_path}", "--max-new-tokens=4"]
    model = generation.Exported(onnx, form)
    asked = ["We danced", json.dumps([turn("user", "Hi"), turn("assistant", "Yo"), turn("user", "?")])]
    for text in asked if form is CHAT else asked[:1]:
        ask.main([*arguments, text])
        assert capsys.readouterr().out.startswith(f"{model.answer(text, new_tokens=4)}  (")


def test_code_of_another_s_model_is_never_loaded(onnx, tmp_path):
    """`ask`, `chat` and the server take any folder: a library that its settings name would run before a word is answered."""
    folder = tmp_path / "model"
    shutil.copytree(onnx, folder)
    args = argparse.Namespace(model=folder, dataset=None, params="none")
    (folder / "prompt.json").write_text(json.dumps(TEXT), encoding="utf-8")
    assert exported_model.load(args).context_length
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = str(folder / "evil.bin")
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"genai_config\.json names a library \(custom_ops_library\), whose code would run"
    ):
        exported_model.load(args)


def test_a_model_is_asked_with_the_prompt_beside_it(onnx, tmp_path, monkeypatch):
    """The prompt is that of a dataset that is named, else the model's own, else that of build/dataset."""
    monkeypatch.chdir(tmp_path)
    folder, dataset, other = (
        tmp_path / "model",
        tmp_path / "build" / "dataset",
        {**TEXT, "prompt": "Another {phrase}?\n"},
    )
    shutil.copytree(onnx, folder)
    dataset.mkdir(parents=True)
    (dataset / "prompt.json").write_text(json.dumps(other), encoding="utf-8")
    args = argparse.Namespace(model=folder, dataset=None, params="none")
    assert exported_model.load(args).prompt("We danced") == "Another We danced?\n"
    (folder / "prompt.json").write_text(json.dumps(TEXT), encoding="utf-8")
    assert exported_model.load(args).prompt("We danced") == TEXT["prompt"].format(phrase="We danced")
    args.dataset = dataset
    assert exported_model.load(args).prompt("We danced") == "Another We danced?\n"


@pytest.mark.parametrize(("option", "name"), [("model", "genai_config.json"), ("dataset", "prompt.json")])
def test_a_folder_of_the_users_that_is_something_else_is_named(onnx, tmp_path, option, name):
    (tmp_path / "prompt.json").write_text(json.dumps(TEXT), encoding="utf-8")
    (tmp_path / "other").mkdir()
    given = {"model": onnx, "dataset": tmp_path, option: tmp_path / "other"}
    with pytest.raises(UserError, match=rf"^--{option} {tmp_path}/other: no {name} there\. Correct the folder's name"):
        exported_model.load(argparse.Namespace(**given, params="none"))
