"""A user's chat template in place of the base model's own, for every folder that is made of the base model."""

import codecs
import hashlib
import json
from pathlib import Path

from slmake import bounded_jinja, outputs
from slmake.errors import UserError, first_line

NAME = "chat_template.jinja"  # where transformers and onnxruntime-genai look first
# Older places of chat templates, which transformers would still read beside the file.
CONFIG, FILE, FOLDER = "tokenizer_config.json", "chat_template.json", "additional_chat_templates"


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
    (folder / NAME).write_bytes(content)
    (folder / FILE).unlink(missing_ok=True)
    outputs.remove(folder / FOLDER)
    config = folder / CONFIG
    if config.exists():
        written = json.loads(config.read_text(encoding="utf-8"))
        if written.pop("chat_template", None) is not None:
            outputs.write_json(config, written)
    return {"chat_template": {"source": file.as_posix(), "sha256": hashlib.sha256(given).hexdigest()}}
