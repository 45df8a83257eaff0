"""What a metric's file and a task's file read is an input, too: modules, included files, functions, rows."""

import json
from pathlib import Path

import pytest
from tiny import ROOT, write_params

from slmake import params
from slmake.plan import Plan
from slmake.user_files import with_what_they_read


def write(files: dict[str, str]) -> None:
    """Write files by their names in the project's folder."""
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text(text)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project's folder with a metric that imports, and a task that includes, calls and names files."""
    monkeypatch.chdir(tmp_path)
    files = {
        "metrics/own.py": "import json\nimport metrics.words\nfrom metrics import lists\nfrom slmake import text\n",
        "metrics/words.py": "import metrics.own\n",
        "metrics/lists.py": "from metrics.deep.inner import few\n",
        "metrics/deep/inner.py": "few = 3\n",
        "metrics/other.py": "",
        "slmake/text.py": "",
        "tasks/mine.yaml": "task: mine\ninclude: common.yaml\nprocess_docs: !function utils.read\nmetric_list: [{metric: acc}]\n",
        "tasks/common.yaml": "dataset_path: data\ndataset_kwargs: {data_files: {test: [rows/a.jsonl, rows/none.jsonl]}}\n",
        "tasks/utils.py": "import metrics.lists\n",
        "tasks/other.yaml": "task: other\n",
        "data/x.jsonl": "{}",
        "rows/a.jsonl": "{}",
    }
    write(files)
    return tmp_path


def test_modules_of_a_metric(project):
    assert with_what_they_read(["metrics/own.py"]) == [
        "metrics/own.py", "metrics/lists.py", "metrics/deep/inner.py", "metrics/words.py"
    ]  # fmt: skip


def test_modules_of_the_pipeline_that_evaluate_itself_does_not_use(project):
    write({"metrics/more.py": "from slmake.reporting.pages import escape\nfrom slmake.errors import UserError\n"})
    found = with_what_they_read(["metrics/more.py"])
    assert "slmake/reporting/pages.py" in found
    assert not {"slmake/text.py", "slmake/errors.py"} & set(found)


def test_files_of_a_task(project):
    assert sorted(with_what_they_read(["tasks/mine.yaml"])) == [
        *("data/x.jsonl", "metrics/deep/inner.py", "metrics/lists.py", "rows/a.jsonl"),
        *("tasks/common.yaml", "tasks/mine.yaml", "tasks/utils.py"),
    ]


def test_includes_without_a_suffix_patterns_and_prompts(project):
    files = {
        "tasks/mine.yaml": "task: mine\ninclude: _default_yaml\nuse_prompt: 'prompts.yaml:one'\n",
        "tasks/_default_yaml": "dataset_kwargs: {data_files: {test: 'many/*.jsonl'}}\ndoc_to_text: !function deep.words.text\n",
        "tasks/deep/words.py": "",
        "tasks/prompts.yaml": "prompts: {one: {}}",
        "many/1.jsonl": "",
        "many/2.jsonl": "",
    }
    write(files)
    assert sorted(with_what_they_read(["tasks/mine.yaml"])) == sorted(files)


def test_packages_and_relative_imports(project):
    files = {
        "own/metric.py": "from .base import norm\nfrom . import lists\nimport other.deep.words\n",
        "own/base.py": "from ..top import x\n",
        "own/lists.py": "",
        "own/__init__.py": "",
        "other/__init__.py": "",
        "other/deep/__init__.py": "",
        "other/deep/words.py": "",
        "top.py": "x = 1\n",
    }
    write(files)
    assert sorted(with_what_they_read(["own/metric.py"])) == sorted(files)


def test_modules_beside_a_metric_and_the_files_that_it_names(project):
    files = {
        "own/metric.py": "import sys\nsys.path.insert(0, 'own')\nimport helper\nfrom pack import part\nINPUTS: list[str] = ['rows/b.json']\n",
        "own/helper.py": "from . import nothing\nINPUTS = ('rows/c.json', 'nowhere.json', 3)\n",
        "own/pack/__init__.py": "import late\nINPUTS = ['rows/' + 'd.json']\n",
        "own/pack/late.py": "",
        "own/pack/part.py": "def score(): return [*open('rows/e.json'), 'beside.txt', 'absent.txt', 'rows', 'build/made.json']\n",
        "own/pack/beside.txt": "",
        "rows/b.json": "{}",
        "rows/c.json": "{}",
        "rows/d.json": "{}",
        "rows/e.json": "{}",
        "build/made.json": "{}",
    }
    write(files)
    # A name of no file in INPUTS is kept: the plan refuses it. Names that are made, and what rules make, are left out.
    expected = sorted({*files, "nowhere.json"} - {"rows/d.json", "build/made.json"})
    assert sorted(with_what_they_read(["own/metric.py"])) == expected


def test_a_module_in_the_projects_folder_may_import_relatively(project):
    """Python refuses it when it runs; what else the file imports is an input all the same."""
    write({"metric.py": "from . import other\nimport metrics.lists\n", "other.py": ""})
    assert {"other.py", "metrics/lists.py"} <= set(with_what_they_read(["metric.py"]))


def test_absolute_names_stay(project):
    outside = project.parent / "outside.jsonl"
    outside.write_text("{}")
    Path("tasks/other.yaml").write_text(f"data_files: [{outside}, {project}/rows/a.jsonl]\n")
    assert with_what_they_read(["tasks/other.yaml"]) == ["tasks/other.yaml", str(outside), "rows/a.jsonl"]


@pytest.mark.parametrize("text", ["a: [", "a: &a [*a]", "", "\0", "- " * 3000], ids=repr)
def test_files_that_cannot_be_read_are_left_to_who_uses_them(project, text):
    Path("tasks/other.yaml").write_text(text)
    Path("metrics/other.py").write_text("def (")
    names = ["tasks/other.yaml", "metrics/other.py", "tasks/nowhere.yaml", "tasks"]
    assert with_what_they_read(names) == names


def test_they_are_inputs_of_evaluate(project):
    section = {
        "metrics": ["metrics/own.py:polite", {"json_schema": "schema.json"}],
        "lm_eval": ["tasks/mine.yaml", "hellaswag"],
    }
    plan = Plan(params.load(write_params(project / "params.yaml", evaluate=section)))
    assert {"metrics/deep/inner.py", "tasks/utils.py", "rows/a.jsonl", "schema.json"} <= set(plan.named("evaluate"))
    assert "envs/lm-eval.lock" in plan.named("evaluate")  # another version of the harness scores in another way
    assert "envs/lm-eval.lock" in plan.materials()
    assert {"tasks/utils.py", "rows/a.jsonl", "envs/lm-eval.lock"} <= set(plan.named("rehearse"))  # it loads them
    assert plan.missing().startswith("params.yaml: ")
    before = plan.digest("evaluate") if (ROOT / "envs").is_dir() else None
    Path("rows/a.jsonl").write_text(json.dumps({"a": 1}))
    assert plan.digest("evaluate") != before
    section["lm_eval"] = []
    without = Plan(params.load(write_params(project / "params.yaml", evaluate=section)))
    assert "envs/lm-eval.lock" not in [*without.named("evaluate"), *without.materials()]
