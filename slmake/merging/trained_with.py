"""Whether an adapter was trained with what the base model's folder has: its chat template, its end token, and by name the model itself."""

import json
import re
from pathlib import Path

from slmake.errors import UserError
from slmake.merging.adapter import Adapter
from slmake.sources.chat_template import CONFIG, NAME, default_of
from slmake.sources.schemes import parse

SPECIAL = "special_tokens_map.json"
# The hub's name of a model. One without an organization looks like a folder.
HUB_NAME = re.compile(r"\w[\w.-]*/(?P<model>\w[\w.-]*)")
QUANTIZED = re.compile(r"(-unsloth)?-bnb-4bit$")  # the same model in 4 bits, which QLoRA trains on


def refuse_other_prompts(adapter: Adapter, base: Path) -> None:
    """Refuse an adapter whose folder has another chat template or end token than the base's: the merged model would have the base's.

    Raises:
        UserError: naming what differs. What the adapter's folder does not have is taken to be the base's.
    """
    config = _content(adapter.folder / CONFIG)
    template, end = _chat_template(adapter.folder, config), _end_token(adapter.folder, config)
    if template is None and end is None:
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    theirs = _default(tokenizer.chat_template)
    remedy = "or, if the adapter was trained without it, take it out of a local copy of the adapter."
    if template not in (None, theirs):
        raise UserError(
            f"{adapter.folder}: the adapter has a chat template of its own, and {base} has {'another' if theirs else 'none'}: prompts would "
            f"be others than in its training. Put the adapter's ({NAME}, or chat_template in {CONFIG}) into a file and name that in "
            f"fetch_model.chat_template; {remedy}"
        )
    if end not in (None, tokenizer.eos_token):
        known = f"Set eos_token to {end!r} in the {CONFIG} of a local copy of the base model, and name that copy in fetch_model.source; {remedy}"
        new = "Merge it where it was trained, and name that model, with its tokenizer, in fetch_model.source, without merge in all.stages."
        raise UserError(
            f"{adapter.folder}: the adapter's end token (eos_token in {CONFIG}) is {end!r}, that of {base} is {tokenizer.eos_token!r}: the "
            f"merged model would not stop where the adapter learned to. {known if end in tokenizer.get_vocab() else new}"
        )


def _chat_template(folder: Path, config: dict) -> str | None:
    """A folder's chat template, from the places where transformers' tokenizers look; None if there is none."""
    file = folder / NAME
    return _default(
        file.read_text(encoding="utf-8", errors="replace") if file.is_file() else config.get("chat_template")
    )


def _default(template: object) -> str | None:
    """A chat template's text; of several named ones the default. Line ends and a last one are left out: Jinja reads them alike."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return default_of(template.replace("\r\n", "\n").removesuffix("\n")) if isinstance(template, str) else None


def _end_token(folder: Path, config: dict) -> str | None:
    """The text of a folder's end-of-sequence token; None if none is named."""
    token = config.get("eos_token") or _content(folder / SPECIAL).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _content(file: Path) -> dict:
    """A JSON object of the adapter's folder; empty without the file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: not a JSON object. Download it again.")
    return content


def other_base(adapter: Adapter, base: Path, source: str) -> str | None:
    """A warning where the adapter names another model of the hub than the one that was fetched; None where either is no hub's name.

    A copy of the same name, of another organization or in 4 bits, is the same model.

    Args:
        source: the base model's, as fetch_model has it.
    """
    trained_on, fetched = adapter.config.get("base_model_name_or_path") or "", parse(source)
    match = HUB_NAME.fullmatch(trained_on)
    if not match or fetched.kind != "hf" or trained_on == base.as_posix():
        return None
    names = {QUANTIZED.sub("", name.casefold()) for name in (match["model"], fetched.name.rpartition("/")[2])}
    if len(names) == 1:
        return None
    return (
        f"warning: the adapter was trained on {trained_on}, and the base model is {fetched.name}. If these are not the same weights, "
        "name the adapter's in fetch_model.source."
    )
