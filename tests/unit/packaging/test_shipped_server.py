"""What a package opens with elsewhere: its own server, and the files that Foundry Local and AI Toolkit read."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from package_script import pack
from served import CHAT, WEATHER, export

from slmake import generation
from slmake.packaging import local_runtimes

TEXT = "We buried the old dog"


@contextlib.contextmanager
def server(folder: Path, *arguments: str) -> Iterator[openai.OpenAI]:
    """A client of serve.py, which is started in its folder without the project on its path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "serve.py", "--port", "0", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=variables) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serve: tone-of-phrases on http://127.0.0.1:"), line
            url = line.split(" on ")[1].split(",")[0]
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        finally:
            process.terminate()


def loaded(folder: Path) -> generation.Exported:
    return generation.Exported(folder, json.loads((folder / "prompt.json").read_text(encoding="utf-8")))


def test_serve_py_answers_as_the_pipeline_does(packed, tmp_path):
    """Beside files with the names of modules, which it must not take for them."""
    folder = Path(shutil.copytree(packed, tmp_path / "package"))
    for name in ("json", "starlette", "slmake"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} of the package was run')\n")
    with server(folder) as client:
        asked = {"model": "tone-of-phrases", "messages": [{"role": "user", "content": TEXT}]}
        assert client.chat.completions.create(**asked).choices[0].message.content == loaded(packed).answer(TEXT)
        streamed = client.chat.completions.create(stream=True, **asked)
        assert "".join(event.choices[0].delta.content or "" for event in streamed) == loaded(packed).answer(TEXT)


def test_a_constrained_package_answers_with_labels_only(parts, tmp_path):
    folder = pack(parts, tmp_path, constrain="labels")
    labels = loaded(folder).form["labels"]
    done = subprocess.run([sys.executable, str(folder / "run.py"), TEXT], capture_output=True, text=True)
    assert done.stdout.strip() in labels
    assert json.loads((folder / "prompt.json").read_text())["guidance"] == {
        "kind": "regex",
        "data": " ?(?:fear|joy|sadness|surprise)",
    }


def test_the_name_and_the_prompt_stand_where_foundry_local_looks(packed):
    """Any runtime that applies the chat template writes the prompt of training."""
    model = loaded(packed)
    written = json.loads((packed / "inference_model.json").read_text(encoding="utf-8"))
    assert written["Name"] == "tone-of-phrases"
    assert written["PromptTemplate"]["assistant"] == "{Content}"
    assert written["PromptTemplate"]["prompt"].replace("{Content}", TEXT) == model.prompt(TEXT)
    for text in (TEXT, 'größer "x" {{y}} {% z %}\n'):
        messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": text}]
        applied = model.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        assert applied == model.prompt(text)


def test_a_model_of_chats_keeps_its_template(tmp_path, base):
    folder = export(base, tmp_path / "onnx")
    before = (folder / "chat_template.jinja").read_bytes()
    form = {**CHAT, "chat": {**CHAT["chat"], "answer_prefix": "<think></think>"}}
    form["system"] = {"role": "system", "content": "Be kind"}
    local_runtimes.write(folder, "chats", form)
    assert (folder / "chat_template.jinja").read_bytes() == before
    prompt = json.loads((folder / "inference_model.json").read_text())["PromptTemplate"]["prompt"]
    assert prompt.replace("{Content}", "Hi") == generation.Exported(folder, form).prompt("Hi")
    assert "Be kind" in prompt
    assert WEATHER["function"]["name"] not in prompt
    form["tools"] = [WEATHER]  # which all rows have
    local_runtimes.write(folder, "chats", form)
    prompt = json.loads((folder / "inference_model.json").read_text())["PromptTemplate"]["prompt"]
    assert prompt.replace("{Content}", "Hi") == generation.Exported(folder, form).prompt("Hi")
    assert WEATHER["function"]["name"] in prompt


@pytest.mark.parametrize(
    ("form", "template"),
    [
        ({"prompt": "{a}: {a}\n", "fields": ["a"]}, "{Content}: {Content}\n"),
        ({"prompt": "{{x}} {a}", "fields": ["a"]}, "{x} {Content}"),
        ({"prompt": "{a} and {b}", "fields": ["a", "b"]}, None),
    ],
    ids=["twice", "braces", "two fields"],
)
def test_prompt_templates(tmp_path, base, form, template):
    folder = export(base, tmp_path / "onnx", "the base's")
    local_runtimes.write(folder, "texts", {**CHAT, **form})
    written = json.loads((folder / "inference_model.json").read_text())["PromptTemplate"]
    if template is None:
        assert written is None
        assert (folder / "chat_template.jinja").read_text() == "the base's"
        return
    assert written["prompt"] == template
    applied = generation.Exported(folder, {**CHAT, **form}).tokenizer.apply_chat_template(
        json.dumps([{"role": "user", "content": "Hi"}])
    )
    assert applied == template.replace("{Content}", "Hi")


def test_serve_py_names_a_library_that_is_not_there(packed):
    done = subprocess.run([sys.executable, "-S", "serve.py"], cwd=packed, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "serve.py: error: No module named 'pydantic'\n")
