"""A model's tokenizer.json read as it is: some classes of transformers put another pre-tokenizer or normalizer in its place."""

import json
from pathlib import Path

from slmake import cli, outputs
from slmake.errors import UserError
from slmake.hard_texts import HARD_TEXTS

AS_IT_IS = "TokenizersBackend"  # transformers' class that changes nothing of the file


def restore_tokenizer(folder: Path, source: str, job: cli.Job) -> None:
    """Name another class in tokenizer_config.json where the one that transformers takes gives other ids than tokenizer.json.

    Args:
        folder: a checked model folder, which is changed in place.
        source: where the model comes from, for messages.

    Raises:
        UserError: transformers takes its own class for this type of model, whatever the file names.
    """
    other = _difference(folder)
    if not other:
        return
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    outputs.write_json(path, {**config, "tokenizer_class": AS_IT_IS})
    if _difference(folder):
        raise UserError(
            f"{source}: transformers does not read tokenizer.json as it is: {other}. That is its class for this model_type, whatever "
            "tokenizer_class says, so training would give the model other tokens than it knows. Choose a base model that it reads."
        )
    job.say(
        f"warning: tokenizer_class is {AS_IT_IS} in the copy of {source}, so that tokenizer.json is read as it is: {other}"
    )


def _difference(folder: Path) -> str | None:
    """The first text of which transformers makes other tokens than tokenizer.json does, in words; None if there is none.

    Neither adds special tokens, and texts that hold such are left out: tokenizer_config.json may name more of them. So is white space
    around a text: Llama 2's class joins it otherwise than the file.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    plain = Tokenizer.from_file(str(file))
    read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    plain.no_truncation()
    plain.no_padding()
    for text in (text.strip(" ") for text in HARD_TEXTS if "<" not in text):
        expected = plain.encode(text, add_special_tokens=False).ids
        ids = read(text, add_special_tokens=False)["input_ids"]
        if ids != expected:
            return f"of {text!r} its {type(read).__name__} makes {ids}, the file {expected}"
    return None
