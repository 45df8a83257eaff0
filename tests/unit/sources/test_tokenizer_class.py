"""A tokenizer.json is read as it is, whatever class of transformers replaces parts of it; special tokens are no difference."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fetch_script import fetch, refused
from tiny import make_model
from tokenizers import Tokenizer

from slmake.data.tokenize import load_tokenizer
from slmake.hard_texts import HARD_TEXTS
from slmake.sources.tokenizer_class import restore_tokenizer

# Before bytes become tokens, words are not split at spaces as GPT-2 does it, but at digits and after capitals.
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\d|[A-Z]|of|th|he"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
START = {  # <|start|> before every text
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}},
}


def changed(folder: Path, kind: str, **parts: object) -> Path:
    """The folder with parts of tokenizer.json, and the class that tokenizer_config.json names."""
    for name, values in (("tokenizer.json", parts), ("tokenizer_config.json", {"tokenizer_class": kind})):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, **values}), encoding="utf-8")
    return folder


def same(folder: Path) -> bool:
    """Whether a folder's tokenizer passes, unchanged and without a word."""
    before, said = (folder / "tokenizer_config.json").read_bytes(), []
    restore_tokenizer(folder, "here", SimpleNamespace(say=said.append))
    return not said and (folder / "tokenizer_config.json").read_bytes() == before


def test_a_class_that_replaces_the_pre_tokenizer_is_replaced(tmp_path, capsys, broken):
    folder, _ = fetch(tmp_path, changed(broken, "GPT2Tokenizer", pre_tokenizer=DIGITS))
    text = "The other 4523 of them"
    ids = Tokenizer.from_file(str(broken / "tokenizer.json")).encode(text).ids
    assert load_tokenizer(folder)(text)["input_ids"] == ids != load_tokenizer(broken)(text)["input_ids"]
    assert f"warning: tokenizer_class is TokenizersBackend in the copy of {broken}, so that" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_class_that_reads_the_file_stays(broken, kind):
    assert same(changed(broken, kind, pre_tokenizer=DIGITS))


def test_a_model_type_with_one_tokenizer_only_is_refused(tmp_path, capsys):
    model = changed(make_model(tmp_path / "model", "qwen2"), "TokenizersBackend", pre_tokenizer=DIGITS)
    message = refused(tmp_path, capsys, model)
    assert f"{model}: transformers does not read tokenizer.json as it is: of " in message
    assert "its Qwen2Tokenizer makes [" in message


@pytest.mark.parametrize("kind", ["TokenizersBackend", "GPT2Tokenizer"])
def test_added_special_tokens_truncation_and_padding_are_no_difference(broken, kind):
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"}  # fmt: skip
    assert same(changed(broken, kind, post_processor=START, truncation=cut, padding=fill))


def test_a_folder_without_tokenizer_json_has_none_to_compare(tmp_path):
    restore_tokenizer(tmp_path, "here", None)


def test_texts_that_name_special_tokens_are_left_out(broken):
    """tokenizer_config.json may name a token that tokenizer.json does not have: it is added, and meant so."""
    assert any("<bos>" in text for text in HARD_TEXTS)
    path = broken / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "bos_token": "<bos>"}), encoding="utf-8")
    assert same(broken)


def test_what_the_configuration_says_of_special_tokens_is_meant_so(broken):
    """That white space behind one belongs to it, for example: no class reads the file otherwise, so none is named."""
    path = broken / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    number = Tokenizer.from_file(str(broken / "tokenizer.json")).token_to_id("<|end|>")
    token = {"content": "<|end|>", "rstrip": True, "lstrip": False, "normalized": False, "single_word": False}
    decoder = {str(number): token | {"special": True}}
    path.write_text(json.dumps({**config, "added_tokens_decoder": decoder}), encoding="utf-8")
    assert load_tokenizer(broken)("a<|end|>\n b")["input_ids"] == load_tokenizer(broken)("a<|end|>b")["input_ids"]
    assert same(broken)
