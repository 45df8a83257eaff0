"""What chat templates leave out of turns, outer white space of whatever kind and thoughts: the exported model's prompt has none either."""

import json
import shutil
from pathlib import Path

import pytest
from prepared import other_chat

from slmake import generation, params
from slmake.data.chat import ChatTemplate
from slmake.data.tokenize import load_tokenizer
from slmake.export import builder, runtime_template

# As Gemma writes chats: the system turn as it is, all others stripped.
STRIPS = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}{{ m['content'] | trim }}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LEAVES = STRIPS.replace(" | trim", "")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + STRIPS
# As Qwen3 and DeepSeek write earlier answers.
THOUGHTLESS = LEAVES.replace(
    "{{ m['content'] }}{% else %}{{ m['content'] }}",
    "{{ m['content'] }}{% elif '</think>' in m.content and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m['content'] }}",
)
TRIMS = {"trimmed_roles": ["assistant"]}
SPACES = ["\u00a0", "\u3000", "\u2003", "\u2028", "\x85", "\x1f", "\t ", "\n"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, base) -> Path:
    """The tiny model as the runtime loads it."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    folder.mkdir()
    options = params.Quantize(precision="fp32", algo_config="rtn", matmul_mixed_precision=None)
    builder.export(options, base, folder, folder.with_name("cache"))
    return folder


@pytest.mark.parametrize(
    ("template", "roles"),
    [(STRIPS, ["user", "assistant", "tool"]), (LEAVES, []), (NO_SYSTEM, ["user", "assistant", "tool"])],
    ids=["strips", "leaves", "no-system"],
)
def test_the_export_is_asked_as_the_template_writes_it_in_training(tmp_path, exported, base, template, roles):
    folder = other_chat(base, tmp_path / "base", template)
    chat = ChatTemplate(load_tokenizer(folder), {}, "2024-01-01")
    assert chat.trimmed_roles() == roles
    onnx = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (onnx / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = {**chat.settings(), "answer_prefix": "", "trimmed_roles": chat.trimmed_roles()}
    model = generation.Exported(onnx, {"prompt": None, "fields": [], "chat": settings})
    for space in SPACES:
        turns = [
            {"role": role, "content": f"{space}a{space}b{space}"}
            for role in ("system", "user", "assistant", "tool", "user", "assistant")
        ][template == NO_SYSTEM :]
        head, _ = chat.split(turns)
        assert model.prompt(json.dumps(turns[:-1])) == head


def test_the_thoughts_of_earlier_answers_are_left_out(tmp_path, exported, base):
    """The runtime's template engine finds no text in a text."""
    chat = ChatTemplate(load_tokenizer(other_chat(base, tmp_path / "base", THOUGHTLESS)), {}, "2024-01-01")
    onnx = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (onnx / "chat_template.jinja").write_text(THOUGHTLESS, encoding="utf-8")
    runtime_template.rewrite(onnx)
    model = generation.Exported(onnx, {"prompt": None, "fields": [], "chat": {**chat.settings(), "answer_prefix": ""}})
    for answer in ("<think>\nso\n</think>joy", "joy"):
        turns = [
            {"role": role, "content": text}
            for role, text in (("user", "a"), ("assistant", answer), ("user", "b"), ("assistant", answer))
        ]
        head, _ = chat.split(turns)
        assert head == "<user>a<|end|><assistant>joy<|end|><user>b<|end|><assistant>"
        assert model.prompt(json.dumps(turns[:-1])) == head
    assert model.chat_prompt([*turns[:1], {"role": "assistant", "content": None}, *turns[:1]]).endswith("<assistant>")


def test_turns_of_other_roles_and_without_text_stay_as_they_are():
    """Servers are given content null beside tool calls."""
    for turn in ({"role": "assistant", "content": None}, {"role": "user", "content": " a "}, {"role": "assistant"}):
        assert generation._as_trained(turn, TRIMS) == turn
    assert generation._as_trained({"role": "assistant", "content": "\u3000a "}, TRIMS)["content"] == "a"
