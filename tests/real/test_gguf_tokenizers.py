"""Real tokenizers: what is made of a GGUF file with their vocabulary gives the tokens that their own tokenizer.json gives."""

import json

import pytest
import real_tokenizers
from tokenizers import Tokenizer

from slmake.hard_texts import HARD_TEXTS
from slmake.sources import gguf_tokenizer

TEXTS = (
    *HARD_TEXTS,
    "Hello world",
    " lead",
    "x</s>y",
    "     five",
    "\t\t tabs",
    "<think> hm </think>",
    "internationalization 안녕하세요",
)
CHATS = (
    [{"role": "user", "content": "  two "}],
    [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "cafe\u0301"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "It's 12345\n\n"},
    ],
)
pytestmark = pytest.mark.real


@pytest.mark.parametrize("kind", ["llama2", "llama3_1", "qwen3"])  # gemma3 takes half a minute
def test_a_gguf_file_gives_the_tokens_of_the_model_s_own_tokenizer(tmp_path, kind):
    file = tmp_path / "model.gguf"
    folder = real_tokenizers.write_gguf_vocabulary(kind, file)
    tokenizer, own = gguf_tokenizer.load(file, file), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab() == own.get_vocab()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
        assert getattr(tokenizer, name) == config.get(name), name
    chats = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in CHATS
        if tokenizer.chat_template
    ]
    assert bool(chats) == (kind != "llama2")  # its package has no template
    for text in (*TEXTS, *chats):
        for special in (False, True):
            ids = own.encode(text, add_special_tokens=special).ids
            assert tokenizer(text, add_special_tokens=special)["input_ids"] == ids, text
            assert tokenizer.decode(ids, skip_special_tokens=special) == own.decode(ids, skip_special_tokens=special)
