"""Exported models: text becomes the tokens of training, and a text that does not fit is refused."""

import json
import shutil
import types
import unicodedata
from pathlib import Path

import pytest
from served import TEMPLATE
from tiny import make_model

from slmake import generation, openai_api, params
from slmake.answer_stream import Stream
from slmake.data.chat import ChatTemplate
from slmake.data.conversation import read_conversation
from slmake.data.store import Row
from slmake.data.template import Conversations, FieldTemplate
from slmake.data.tokenize import Tokenize, truncate
from slmake.errors import UserError
from slmake.export import builder
from slmake.scoring import onnx_runner, tokenizers
from slmake.scoring.questions import Questions
from tools import ask

FORM = {"prompt": "### {phrase} ({{x}})\n", "fields": ["phrase"], "end_token_id": 0, "longest_answer_tokens": 3}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, base) -> Path:
    """The tiny base as ONNX in float32; do not write into it."""
    folder = tmp_path_factory.mktemp("exported")
    section = params.Quantize(precision="fp32", algo_config="rtn", matmul_mixed_precision=None)
    builder.export(section, base, folder, folder.parent / "cache")
    return folder


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def with_begin(folder: Path, base: Path):
    """The tiny tokenizer with a begin token before, and an end token after every text, as some have, and NFC."""
    from tokenizers import normalizers, processors

    tokenizer = tokenizer_of(base)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 0)]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer_of(folder)


def section(limit: int = 64) -> params.Prepare:
    return params.Prepare(source="rows.json", text_template="{a}{b}", max_seq_len=limit)


def test_prompt_fills_the_template_in(exported):
    model = generation.Exported(exported, FORM)
    assert model.prompt("a {b}") == "### a {b} ({x})\n"
    two = generation.Exported(exported, {**FORM, "prompt": "{a}-{b}", "fields": ["a", "b"]})
    assert two.prompt("1", "2") == "1-2"
    assert (model.provider, model.runs_on, model.context_length) == ("cpu", "cpu", 512)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], 'this model takes 1 text: "phrase". Given: 0.'),
        (["a", "b"], 'this model takes 1 text: "phrase". Given: 2.'),
        (["a\0b"], "the text holds a NUL character"),
        (["a\udcff"], "the text is not UTF-8"),
        (["word " * 600], "the text is too long: "),
    ],
    ids=["none", "two", "NUL", "bytes", "long"],
)
def test_texts_that_do_not_fit_are_refused(exported, texts, message):
    with pytest.raises(ValueError, match=message):
        generation.Exported(exported, FORM).answer(*texts)
    if len(texts) == 1:  # `ask` says the same
        with pytest.raises(UserError, match=message):
            ask.ask(generation.Exported(exported, FORM), texts[0], None)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", '{"a": 1}', "no JSON"])
def test_a_text_that_is_not_the_fields_is_refused(exported, text):
    two = generation.Exported(exported, {**FORM, "prompt": "{a}-{b}", "fields": ["a", "b"]})
    with pytest.raises(ValueError, match="the template has the fields a, b: give a JSON object with each"):
        openai_api.field_texts(two.form, text)


def test_begin_token_and_normalization_are_those_of_training(tmp_path, exported, base):
    """The closing token that this tokenizer adds is dropped, as in training."""
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    tokenizer = with_begin(folder, base)
    rules = Tokenize(section(), tokenizer, FieldTemplate(section())).inference()
    assert rules == {"begin_token_ids": [1], "normalization": "NFC"}
    text = "cafe\u0301"
    expected = tokenizer(text)["input_ids"][:-1]
    assert expected[0] == 1
    assert generation.Exported(folder, {**FORM, **rules}).encode(text) == expected
    assert generation.Exported(folder, FORM).encode(text) != expected
    chat = types.SimpleNamespace(special_tokens=False)  # a chat template writes the begin token itself
    assert Tokenize(section(), tokenizer, chat).inference() == {"normalization": "NFC"}
    assert Tokenize(section(), tokenizer_of(base), FieldTemplate(section())).inference() == {}


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_each_normal_form_is_recognized(base, form):
    from tokenizers import normalizers

    tokenizer = tokenizer_of(base)
    for normalizer in (getattr(normalizers, form)(), normalizers.Sequence([getattr(normalizers, form)()])):
        tokenizer.backend_tokenizer.normalizer = normalizer
        assert Tokenize(section(), tokenizer, FieldTemplate(section())).inference() == {"normalization": form}
    assert unicodedata.normalize(form, "\u00e9\ufb01") in ("\u00e9\ufb01", "e\u0301\ufb01", "\u00e9fi", "e\u0301fi")


