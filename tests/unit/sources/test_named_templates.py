"""A base model with a chat template for rows with tools beside its default one: both are one file, which the runtime reads as transformers
takes one of the two."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fetch_script import fetch
from served import CHAT, TEMPLATE, WEATHER, export
from tiny import write_gguf

from slmake import generation
from slmake.data.chat import ChatTemplate
from slmake.data.tokenize import load_tokenizer
from slmake.errors import UserError
from slmake.export import runtime_template
from slmake.merging.fit import tokenizer_files
from slmake.merging.trained_with import refuse_other_prompts
from slmake.sources.fetching import model_files
from slmake.tool_calls import CallForm

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it raining in Oslo?"}]
# White space at both ends is what Jinja would trim between two templates. The default one shows tools, too, in its own way.
DEFAULT = "\n  {% if tools %}Tools: {{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}  \n\n"
TOOL_USE = (
    "\n{% macro turn(m) %}{{ m.role }}{% endmacro %}  " + TEMPLATE.replace("{{ m.role }}", "{{ turn(m) }}") + "\n  "
)
NAMED = {"default": DEFAULT, "tool_use": TOOL_USE, "rag": "{{ documents }}"}


def as_files(folder: Path) -> None:
    """As transformers writes them since 4.52."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text(DEFAULT, encoding="utf-8")
    for name in ("tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(NAMED[name], encoding="utf-8")


def as_list(folder: Path) -> None:
    """As it wrote them before."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    templates = [{"name": name, "template": text} for name, text in NAMED.items()]
    content = json.loads(file.read_text(encoding="utf-8")) | {"chat_template": templates}
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, base) -> Path:
    return export(base, tmp_path_factory.mktemp("named") / "onnx")


def named_base(base: Path, folder: Path, write) -> Path:
    model = Path(shutil.copytree(base, folder))
    write(model)
    return model


@pytest.mark.parametrize("write", [as_files, as_list])
@pytest.mark.parametrize("tools", [[WEATHER], None], ids=["tools", "none"])
def test_training_and_runtime_write_what_transformers_writes(tmp_path, base, exported, write, tools):
    model = named_base(base, tmp_path / "model", write)
    expected = load_tokenizer(model).apply_chat_template(TURNS, tools=tools, tokenize=False, add_generation_prompt=True)
    folder, _ = fetch(tmp_path, model)
    assert not (folder / "additional_chat_templates").exists()
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer.chat_template, str)
    assert ChatTemplate(tokenizer, {}, "2024-01-01").asked(TURNS, tools) == expected
    onnx = Path(shutil.copytree(exported, tmp_path / "onnx"))
    shutil.copyfile(folder / "chat_template.jinja", onnx / "chat_template.jinja")
    runtime_template.rewrite(onnx)
    runtime = generation.Exported(onnx, CHAT)
    assert runtime.chat_prompt(TURNS, tools) == expected
    assert CallForm.of(runtime) == CallForm("<tool_call>\n", "\n</tool_call>", "name", "arguments")


def test_a_model_with_one_for_tools_only_refuses_rows_without(tmp_path, base):
    model = named_base(base, tmp_path / "model", as_files)
    (model / "chat_template.jinja").unlink()
    chat = ChatTemplate(load_tokenizer(fetch(tmp_path, model)[0]), {}, "2024-01-01")
    assert "weather" in chat.asked(TURNS, [WEATHER])
    with pytest.raises(ValueError, match="a chat template for rows with tools only"):
        chat.asked(TURNS)


def test_other_named_templates_change_nothing(tmp_path, base):
    model = named_base(base, tmp_path / "model", as_files)
    (model / "additional_chat_templates" / "tool_use.jinja").unlink()
    folder, _ = fetch(tmp_path, model)
    assert (folder / "chat_template.jinja").read_bytes() == (model / "chat_template.jinja").read_bytes()
    assert load_tokenizer(folder).get_chat_template(tools=[WEATHER]) == DEFAULT


def test_a_users_template_takes_the_place_of_both(tmp_path, base):
    model = named_base(base, tmp_path / "model", as_files)
    (tmp_path / "mine.jinja").write_text("{{ messages }}", encoding="utf-8")
    folder, _ = fetch(tmp_path, model, chat_template=str(tmp_path / "mine.jinja"))
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    assert not (folder / "additional_chat_templates").exists()


def test_a_gguf_file_has_named_templates_too(tmp_path, base):
    def add(writer):
        writer.add_chat_template([{"name": name, "template": text} for name, text in NAMED.items()])

    tokenizer = load_tokenizer(fetch(tmp_path, write_gguf(base, tmp_path / "named.gguf", add))[0])
    theirs = load_tokenizer(named_base(base, tmp_path / "model", as_files))
    for tools in ([WEATHER], None):
        texts = [each.apply_chat_template(TURNS, tools=tools, tokenize=False) for each in (tokenizer, theirs)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("write", [as_files, as_list])
def test_an_adapter_of_such_a_base_fits_it(tmp_path, base, write):
    folder, _ = fetch(tmp_path, named_base(base, tmp_path / "model", write))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    write(tmp_path / "adapter")
    refuse_other_prompts(SimpleNamespace(folder=tmp_path / "adapter"), folder)
    (tmp_path / "adapter" / "chat_template.jinja").write_text(DEFAULT + "!", encoding="utf-8")
    with pytest.raises(UserError, match="a chat template of its own"):
        refuse_other_prompts(SimpleNamespace(folder=tmp_path / "adapter"), folder)


def test_the_tokenizer_of_an_adapter_with_new_tokens_leaves_the_template_of_both(tmp_path, base):
    folder, _ = fetch(tmp_path, named_base(base, tmp_path / "model", as_files))
    adapter = SimpleNamespace(folder=named_base(base, tmp_path / "adapter", as_files))
    files = tokenizer_files(adapter, folder, SimpleNamespace(vocabulary=600))
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in files}
    assert "chat_template.jinja" not in [file.name for file in files]
    (folder / "chat_template.jinja").unlink()
    assert adapter.folder / "chat_template.jinja" in tokenizer_files(adapter, folder, SimpleNamespace(vocabulary=600))


def test_named_templates_are_read_of_a_remote_folder():
    names = [
        "config.json",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/a/b.jinja",
        "x/y.jinja",
    ]
    assert model_files(names) == ["additional_chat_templates/tool_use.jinja", "config.json"]
