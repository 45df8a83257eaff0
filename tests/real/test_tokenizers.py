"""Real tokenizers: the exported model reads the tokens of training, and run.py answers every test row as evaluate measured it."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import real_tokenizers
from tiny import write_params
from tokenizers import Tokenizer

from scripts import evaluate, prepare
from slmake import generation, prompts
from slmake.data.tokenize import load_tokenizer
from slmake.sources.tokenizer_class import restore_tokenizer

KINDS = ("llama2", "llama3_1", "qwen3", "gemma3")
TONES = ("sadness", "joy", "fear")
# White space that templates strip or keep, other forms of a character, and text that looks like the template's own tokens.
HARD = ["  two ", "line\nbreak\n", "<start_of_turn>user\n", "<bos>", "a\u00a0", "\u3000wide\u3000", "cafe\u0301", "{{ bos_token }}", "中文", "👩\u200d👧"]  # fmt: skip
pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny random Llama with a real tokenizer, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    real_tokenizers.exported(request.param, folder)
    return folder / "base", folder / "onnx"


@pytest.mark.parametrize("named", ["its own", "GPT2Tokenizer"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_each_is_read_as_it_is(tmp_path, kind, named):
    """unsloth/phi-4 names GPT2Tokenizer, which does not split numbers into threes as its file does."""
    folder = Path(shutil.copytree(real_tokenizers.packages() / f"tokenizer-{kind}" / "models", tmp_path / "model"))
    path, said = folder / "tokenizer_config.json", []
    config = json.loads(path.read_text(encoding="utf-8"))
    if named == "GPT2Tokenizer":
        path.write_text(json.dumps({**config, "tokenizer_class": named}), encoding="utf-8")
    restore_tokenizer(folder, "here", SimpleNamespace(say=said.append))
    assert bool(said) == (named == "GPT2Tokenizer")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("12345 + 67890", "It\u2019s  1.\n\n2. two", "ﬁne Ⅳ"):
        assert (
            load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
            == plain.encode(text, add_special_tokens=False).ids
        )


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_behind_special_ones_are_those_of_the_file(tmp_path, legacy):
    """Llama-2-chat and TinyLlama-chat (`legacy: false`): transformers puts another pre-tokenizer in the place of the file's normalizer."""
    folder = Path(shutil.copytree(real_tokenizers.packages() / "tokenizer-llama2" / "models", tmp_path / "model"))
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    path, said = folder / "tokenizer_config.json", []
    config = json.loads(path.read_text(encoding="utf-8")) | {"legacy": legacy, "tokenizer_class": "LlamaTokenizer"}
    path.write_text(json.dumps(config), encoding="utf-8")
    restore_tokenizer(folder, "here", SimpleNamespace(say=said.append))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<s>[INST] Say hi [/INST] hi</s>[INST] b [/INST]"
    assert (
        load_tokenizer(folder)(text, add_special_tokens=False).tokens()
        == plain.encode(text, add_special_tokens=False).tokens
    )
    assert len(said) == (not legacy)
    assert (json.loads(path.read_text(encoding="utf-8")) == config) == legacy


def rows(count: int, words: int = 1) -> list[dict]:
    """Phrases with what tokenizers often differ in."""
    hard = [
        "cafe\u0301 and jalapen\u0303o",
        "中文 and 日本語",
        "👩\u200d👧 at 3.5",
        "two  spaces\tand a tab",
        "It's WE'LL",
    ]
    return [
        {"phrase": f"{hard[i % 5]} number {i} " + f"of {7 * i} " * words, "tone": TONES[i % 3]} for i in range(count)
    ]


