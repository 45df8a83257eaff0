"""A GGUF file's tokenizer gives the tokens that llama.cpp and the model's own tokenizer.json give."""

from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from slmake.errors import UserError
from slmake.sources import gguf_tokenizer

BYTES = [*sorted(ByteLevel.alphabet()), "ab"]  # and what they merge to: number 256
# Two letters of three bytes each, and a space of SentencePiece: none of the byte alphabet.
END, USER, ASSISTANT, BEGIN = "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>"


def load(folder: Path, architecture: str, model: str, tokens: dict[str, int], **given: object):
    """The tokenizer of a GGUF file that has nothing but a vocabulary.

    Args:
        tokens: the type of each.
        given: values of GGUFWriter's `add_…` methods.
    """
    from gguf import GGUFWriter

    file = folder / "model.gguf"
    writer = GGUFWriter(file, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(tokens.values()))
    for name, value in given.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return gguf_tokenizer.load(file, file)


def sentencepiece(folder: Path, architecture: str = "llama", more: dict[str, int] | None = None, **given: object):
    tokens = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    tokens |= dict.fromkeys(("▁h", "hi", "▁hi", "▁", "h", "i"), 1) | (more or {})
    scores = [-float(number) for number in range(len(tokens))]
    roles = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    return load(folder, architecture, "llama", tokens, token_scores=scores, **roles | given)


def byte_level(folder: Path, split: str, more: dict[str, int], **given: object):
    tokens = dict.fromkeys(BYTES, 1) | more
    numbers = {token: number for number, token in enumerate(tokens)}
    roles = {f"{role}_token_id": numbers[given.pop(role)] for role in ("bos", "eos") if role in given}
    return load(folder, "llama", "gpt2", tokens, tokenizer_pre=split, token_merges=["a b"], **roles, **given)


def pieces(tokenizer, text: str, special: bool = False) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=special)["input_ids"])


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_white_space_behind_a_special_token_of_phi3_is_no_token(tmp_path, architecture):
    """Its chat template writes a line break behind each mark, which its tokenizer takes away."""
    marks = {"<|endoftext|>": 3, "<|assistant|>": 3, "<|end|>": 4, "<|user|>": 3}
    tokenizer = sentencepiece(tmp_path, architecture, marks)
    found = pieces(tokenizer, "<|user|>\nhi<|end|>\n<|assistant|>\n")
    if architecture == "phi3":
        assert found == ["<|user|>", "▁hi", "<|end|>", "<|assistant|>"]
    else:
        assert found.count("<0x0A>") == 3
    assert pieces(tokenizer, "</s>\n")[1:] == ([] if architecture == "phi3" else ["▁", "<0x0A>"])
    assert pieces(tokenizer, "<s>\n<|endoftext|>\n").count("<0x0A>") == 2


def test_bytes_of_phi4_keep_the_white_space(tmp_path):
    """The same architecture with a byte-level vocabulary, whose tokens take nothing away."""
    tokens = dict.fromkeys(BYTES, 1) | {"<|user|>": 3}
    tokenizer = load(tmp_path, "phi3", "gpt2", tokens, tokenizer_pre="gpt-4o", token_merges=["a b"])
    assert pieces(tokenizer, "<|user|>\n") == ["<|user|>", "Ċ"]