def with_added_spaces(folder: Path):
    """A tokenizer as Gemma's, in which two and four spaces are added tokens, and a byte may be one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    bytes_and_text = [f"<0x{number:02X}>" for number in range(256)] + list("▁abc{}:")
    vocabulary = {token: i for i, token in enumerate(["<end>", "<unk>", *bytes_and_text])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(token, normalized="▁" in token) for token in ("\n", "▁▁", "▁▁▁▁")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    return tokenizer_of(folder)


def test_runs_of_spaces_are_written_as_training_writes_them(tmp_path, exported, base):
    """At once and piece by piece; a tokenizer that knows the character itself keeps it."""
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    tokenizer = with_added_spaces(folder)
    rules = Tokenize(section(), tokenizer, FieldTemplate(section())).inference()
    assert rules == {"space": "▁"}
    text = "a:\n    {b  c}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert {"▁▁", "▁▁▁▁"} < {*tokenizer.convert_ids_to_tokens(ids)}
    model = generation.Exported(folder, {**FORM, **rules})
    assert model.decode(ids) == tokenizer.decode(ids) == text
    assert generation.Exported(folder, FORM).decode(ids) != text  # else the runtime needs no help any more
    stream = Stream(model, [5], len(ids))
    stream.model = types.SimpleNamespace(text=model.text, steps=lambda *_, **__: iter(ids))
    assert "".join(stream) == stream.text == text
    plain = generation.Exported(exported, FORM)
    assert plain.decode(plain.encode("a▁b")) == "a▁b"


@pytest.mark.parametrize("begin", [None, 5])
def test_prompts_are_cut_as_in_training(exported, begin):
    """With room for the longest answer, whatever the answer of a row."""
    ids, longest = [5, *range(10, 40)], [1] * 6
    expected = truncate(ids, longest, 20, begin)
    assert generation.truncate(ids, 14, begin) == expected
    assert len(expected) == 14
    shorter = truncate(ids, longest[:2], 20, begin)  # what a row with a short answer has in the dataset
    assert generation.truncate(shorter, 14, begin) == expected
    assert generation.truncate(ids[:14], 14, begin) == ids[:14]
    form = {**FORM, "max_prompt_tokens": 4, "kept_token_id": None}
    whole = generation.Exported(exported, FORM).encode("a longer text than four tokens")
    assert generation.Exported(exported, form).encode("a longer text than four tokens") == whole[-4:]


def test_tokenize_says_how_it_cut(base):
    tokenize = Tokenize(section(limit=12), tokenizer_of(base), FieldTemplate(section(limit=12)))
    tokenize([Row("f", 1, "word " * 30, "joy", "word", "joy"), Row("f", 2, "a", "sadness", "a", "sadness is long")])
    rules = tokenize.inference()
    assert rules["max_prompt_tokens"] == 12 - tokenize.longest_answer
    assert rules["kept_token_id"] is None


@pytest.mark.parametrize("one", ["", "word " * 200], ids=["turns", "tokens"])
def test_a_long_chat_is_asked_without_the_turns_that_training_dropped(tmp_path, exported, base, one):
    """The system turn stays; where a single turn is too long, its first tokens go."""
    tokenizer = tokenizer_of(base)
    tokenizer.chat_template = TEMPLATE
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    template = Conversations("messages", ChatTemplate(tokenizer, {}, "2024-01-01"), "all")
    tokenize = Tokenize(section(limit=90), tokenizer, template)
    turns = [{"role": "system", "content": "Be kind."}]
    for number in range(6):
        said = f"question {number} {one * (number == 5)}"
        turns += [{"role": "user", "content": said}, {"role": "assistant", "content": f"answer {number}"}]
    last = tokenize([Row("f", 1, *template.render({"messages": turns}))], one_answer=True)[-1]
    model = generation.Exported(folder, template.inference() | tokenize.inference())
    prompt = last.ids[: last.labels.count(-100)]
    assert last.dropped > 0
    assert (last.cut > 0) == bool(one)
    assert model.encode(model.prompt(json.dumps(turns[:-1]))) == prompt
    assert model.shortened(turns[:2]) == turns[:2]
    assert ("max_prompt_tokens" in model.form) == bool(
        one
    )  # a turn that is longer than those of training is asked whole


def test_a_chat_is_asked_whole_where_training_dropped_nothing(exported):
    model = generation.Exported(exported, {**FORM, "prompt": None})
    turns = [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "a"}] * 6
    assert model.shortened(turns) is turns


def test_tokenizer_that_differs_is_counted_and_shown(tmp_path, exported, base, dataset):
    """The same export with a begin token in the rows but not in the runtime."""
    questions = Questions(dataset, 8)
    model = onnx_runner.load(exported, questions.form)
    agreement = tokenizers.compare(model, tokenizer_of(base), questions)
    assert (agreement["encode_differ"], agreement["decode_differ"]) == (0, 0)
    assert "first" not in agreement
    before = questions.prompts[3].tolist()
    questions.prompts[3] = questions.prompts[3][1:]
    agreement = tokenizers.compare(model, tokenizer_of(base), questions)
    assert agreement["encode_differ"] == 1
    named = tokenizer_of(base).convert_ids_to_tokens(before)
    assert agreement["first"] == {"row": questions.rows[3], "training": named[1:10], "runtime": named[:9]}


def test_chat_is_written_by_the_models_template(tmp_path, exported, base):
    """Options, date and what stands before an answer are those of training, also of a conversation."""
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {% endif %}{% if loud %}LOUD {% endif %}"
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat = {"template_kwargs": {"loud": True}, "date": "2024-01-02", "answer_prefix": "<think></think>"}
    model = generation.Exported(folder, {**FORM, "prompt": None, "fields": [], "chat": chat})
    assert model.prompt("Hi") == "02 Jan 2024 LOUD [user] Hi\n[assistant] <think></think>"
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    asked = "02 Jan 2024 LOUD [user] Hi\n[assistant] Yo\n[user] ?\n[assistant] <think></think>"
    assert model.prompt(json.dumps(turns)) == asked
    assert model.prompt("[1, 2]") == "02 Jan 2024 LOUD [user] [1, 2]\n[assistant] <think></think>"
    with pytest.raises(ValueError, match=r'takes 1 text: "text"\. Given: 2\.'):
        model.prompt("a", "b")
    model.form["system"] = {"role": "system", "content": "Be kind"}  # which all rows of training had
    behind = "02 Jan 2024 LOUD [system] Be kind\n"
    assert model.prompt("Hi") == f"{behind}[user] Hi\n[assistant] <think></think>"
    assert model.prompt(json.dumps(turns)) == behind + asked.removeprefix("02 Jan 2024 LOUD ")
    own = [{"role": "system", "content": "Be brief"}, turns[0]]
    expected = "02 Jan 2024 LOUD [system] Be brief\n[user] Hi\n[assistant] <think></think>"
    assert model.prompt(json.dumps(own)) == model.chat_prompt(own) == expected


CALL = {"name": "book", "arguments": '{"day": "x", "n": 1}'}
TOOL_TURN = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "developer", "content": "Be brief."}, HI],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]}],
        [HI, {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]}, TOOL_TURN],
        [HI, {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"function": CALL}]}, TOOL_TURN],
        [HI, {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOOL_TURN],
        [HI, {"role": "assistant", "content": "", "tool_calls": [{"name": "book", "arguments": ""}]}, TOOL_TURN],
        [HI, {"role": "assistant", "content": "yes<|end|> <|end|>\n"}, {"role": "user", "content": "Hi<|end|>"}],
        [HI, {"role": "assistant", "content": " yes\n"}, HI],
    ],
    ids=["developer", "parts", "call", "null", "bare", "none", "closed", "plain"],
)
def test_messages_are_asked_in_the_form_of_training(tmp_path, exported, base, turns):
    tokenizer = tokenizer_of(base)
    tokenizer.chat_template = TEMPLATE
    chat = ChatTemplate(tokenizer, {}, "2024-01-01")
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    form = Conversations("messages", chat, "all").inference()
    model = generation.Exported(folder, {**form, "system": {"role": "system", "content": "Be kind."}})
    system = [] if turns[0]["role"] == "developer" else [model.form["system"]]
    trained = read_conversation([*system, *turns, {"role": "assistant", "content": "x"}], closing=chat.closing).turns[
        :-1
    ]
    assert model.prompt(json.dumps(turns)) == chat.asked(trained)
    assert "None" not in chat.asked(trained)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"role": "function", "content": "a"},
            "message 2 has 'function', which training never has. Roles are system, user",
        ),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "message 2 has 'reasoning_content'"),
        ({"role": "assistant", "content": None}, "the content of message 2 is no text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "the content of message 2 is no text"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]},
            "message 2 has a call without a name",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "with arguments that are no JSON object",
        ),
        ({"role": "assistant", "tool_calls": 5}, "message 2 has a call"),
    ],
)
def test_messages_that_training_never_has_are_refused(turn, message):
    with pytest.raises(ValueError, match=message):
        generation._messages(json.dumps([HI, turn]))


@pytest.mark.parametrize(
    "text", ["[]", "[1, 2]", '[{"role": "user"}]', '[{"role": 5, "content": "a"}]', "{}", "[" * 10**5]
)
def test_a_text_that_is_no_list_of_messages_is_what_the_user_says(text):
    assert generation._messages(text) == [{"role": "user", "content": text}]


def test_short_prompts_of_a_model_with_a_window_are_answered(tmp_path):
    """ONNX Runtime refuses a cache that is smaller than the window."""
    model = make_model(tmp_path / "model", "mistral", sliding_window=64)
    (tmp_path / "onnx").mkdir()
    options = params.Quantize(precision="fp32", algo_config="rtn", matmul_mixed_precision=None)
    builder.export(options, model, tmp_path / "onnx", tmp_path / "cache")
    exported = generation.Exported(tmp_path / "onnx", FORM)
    assert exported.smallest_cache == 64
    assert 1 <= len(exported.generate([2, 3, 4], 4)) <= 4
    assert len(exported.generate(list(range(2, 202)), 4)) <= 4


@pytest.mark.parametrize(("terminal", "printed"), [(True, "a\ufffd[2Jb\n\tc"), (False, "a\x1b[2Jb\n\tc")])
def test_an_answer_cannot_command_the_terminal(monkeypatch, terminal, printed):
    """A model from elsewhere may say anything; a pipe gets it as it is."""
    monkeypatch.setattr(generation.sys, "stdout", types.SimpleNamespace(isatty=lambda: terminal))
    assert generation.shown("a\x1b[2Jb\n\tc") == printed