def score(folder: Path, base: Path, onnx: Path, data: list[dict], **section: object) -> tuple[dict, list[dict]]:
    """Prepare and evaluate in this process; returns the tokenizer's entry in metrics.json, and the predictions."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(data), encoding="utf-8")
    given = {"source": str(folder / "rows.json"), "test_fraction": 0.3, "near_duplicate_threshold": 1.0, **section}
    file = write_params(folder / "params.yaml", prepare=given, quantize=QUANTIZE)
    common = ["--params", file]
    report = ["--base", base, "--output", folder / "dataset", "--report", folder / "dataset.json"]
    prepare.main([str(argument) for argument in common + report])
    results = [f"--{name}={folder / file}" for name, file in RESULTS.items()]
    evaluate.main([str(argument) for argument in [*common, "--dataset", folder / "dataset", "--onnx", onnx, *results]])
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as handle:
        return json.loads((folder / "metrics.json").read_text())["parity"]["tokenizer"], list(csv.DictReader(handle))


QUANTIZE = {"precision": "fp32", "calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None}
RESULTS = {"metrics": "metrics.json", "benchmark": "benchmark.json", "predictions": "predictions.csv"}


def packaged(folder: Path, onnx: Path):
    """The class that run.py of a package with this export asks with."""
    shutil.copytree(onnx, folder / "package")
    shutil.copyfile(generation.__file__, folder / "package" / "run.py")
    shutil.copyfile(folder / "dataset" / "prompt.json", folder / "package" / "prompt.json")
    spec = importlib.util.spec_from_file_location("run", folder / "package" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Exported(folder / "package", json.loads((folder / "package" / "prompt.json").read_text()))


@pytest.mark.parametrize("limit", [160, 30], ids=["whole", "truncated"])
def test_text_is_answered_as_it_was_scored(family, tmp_path, limit):
    base, onnx = family
    data = rows(60, words=4)
    agreement, predictions = score(tmp_path / "run", base, onnx, data, max_seq_len=limit)
    assert (agreement["encode_differ"], agreement["decode_differ"]) == (0, 0)
    assert agreement["rows"] == len(predictions) > 10
    model = packaged(tmp_path / "run", onnx)
    assert ("max_prompt_tokens" in model.form) == (limit == 30)
    for row in predictions:
        answer = model.answer(data[int(row["row"]) - 1]["phrase"])
        assert prompts.read_answer(answer, ["joy"]) == row["fp32"]


def test_chat_is_answered_as_it_was_scored(family, tmp_path):
    base, onnx = family
    if not (onnx / "chat_template.jinja").exists():  # llama2's package has none: refused, and said
        with pytest.raises(SystemExit):
            score(tmp_path / "run", base, onnx, rows(30), text_template=None, answer=None, messages="turns")
        return
    data = [
        {"turns": [{"role": "user", "content": row["phrase"]}, {"role": "assistant", "content": row["tone"]}]}
        for row in rows(60)
    ]
    for entry in data[::2]:  # every other one with a turn before
        entry["turns"][:0] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    agreement, predictions = score(
        tmp_path / "run", base, onnx, data, text_template=None, answer=None, messages="turns", max_seq_len=256
    )
    assert (agreement["encode_differ"], agreement["decode_differ"]) == (0, 0)
    model = packaged(tmp_path / "run", onnx)
    for row in predictions:
        turns = data[int(row["row"]) - 1]["turns"][: int(row["turn"]) - 1]
        assert model.prompt(json.dumps(turns)) == row["prompt"]
        answer = model.answer(json.dumps(turns))
        assert prompts.read_answer(answer, model.form["labels"]) == row["fp32"]
        if len(turns) == 1:
            assert model.answer(turns[0]["content"]) == answer
    assert {len(turns["turns"]) for turns in data} == {2, 4}
    assert {row["turn"] for row in predictions} == {"2", "4"}


def chat(number: int) -> list[dict]:
    """A conversation with a hard text at both ends of the user's turn; every other one has earlier turns, every third a system turn."""
    hard = HARD[number % len(HARD)]
    turns = [{"role": "user", "content": f"{hard}{number}{hard}"}, {"role": "assistant", "content": TONES[number % 3]}]
    if number % 2:
        turns[:0] = [{"role": "user", "content": "Hello "}, {"role": "assistant", "content": "Yes?"}]
    if number % 3 == 0:
        turns[:0] = [{"role": "system", "content": " Be brief.\n"}]
    return turns


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_hard_chats_are_answered_as_they_were_scored(family, tmp_path):
    """Gemma folds a system turn into the user's, and strips all turns but that one."""
    base, onnx = family
    data = [{"turns": chat(number)} for number in range(60)]
    form = {"text_template": None, "answer": None, "messages": "turns", "max_seq_len": 256}
    agreement, predictions = score(tmp_path / "run", base, onnx, data, **form)
    assert (agreement["encode_differ"], agreement["decode_differ"]) == (0, 0)
    model = packaged(tmp_path / "run", onnx)
    assert model.form["chat"]["trimmed_roles"] == ["user", "assistant"]
    for row in predictions:
        turns = data[int(row["row"]) - 1]["turns"][: int(row["turn"]) - 1]
        assert model.prompt(json.dumps(turns)) == row["prompt"]
        answer = model.answer(json.dumps(turns))
        assert prompts.read_answer(answer, model.form["labels"]) == row["fp32"]
    tokenizer = load_tokenizer(base)
    for example in pyarrow.parquet.read_table(tmp_path / "run" / "dataset" / "train.parquet").to_pylist():
        assert example["input_ids"][:2] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<start_of_turn>")]
        assert example["input_ids"][2] != tokenizer.bos_token_id
        said = tokenizer.decode([label for label in example["labels"] if label != -100])
        answers = [turn["content"] for turn in data[example["row"] - 1]["turns"] if turn["role"] == "assistant"]
        assert said == "".join(f"{answer}<end_of_turn>" for answer in answers)


def test_run_py_as_a_user_starts_it(family, tmp_path):
    base, onnx = family
    data = rows(30)
    _, predictions = score(tmp_path / "run", base, onnx, data)
    packaged(tmp_path / "run", onnx)
    text = data[int(predictions[0]["row"]) - 1]["phrase"]
    command = [sys.executable, tmp_path / "run" / "package" / "run.py", text]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert prompts.read_answer(done.stdout, ["joy"]) == predictions[0]["fp32"]
