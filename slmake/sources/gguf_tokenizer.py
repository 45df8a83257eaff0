"""A GGUF file's tokenizer, as llama.cpp and the model's own tokenizer.json have it: transformers reads some of it otherwise."""

import json
from pathlib import Path

from slmake.errors import UserError
from slmake.sources.gguf_header import ELSEWHERE

# How a byte-level vocabulary splits text (tokenizer.ggml.pre; llama.cpp's llama-vocab.cpp), where transformers has no entry and takes GPT-2's way.
GPT2_SPLIT = {
    "a.x-4.0",
    "exaone4",
    "gigachat",
    "gpt-2",
    "granite-docling",
    "jais",
    "mellum",
    "mpt",
    "olmo",
    "phi-2",
    "trillion",
}
DIGITS_SPLIT = {
    "codeshell",
    "command-r",
    "exaone",
    "minerva-7b",
    "refact",
    "smollm",
    "starcoder",
}  # so, after each digit alone
# A part of the text that is a token is not merged from its letters.
WHOLE_PARTS = {
    "falcon-h1",
    "falcon3",
    "jina-v5-nano",
    "lfm2",
    "llama-bpe",
    "llama-v3",
    "llama3",
    "midm-2.0",
    "pixtral",
    "tekken",
}
# A text begins with the begin token, unless the file says otherwise.
BEGIN = {"llama-bpe", "llama-v3", "llama3", "tekken"}
COMPOSED = {"deepseek-r1-qwen", "qwen2", "qwen35"}  # Qwen's own tokenizers compose characters (NFC)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
# Tokens that close a turn, by their text, as llama.cpp finds them (llama-vocab.cpp).
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<end_of_utterance>",
    "_<EOT>",
    "< EOT >",
)
# Phi-3's own tokenizer takes the white space behind all of its added tokens away, but of these.
KEEPS_SPACE = {"<unk>", "<s>", "<|endoftext|>"}


def load(file: Path, link: Path):
    """Read the tokenizer of a GGUF file.

    Args:
        file: its name in messages.
        link: the file in a folder of its own, in which tokenizer.json and tokenizer_config.json are written.

    Raises:
        UserError: transformers does not know how it splits text, or tokens have no number of their own.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, vocabulary, config = get_gguf_tokenizer(str(link))
    kind, tokens = vocabulary.get("tokenizer_type"), vocabulary["tokens"]
    split = vocabulary["pre_tokenizer_type"] = _split(file, architecture, vocabulary)
    backend: Tokenizer = convert_gguf_tokenizer(architecture, vocabulary)[0]
    if kind == "gpt2":
        _set_byte_level(backend, split)
    elif kind == "llama" and not architecture.startswith("gemma"):  # Gemma's is right: it never adds a space
        _set_sentencepiece(backend, vocabulary.get("add_prefix_space", True), tokens)
    content = json.loads(backend.to_str())
    if kind == "gpt2":  # transformers re-spells tokens that have other characters than the byte alphabet's
        content["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    content["added_tokens"] = _added_tokens(architecture, vocabulary, config, content["model"]["vocab"])
    folder = link.parent
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    # Set here: transformers takes neither from a folder with a tokenizer.json.
    tokenizer.add_bos_token = config.get("add_bos_token", kind == "gpt2" and split in BEGIN)
    tokenizer.add_eos_token = config.get("add_eos_token", False)
    _check_numbers(file, tokens, tokenizer.get_vocab())
    return tokenizer


def _split(file: Path, architecture: str, vocabulary: dict) -> str | None:
    """The name of a vocabulary's way to split text; refuse where transformers would take another model's."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = vocabulary.get("pre_tokenizer_type")
    if architecture == "qwen2" and split in (None, "default"):
        return "qwen2"  # files of before April 2024
    if vocabulary.get("tokenizer_type") == "gpt2" and split not in {
        *GGUF_PRE_TOKENIZER_SPLITS,
        *GPT2_SPLIT,
        *DIGITS_SPLIT,
    }:
        raise UserError(
            f"{file}: tokenizer.ggml.pre is {split!r}: transformers does not know how this tokenizer splits text, and would take GPT-2's way: "
            f"other tokens than the model was trained with. {ELSEWHERE}"
        )
    return split


def _set_byte_level(backend, split: str) -> None:
    """Let a byte-level tokenizer normalize, split and merge text as the model's own does."""
    from tokenizers import normalizers, pre_tokenizers

    if split in DIGITS_SPLIT:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if split in COMPOSED:
        backend.normalizer = normalizers.NFC()
    if split in WHOLE_PARTS:
        backend.model.ignore_merges = True


def _set_sentencepiece(backend, prefix: bool, tokens: list[str]) -> None:
    """Add a space before a text, and before what follows a special token, or none.

    transformers adds it before a text alone, if it has none of its own. So does Mistral's third version of its tokenizer, the first in
    which `[INST]` is a token; Llama 2's and those made of it do not.
    """
    from tokenizers import decoders, normalizers

    if prefix and "[INST]" in tokens:
        return
    space = "\u2581"
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(space)] if prefix else []), normalizers.Replace(" ", space)]
    )
    parts = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if prefix else [])])


def _added_tokens(architecture: str, vocabulary: dict, config: dict, numbers: dict[str, int]) -> list[dict]:
    """The tokens that are found whole in text, as tokenizer.json lists them; special are all but user-defined ones that have no role.

    Args:
        config: tokenizer_config.json.
        numbers: the vocabulary as the tokenizer spells it: Gemma's has other spaces than the file's.
    """
    spelled = {number: token for token, number in numbers.items()}
    roles = {config[role] for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    kinds = vocabulary.get("token_type") or [NORMAL] * len(vocabulary["tokens"])
    phi3 = architecture == "phi3" and vocabulary["tokenizer_type"] == "llama"
    return [
        {
            "id": number,
            "content": spelled[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": phi3 and token not in KEEPS_SPACE,
            "normalized": False,
            "special": kind != USER_DEFINED or token in roles or token in TURN_ENDS,
        }
        for number, (token, kind) in enumerate(zip(vocabulary["tokens"], kinds, strict=True))
        if number in spelled and (kind in (UNKNOWN, CONTROL, USER_DEFINED) or token in roles)
    ]


def _check_numbers(file: Path, tokens: list[str], vocabulary: dict[str, int]) -> None:
    """Refuse a tokenizer that has not each number of the file's list of tokens once, and no more."""
    numbers = set(vocabulary.values())
    lost = [token for number, token in enumerate(tokens) if number not in numbers]
    lost += [token for token, number in vocabulary.items() if number >= len(tokens)]
    if lost:
        raise UserError(
            f"{file}: the token {lost[0]!r} has not a number of its own among the {len(tokens):,} of tokenizer.ggml.tokens, as transformers "
            f"reads them: texts would become other tokens than the model was trained with. {ELSEWHERE}"
        )
