"""A model's tokenizer.json read as it is: some classes of transformers put another pre-tokenizer or normalizer in its place."""

import json
from collections.abc import Iterable
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
    other, behind = _differences(folder)
    if not (other or behind):
        return
    path = folder / "tokenizer_config.json"
    before = path.read_bytes() if path.exists() else None
    outputs.write_json(path, {**json.loads(before or "{}"), "tokenizer_class": AS_IT_IS})
    left = _differences(folder)
    if other and left[0]:
        raise UserError(
            f"{source}: transformers does not read tokenizer.json as it is: {other}. That is its class for this model_type, whatever "
            "tokenizer_class says, so training would give the model other tokens than it knows. Choose a base model that it reads."
        )
    if not other and any(left):  # tokenizer_config.json says more of its special tokens than the file
        path.unlink() if before is None else outputs.replace(path, before)
        return
    job.say(
        f"warning: tokenizer_class is {AS_IT_IS} in the copy of {source}, so that tokenizer.json is read as it is: {other or behind}"
    )


def _differences(folder: Path) -> tuple[str | None, str | None]:
    """The first text of which transformers makes other tokens than tokenizer.json does, in words; None if there is none.

    Neither adds special tokens. White space around a text is left out: Llama 2's class joins it otherwise than the file.

    Returns:
        That of texts without special tokens, and that of texts around those that both have, as a chat has them: tokenizer_config.json
        may name more.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None, None
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    plain = Tokenizer.from_file(str(file))
    read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    plain.no_truncation()
    plain.no_padding()
    both = [token for token in read.all_special_tokens if plain.token_to_id(token) == read.convert_tokens_to_ids(token)]
    forms = ("{0}[INST] a{0}b", "{0}\na {0}b", "a{0}\n{0}user\nb")

    def difference(texts: Iterable[str]) -> str | None:
        for text in texts:
            expected = plain.encode(text, add_special_tokens=False).ids
            ids = read(text, add_special_tokens=False)["input_ids"]
            if ids != expected:
                return f"of {text!r} its {type(read).__name__} makes {ids}, the file {expected}"
        return None

    return (
        difference(text.strip(" ") for text in HARD_TEXTS if "<" not in text),
        difference(form.format(token) for token in both for form in forms),
    )
