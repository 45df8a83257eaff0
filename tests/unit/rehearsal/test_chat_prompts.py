"""The runtime's prompts of chats are compared with training's before training, and usual templates are written as the runtime reads them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from prepared import other_chat
from served import CHAT, WEATHER, export
from tiny import write_params

from slmake import cli, params
from slmake.data.chat import ChatTemplate
from slmake.data.tokenize import load_tokenizer
from slmake.errors import UserError
from slmake.export.runtime_template import rewritten
from slmake.rehearsal import chat_prompts, checks
from slmake.scoring import onnx_runner

TURN = "{{ '<' + m['role'] + '>' }}"
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
SMOLLM3 = """{%- set reasoning_mode = "/think" -%}
{%- if messages[0].role == "system" -%}
  {%- set system_message = messages[0].content -%}
  {%- if "/no_think" in system_message -%}{%- set reasoning_mode = "/no_think" -%}{%- endif -%}
  {%- set custom = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "Mode: " + reasoning_mode + "\\n\\n" -}}{%- if custom -%}{{- custom + "\\n\\n" -}}{%- endif -%}
{%- for m in messages -%}{{ "<|im_start|>" + m.role + "\\n" + m.content.lstrip("\\n") + "<|im_end|>\\n" }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}"""
SPELLINGS = (
    "'<think>' in m.content",
    "'<think>' not in m['content']",
    "'<think>' in m.content | trim",
    "part in text",
    "'think' in text and part in m['content']",
)
TEMPLATES = {
    "zephyr": ZEPHYR,
    "smollm3": SMOLLM3,
    "raw": "{% raw %}{%{% endraw %}{% for m in messages %}" + TURN + "{{ m.content }}\u00a0{{ '\\u00e9' }}{% endfor %}",
    "in": "{% set part = '<think>' %}{% for m in messages %}{% set text = m.content %}"
    + TURN
    + "".join(f"{{{{ 'yes' if {spelling} else 'no' }}}}" for spelling in SPELLINGS)
    + "{{ m.content | replace('i', 'o') }}{{ m.role | capitalize }}{% endfor %}",
}
SHOWN = (
    "{% for m in messages %}" + TURN + "{{ m.content }}{{ m.tool_calls | tojson(OPTIONS) if m.tool_calls }}{% endfor %}"
)
SHOWN = "{% for tool in tools or [] %}{{ tool | tojson(OPTIONS) }}\n{% endfor %}" + SHOWN
ROW = {
    "file": "rows.json",
    "row": 7,
    "tools": None,
    "turns": [{"role": "system", "content": "Go /no_think"}, {"role": "user", "content": "<think>"}],
}

CALLED = ROW | {"tools": [WEATHER]}


@pytest.fixture(scope="module")
def onnx(tmp_path_factory, base) -> Path:
    return export(base, tmp_path_factory.mktemp("exported") / "onnx")


@pytest.fixture
def compared(tmp_path, base, onnx):
    """Compare the prompts of training by one template with those of the runtime by another."""

    def run(trained: str, runtime: str, rows: list[dict] | None = None, **form: object) -> int:
        own = other_chat(base, tmp_path / "base", trained)
        settings = ChatTemplate(load_tokenizer(own), {}, "2024-01-01").settings() | {"answer_prefix": "so "}
        folder = Path(shutil.copytree(onnx, tmp_path / "onnx", dirs_exist_ok=True))
        (folder / "chat_template.jinja").write_text(runtime, encoding="utf-8")
        (tmp_path / "chats.json").write_text(json.dumps({"chats": rows or []}), encoding="utf-8")
        return chat_prompts.compare(own, tmp_path, onnx_runner.load(folder, {**CHAT, "chat": settings, **form}))

    return run


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_usual_template_is_written_so_that_the_runtime_reads_it_as_training(compared, name):
    template = TEMPLATES[name]
    written = rewritten(template)
    assert written != template
    assert compared(template, written, [ROW]) == 5
    assert compared(written, written, [ROW]) == 5  # transformers reads it in the same way
    system = {"role": "system", "content": "Be kind."}
    assert compared(template, written, system=system) == 4
    with pytest.raises(UserError, match="the runtime's chat template engine"):
        compared(template, template, [ROW])


@pytest.mark.parametrize("options", ["indent=4", "ensure_ascii=False, indent='\\t'", "indent=0", "indent=none"])
def test_indented_tools_are_written_as_training_wrote_them(compared, options):
    template = SHOWN.replace("OPTIONS", options)
    assert (
        compared(template, rewritten(template), [CALLED])
        == compared(rewritten(template), rewritten(template), [CALLED])
        == 8
    )
    with pytest.raises(UserError, match="the runtime's chat template engine"):
        compared(template, template, [ROW | {"tools": chat_prompts.TOOLS}])


def test_arguments_of_calls_are_written_as_training_wrote_them(compared):
    """Floats as text, and objects that may be empty."""
    calls = (
        "{% for call in m.tool_calls or [] %}{% if not call.function.arguments %}none{% endif %}"
        "{{ 'some' if call.function.arguments and call.function.name else 'none' }}"
        "{% for name, value in call.function.arguments | items %}"
        "{% set text = value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string %}"
        "{{ '<' ~ name ~ '=' ~ value ~ '>' + text if value is not mapping and value is not sequence else text }}"
        "{% endfor %}{% endfor %}"
    )
    template = "{% for m in messages %}" + TURN + "{{ m.content }}" + calls + "{% endfor %}"
    assert (
        compared(template, rewritten(template), [CALLED])
        == compared(rewritten(template), rewritten(template), [CALLED])
        == 8
    )
    for name in ("result", "call without arguments"):
        part = calls if name == "result" else calls.partition("{% for name")[0] + "{% endfor %}"
        template = "{% for m in messages %}" + TURN + "{{ m.content }}" + part + "{% endfor %}"
        with pytest.raises(UserError, match=f"another prompt of a chat with a .*{name}"):
            compared(template, template, [CALLED])


def test_a_template_whose_tools_the_runtime_does_not_take(compared):
    """It is refused where rows have tools; else the runtime says so when it is given some. Other prompts are refused in any case."""
    template = SHOWN.replace("OPTIONS", "sort_keys=true")
    assert rewritten(template) == template
    assert compared(template, template, [ROW]) == 5
    with pytest.raises(UserError, match="fails on row 7"):
        compared(template, template, [ROW | {"tools": chat_prompts.TOOLS}])
    with pytest.raises(UserError, match=r"another prompt of (row 7|a chat with tools)"):
        compared(SHOWN.replace("OPTIONS", "indent=4"), SHOWN.replace("OPTIONS", "indent=4"), [CALLED])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TURN + "{{ m.content | upper }}", "fails on row 7 of rows.json: the chat template does not take these"),
        (
            TURN + "{{ m.content }}{{ none }}",
            r"another prompt of row 7 of rows.json: training has '.*None.*fetch_model",
        ),
    ],
)
def test_a_prompt_that_differs_is_refused(compared, template, message):
    template = f"{{% for m in messages %}}{template}{{% endfor %}}"
    with pytest.raises(UserError, match=message):
        compared(template, rewritten(template), [ROW])


def test_rehearse_compares_where_it_has_an_export(tmp_path, base, dataset, monkeypatch):
    seen = []
    for name in ("compare_export", "try_tokenizer", "try_constraints"):
        monkeypatch.setattr(checks, name, lambda *_: {})
    monkeypatch.setattr(checks.twin, "make_model", lambda *_: None)
    monkeypatch.setattr(checks.onnx_runner, "load", lambda folder, form: folder)
    monkeypatch.setattr(chat_prompts, "compare", lambda *given: seen.append(given[2].name))
    quantize = {"calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None}
    for stages in (["rehearse"], ["rehearse", "quantize"]):
        file = write_params(tmp_path / "params.yaml", all={"stages": stages}, quantize=quantize)
        checks.rehearse(params.load(file), base, dataset, tmp_path, {}, cli.Job("rehearse", sys.stderr, None))
    assert seen == ["asked"]


def test_chats_that_the_template_does_not_take_are_left_out(compared):
    """And a prompt that is no chat is not compared at all."""
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    assert compared(template, template) == 2
    assert compared(template, "{{ other", prompt="{a}") == 0


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if 'tool_calls' in m or m.role in ['user'] %}{{ m.content }}\n{% endif %} {% endfor %}",
        "{{ broken",
        "{% for m in messages recursive %}{{ 'a' in m.content }}{% endfor %}",
    ],
)
def test_a_template_that_needs_nothing_stays_as_it_is(template):
    assert rewritten(template) == template
