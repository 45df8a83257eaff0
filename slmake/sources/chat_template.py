"""One chat template for every folder that is made of the base model: a user's in place of its own, or its named ones in one."""

import codecs
import hashlib
import json
from pathlib import Path

from slmake import bounded_jinja, outputs
from slmake.errors import UserError, first_line

NAME = "chat_template.jinja"  # where transformers and onnxruntime-genai look first
# Older places of chat templates, which transformers would still read beside the file.
CONFIG, FILE, FOLDER = "tokenizer_config.json", "chat_template.json", "additional_chat_templates"
# Between two templates in one. The empty texts keep Jinja from trimming at the seams.
TOOLS, OTHERWISE, END = "{% if tools %}{{ '' }}", "{{ '' }}{% else %}{{ '' }}", "{{ '' }}{% endif %}"
NO_DEFAULT = "{{ raise_exception('this model has a chat template for rows with tools only') }}"


def join_named_templates(folder: Path) -> None:
    """Write a model folder's templates `default` and `tool_use` as one: transformers takes the second where tools are given, and the
    runtime reads one file."""
    from transformers import AutoTokenizer

    named = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True).chat_template
    if isinstance(named, dict) and "tool_use" in named:
        # Jinja leaves out a template's last line end.
        tool_use, default = (text.removesuffix("\n") for text in (named["tool_use"], named.get("default", NO_DEFAULT)))
        _write(folder, (TOOLS + tool_use + OTHERWISE + default + END).encode())


def default_of(template: str) -> str:
    """The part of a chat template for rows without tools, where it is of two."""
    return template.removesuffix(END).rpartition(OTHERWISE)[2]


def replace_chat_template(folder: Path, file: Path) -> dict:
    """Put the template of `fetch_model.chat_template` into a model folder. Returns what results/base.json says of it.

    Raises:
        UserError: there is no such file, or it is not a Jinja template.
    """
    import jinja2

    where = f"fetch_model.chat_template: {file}"
    try:
        given = file.read_bytes()
        content = given.removeprefix(codecs.BOM_UTF8)  # which editors write, and every prompt would begin with
        with bounded_jinja.refusals(where, "this template", "Correct the file."), bounded_jinja.bounded():
            bounded_jinja.compiled(content.decode())
    except OSError:
        raise UserError(f"{where}: no such file. Correct the name, or bring the file back.") from None
    except (UnicodeDecodeError, jinja2.TemplateError) as error:
        raise UserError(f"{where}: not a Jinja template: {first_line(error)}. Correct the file.") from None
    _write(folder, content)
    return {"chat_template": {"source": file.as_posix(), "sha256": hashlib.sha256(given).hexdigest()}}


def _write(folder: Path, content: bytes) -> None:
    """Put a template into a model folder, and take out all others."""
    (folder / NAME).write_bytes(content)
    (folder / FILE).unlink(missing_ok=True)
    outputs.remove(folder / FOLDER)
    config = folder / CONFIG
    if config.exists():
        written = json.loads(config.read_text(encoding="utf-8"))
        if written.pop("chat_template", None) is not None:
            outputs.write_json(config, written)