@pytest.mark.parametrize(
    ("given", "expected", "behind"),
    [
        ({}, ["▁hi"], ["</s>", "▁hi"]),
        ({"add_space_prefix": True}, ["▁hi"], ["</s>", "▁hi"]),
        ({"add_space_prefix": False}, ["hi"], ["</s>", "hi"]),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_a_text_begins_with_a_space_where_the_file_says_so(tmp_path, given, expected, behind, architecture):
    tokenizer = sentencepiece(tmp_path, architecture, **given)
    assert pieces(tokenizer, "hi") == expected
    assert pieces(tokenizer, "</s>hi") == behind
    assert pieces(tokenizer, " hi") == (["▁hi"] if len(expected[0]) == 2 else ["▁", "▁hi"])
    assert pieces(tokenizer, "hi", special=True) == ["<s>", *expected]
    for text in ("hi", " hi", "  hi", "hi "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_text_behind_a_mark_of_mistral_gets_no_second_space(tmp_path):
    tokenizer = sentencepiece(tmp_path, more={"[INST]": 3, "[/INST]": 3})
    assert pieces(tokenizer, "hi[INST] hi[/INST]hi") == ["▁hi", "[INST]", "▁hi", "[/INST]", "hi"]


def test_tokens_in_other_characters_than_the_byte_alphabet_keep_their_numbers(tmp_path):
    """As in DeepSeek's distilled Qwen: control tokens, and user-defined ones that are no special tokens."""
    more = {END: 3, USER: 4, ASSISTANT: 4, BEGIN: 3, "<think>": 4}
    given = {"bos": BEGIN, "eos": END, "add_bos_token": True}
    tokenizer = byte_level(tmp_path, "deepseek-r1-qwen", more, **given)
    assert len(tokenizer) == 257 + len(more)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (257, 260)
    text = f"{BEGIN}{USER}hi{ASSISTANT}<think>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [260, 258, 71, 72, 259, 261]
    assert tokenizer("hi")["input_ids"][0] == 260
    assert tokenizer.decode([260, 258, 71, 259, 261, 257]) == f"{BEGIN}{USER}h{ASSISTANT}<think>{END}"
    assert tokenizer.decode([260, 258, 71, 257], skip_special_tokens=True) == f"{USER}h"


@pytest.mark.parametrize(
    ("split", "given", "begins"),
    [
        ("llama-bpe", {}, True),
        ("tekken", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("qwen2", {}, False),
        ("qwen2", {"add_bos_token": True}, True),
    ],
)
def test_a_text_begins_with_the_begin_token_as_the_model_s_own(tmp_path, split, given, begins):
    tokenizer = byte_level(tmp_path, split, {"<|begin|>": 3, "<|end|>": 3}, bos="<|begin|>", eos="<|end|>", **given)
    assert pieces(tokenizer, "h", special=True) == ["<|begin|>"] * begins + ["h"]


def test_a_file_without_a_begin_token_adds_none(tmp_path):
    assert pieces(byte_level(tmp_path, "llama-bpe", {"<|end|>": 3}, eos="<|end|>"), "h", special=True) == ["h"]


@pytest.mark.parametrize(("split", "expected"), [("llama-bpe", ["abab"]), ("qwen2", ["ab", "ab"])])
def test_a_part_that_is_a_token_is_not_merged_from_its_letters_in_llama3(tmp_path, split, expected):
    assert pieces(byte_level(tmp_path, split, {"abab": 1}), "abab") == expected


@pytest.mark.parametrize(("split", "composed"), [("qwen2", True), ("deepseek-r1-qwen", True), ("llama-bpe", False)])
def test_qwen_composes_characters(tmp_path, split, composed):
    tokenizer = byte_level(tmp_path, split, {"<|end|>": 3})
    assert (pieces(tokenizer, "e\u0301") == pieces(tokenizer, "\u00e9")) == composed


def test_an_end_token_that_is_user_defined_is_special(tmp_path):
    """As older files of models with ChatML have it."""
    tokenizer = byte_level(tmp_path, "gpt-2", {"<|im_start|>": 4, "<|im_end|>": 4}, eos="<|im_end|>")
    assert tokenizer.decode([257, 64, 258], skip_special_tokens=True) == "<|im_start|>" + tokenizer.decode([64])


def test_user_defined_spaces_are_found_whole(tmp_path):
    """They have a number of their own beside the same bytes of the vocabulary."""
    tokenizer = byte_level(tmp_path, "gpt-2", {"ĠĠ": 1, "  ": 4})
    assert tokenizer("a  b", add_special_tokens=False)["input_ids"][1] == 258


def test_a_token_without_a_number_of_its_own_is_refused(tmp_path, monkeypatch):
    from gguf import GGUFWriter

    add = GGUFWriter.add_token_list
    monkeypatch.setattr(GGUFWriter, "add_token_list", lambda writer, tokens: add(writer, [*tokens[:-1], "cd"]))
    with pytest.raises(UserError, match="the token 'cd' has not a number of its own among the 259 of"):
        byte_level(tmp_path, "gpt-2", {"cd": 1, "last": 1})


def test_a_user_defined_token_that_closes_turns_is_special(tmp_path):
    """Generation ends there, and no answer has it as text: llama.cpp makes a control token of it."""
    tokenizer = byte_level(tmp_path, "gpt-2", {"<|end|>": 4, "<|im_end|>": 4, "<tool>": 4}, eos="<|end|>")
    assert tokenizer.decode([64, 258, 259], skip_special_tokens=True) == tokenizer.decode([64]) + "<tool>"
