"""The compiled pipeline: what it says, what it depends on, what the SDK makes of it; and settings that are wrong."""

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

from bench.measure import PROJECT_FILES
from slmake import params
from slmake.azureml import errors, pipeline, settings, step
from slmake.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::Warning:azure", "ignore::Warning:marshmallow"
)
SHIPPED = ROOT / "azureml" / "settings.yaml"
DIGEST = "sha256:" + "a" * 64


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `compile` makes of the project as it stands: the file's text, and the steps' code."""
    folder = tmp_path_factory.mktemp("compiled")
    for name in (*PROJECT_FILES, "params.yaml"):
        target = folder / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.sif", ".*"))
        else:
            shutil.copy2(ROOT / name, target)
    (folder / "azureml").mkdir()
    shutil.copy2(SHIPPED, folder / "azureml")
    done = subprocess.run(
        [sys.executable, "-m", "tools.azureml", "compile"], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def small_plan() -> pipeline.Plan:
    """Three rules with every kind of input, as the Snakefile's graph would be."""
    rules = {
        "fetch_model": {"input": ["scripts/fetch_model.py"], "output": ["build/base", "results/base.json"]},
        "prepare": {"input": ["scripts/prepare.py", "data/train.json", "build/base"], "output": ["build/dataset"]},
        "finetune": {"input": ["build/base", "build/dataset"], "output": ["build/adapter", "results/train_loss.csv"]},
    }
    makers = {path: name for name, rule in rules.items() for path in rule["output"]}
    data = {"data": pipeline.Mount("data/train.json", "azureml://datastores/blobs/paths/train.json", "uri_file")}
    model = pipeline.Mount("data/model", "azureml://registries/azureml/models/Phi-3/versions/7", "custom_model")
    sections = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return pipeline.Plan(rules, makers, data, model, sections, {})


def given(**changes: object) -> dict:
    """Settings with `changes`."""
    made = {
        "subscription_id": "11111111-2222-3333-4444-555555555555",
        "resource_group": "group",
        "workspace_name": "workspace",
        "environment": {"image": f"registry.example.org/slmake@{DIGEST}"},
        "clusters": {
            "cpu": {"name": "cpu-cluster", "size": "Standard_D8s_v5"},
            "arc": {
                "name": "arc-compute",
                "instance_type": "gpu-large",
                "environment": {
                    "image": "registry.example.org/base:1",
                    "conda_file": str(Path(__file__).with_name("conda.yml")),
                },
            },
            "own": {
                "name": "own-cluster",
                "environment": {"build": {"context": str(ROOT / "containers"), "dockerfile": "Containerfile"}},
            },
        },
        "compute": {"default": "cpu", "finetune": "arc", "prepare": "own"},
    }
    return made | changes


def loaded(tmp_path: Path, **changes: object) -> settings.Settings:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(given(**changes), sort_keys=False), encoding="utf-8")
    return settings.load(file)


def test_the_checked_in_pipeline_is_what_compile_writes(compiled):
    text = (compiled / "azureml" / "pipeline.yml").read_text(encoding="utf-8")
    assert (ROOT / "azureml" / "pipeline.yml").read_text(encoding="utf-8") == text, "run `make docs`"


def test_the_pipeline_agrees_with_dvc_yaml(compiled):
    """The same rules, inputs and outputs as the stages that are generated from the Snakefile, too."""
    document = yaml.safe_load((ROOT / "azureml" / "pipeline.yml").read_text(encoding="utf-8"))
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    stages = {name: stage for name, stage in stages.items() if name not in ("code", *settings.LEFT_HERE)}
    outs = {
        name: [rule if isinstance(rule, str) else next(iter(rule)) for rule in stage["outs"]]
        for name, stage in stages.items()
    }
    made = {path for paths in outs.values() for path in paths}
    assert list(document["jobs"]) == list(stages)
    for name, stage in stages.items():
        job = document["jobs"][name]
        assert f"tools.azureml step {name} " in job["command"]
        assert set(job["inputs"]) == {"data", *(pipeline.port(path) for path in stage["deps"] if path in made)}
        extra = {f"receipt_{name}", *["checkpoints"] * (name == "finetune")}
        assert set(job["outputs"]) == {pipeline.port(path) for path in outs[name]} | extra
        for path in outs[name]:
            assert f"--output {path}=${{{{outputs.{pipeline.port(path)}}}}}" in job["command"]
        assert job["compute"] == ("azureml:gpu-cluster" if name in ("finetune", "evaluate") else "azureml:cpu-cluster")
    assert document["jobs"]["finetune"]["outputs"]["checkpoints"]["mode"] == "rw_mount"


def test_the_sdk_loads_and_validates_the_pipeline_offline(compiled):
    from azure.ai.ml import load_job

    job = load_job(compiled / "azureml" / "pipeline.yml")
    assert job._validate().passed
    sent = job._to_rest_object().as_dict()["properties"]
    assert sent["jobType"] == "Pipeline"
    assert set(sent["jobs"]) == set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]) - {
        "code",
        *settings.LEFT_HERE,
    }
    assert all("is_deterministic: true" in str(node["componentId"]) for node in sent["jobs"].values())


def test_what_is_sent_is_what_is_expected(tmp_path, monkeypatch):
    """Kubernetes, a registry's model, a datastore's file and each kind of environment, in the service's REST form."""
    from azure.ai.ml import load_job

    monkeypatch.chdir(tmp_path)
    plan = small_plan()
    for rule in plan.rules:
        (tmp_path / pipeline.CODE / rule).mkdir(parents=True)
        (tmp_path / pipeline.CODE / rule / "Snakefile").touch()
    (tmp_path / "azureml").mkdir()
    file = tmp_path / "azureml" / "pipeline.yml"
    file.write_text(pipeline.text(plan, loaded(tmp_path), file.parent), encoding="utf-8")
    job = load_job(file)
    assert job._validate().passed
    sent = json.loads(json.dumps(job._to_rest_object().as_dict(), default=str))
    for node in sent["properties"]["jobs"].values():
        node["componentId"] = yaml.safe_load(node["componentId"])
        environment = node["componentId"]["environment"]
        environment.pop("version")  # a digest of the environment's files
        environment.pop("conda_file", None)  # their content
        environment.get("build", {}).pop("path", None)
    expected = json.loads(Path(__file__).with_name("rest.json").read_text(encoding="utf-8"))
    assert sent == expected


def test_a_step_is_sent_what_can_change_its_result_and_no_more(compiled):
    folder = compiled / pipeline.CODE
    for rule, sections in {
        "fetch_model": {"fetch_model", "prepare"},
        "finetune": {"fetch_model", "prepare", "finetune"},
        "gates": {"fetch_model", "prepare", "finetune", "merge", "quantize", "evaluate", "gates"},
        "report": {"fetch_model", "prepare", "finetune", "merge", "quantize", "evaluate", "gates", "report", "adapter"},
    }.items():
        sent = yaml.safe_load((folder / rule / "params.yaml").read_text(encoding="utf-8"))
        assert set(sent) == sections | {"all"}
        params.load(folder / rule / "params.yaml")
    assert not (folder / "finetune" / "data").exists(), "data are mounted, not sent as code"
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not {name for name in names if name.endswith((".sif", ".pyc")) or name.startswith(".")}


def test_a_search_is_one_step(compiled, tmp_path):
    """Its candidates are jobs of the same step, which the steps after it read."""
    folder = Path(shutil.copytree(compiled, tmp_path / "project"))
    sections = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    sections["quantize"]["search"] = {"block_size": [32, 64], "budget": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tools.azureml", "compile"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    jobs = yaml.safe_load((folder / "azureml" / "pipeline.yml").read_text(encoding="utf-8"))["jobs"]
    made = ["results_search_json", "search_0", "search_1", "search_merged"]
    assert sorted(jobs["search"]["outputs"]) == ["receipt_search", *made]
    assert set(made[:3]) <= set(jobs["quantize"]["inputs"])
    sent = params.load(folder / pipeline.CODE / "search" / "params.yaml")
    assert sent.quantize.search.budget == 2
    assert sent.all.stages == ["finetune", "merge", "quantize"]


def test_training_waits_for_no_rehearsal(compiled):
    """A step before finetune that a changed export option changes would train again."""
    jobs = yaml.safe_load((ROOT / "azureml" / "pipeline.yml").read_text(encoding="utf-8"))["jobs"]
    assert "rehearse" not in jobs
    assert set(jobs["finetune"]["inputs"]) == {"data", "base", "dataset"}
    sent = params.load(compiled / pipeline.CODE / "finetune" / "params.yaml")
    assert sent.all.stages == ["finetune"]


def test_a_changed_gate_leaves_the_code_that_trains_as_it_was():
    plan = small_plan()
    before = copy.deepcopy(pipeline.step_params(plan, "finetune"))
    plan.sections["gates"]["min_accuracy"] = 0.99
    plan.sections["quantize"]["block_size"] = 64
    assert pipeline.step_params(plan, "finetune") == before
    plan.sections["prepare"]["seed"] = 43
    assert pipeline.step_params(plan, "finetune") != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subscription_id": "mine"}, 'subscription_id: "mine" is not allowed'),
        ({"workspace": "w"}, "workspace: unknown name. Did you mean `workspace_name`?"),
        ({"resource_group": None}, "resource_group: null is not allowed"),
        ({"clusters": {}}, "clusters"),
        ({"compute": {"finetune": "cpu"}}, "compute has no `default`"),
        ({"compute": {"default": "big"}}, "compute.default: clusters has no `big`; it has cpu, arc, own"),
        ({"compute": {"default": "cpu", "train": "cpu"}}, "compute.train"),
        ({"environment": {"image": "registry.example.org/slmake:latest"}}, "image has no digest"),
        ({"environment": {}}, "give either image"),
        ({"environment": {"build": {"context": "nowhere"}}}, "build.context: nowhere: no such file or folder"),
        ({"environment": {"image": "registry.example.org/a:1", "conda_file": "none.yml"}}, "conda_file: none.yml: no such"),
        ({"data": "https://host/x.json"}, "is neither azureml:NAME:VERSION nor azureml://datastores"),
        ({"model": "hf:org/name"}, "is none of hf:ORG/NAME@REVISION"),
        ({"clusters": {"cpu": {"name": "c-1", "size": "S", "instance_type": "t"}}, "compute": {"default": "cpu"}}, "give one of them"),
    ],
)  # fmt: skip
def test_wrong_settings_name_the_field(tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, **changes)
    assert message in str(caught.value)
    assert "nothing was sent" in str(caught.value)


def test_the_shipped_settings_are_valid_but_blank():
    shipped = settings.load(SHIPPED)
    with pytest.raises(UserError, match="subscription_id is still the placeholder"):
        shipped.refuse_blanks(SHIPPED)


def test_every_mistake_is_reported_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, subscription_id="x", resource_group="a b", max_nodes=1)
    assert "3 errors" in str(caught.value)


@pytest.mark.parametrize("name", ["my tickets (2).json", "a & b; c.json", "plain-1.json", "wild*.json"])
def test_a_name_is_one_word_of_a_step_s_command(tmp_path, name):
    """Where it is mounted, too."""
    plan = small_plan()._replace(data={"data": pipeline.Mount(f"data/{name}", f"data/{name}", "uri_file")})
    command = pipeline.step(plan, loaded(tmp_path), "finetune", tmp_path)["command"]
    words = shlex.split(command.replace("${{inputs.data}}", f"/mnt/{name}"))
    assert f"data/{name}=/mnt/{name}" in words


@pytest.mark.parametrize("name", ["it's.json", "$HOME.json", "`id`.json", 'a "b".json', "a\\b.json", "tone=joy/a.json"])
def test_a_name_that_a_shell_would_read_otherwise_is_refused(tmp_path, name):
    plan = small_plan()._replace(data={"data": pipeline.Mount(f"data/{name}", f"data/{name}", "uri_file")})
    with pytest.raises(UserError, match=r"a step's command cannot name a file with .* in its name"):
        pipeline.step(plan, loaded(tmp_path), "finetune", tmp_path)


def test_a_private_key_is_not_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    sections["package"]["signing_key"] = "key.pem"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    with pytest.raises(UserError, match=r"package\.signing_key: a private key is not sent"):
        pipeline.plan(loaded(tmp_path))


def test_data_outside_the_project_are_refused():
    with pytest.raises(UserError, match="lies outside the project's folder"):
        pipeline._inside("/elsewhere/rows.json", "prepare.source")


def test_a_step_places_and_hands_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mounted = tmp_path / "mnt" / "abc"
    mounted.mkdir(parents=True)
    (mounted / "weights").write_text("w")
    step.link_inputs({"build/base": mounted})
    assert Path("build/base/weights").read_text() == "w"
    made = Path("build/adapter")
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "a").write_text("a")
    (made / ".snakemake_timestamp").touch()
    handed = step.hand_over("build/adapter", tmp_path / "out" / "x")
    assert handed == step.sums(tmp_path / "out" / "x") == step.sums(made)
    assert list(handed) == ["sub/a"]
    with pytest.raises(UserError, match=r"build/dataset: the input .* is not there"):
        step.link_inputs({"build/dataset": tmp_path / "none"})


def test_an_image_without_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "envs", "envs")
    lock = Path("envs/cpu.lock")
    lock.write_text(lock.read_text(encoding="utf-8") + "no-such-package==1.0 \\\n", encoding="utf-8")
    monkeypatch.setenv("SLMAKE_MACHINE", "cpu")
    with pytest.raises(
        UserError, match=r"(?s)`environment` in azureml/settings.yaml.*no-such-package: 1.0 in cpu.lock, missing"
    ):
        step.check_environment()


def test_checkpoints_outlive_the_end_of_a_run(tmp_path, monkeypatch):
    """finetune removes what it left, and neither the folder that Azure ML mounts nor the link to it."""
    from slmake.training.checkpoints import Checkpoints

    monkeypatch.chdir(tmp_path)
    step.keep_checkpoints(tmp_path / "mount")
    kept = Checkpoints(Path("build/checkpoints"), "abc")
    (kept.folder / "step-1").mkdir(parents=True)
    kept.remove()
    assert [path.name for path in (tmp_path / "mount").iterdir()] == ["about.txt"]


def test_errors_name_the_field_and_keep_secrets():
    from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ServiceRequestError

    class Answer:
        status_code, reason = 403, "Forbidden"

        def text(self, encoding=None):
            return ""

        content_type = "text/plain"

        @property
        def headers(self):
            return {"content-type": self.content_type}

    forbidden = HttpResponseError("no right to do it, sig=s3cr3t&x", response=Answer())
    for error, message in (
        (HttpResponseError("ClusterCoreQuotaReached: quota of 0"), "the subscription's quota does not allow it"),
        (ClientAuthenticationError("no credential"), "Log in (`az login`)"),
        (ServiceRequestError("refused"), "no connection to Azure"),
        (forbidden, "AzureML Data Scientist"),
    ):
        text = str(errors.explain(error, "azureml/settings.yaml: clusters.gpu.size"))
        assert text.startswith("azureml/settings.yaml: clusters.gpu.size: ")
        assert message in text
        assert "s3cr3t" not in text
    assert not errors.passes(forbidden)
    assert errors.passes(ServiceRequestError("refused"))


def test_assets():
    assert errors.asset("azureml:phrases:3") == ("phrases", "3", None)
    assert errors.asset("azureml:phrases@latest") == ("phrases", None, "latest")
    assert errors.asset("azureml:phrases") == ("phrases", None, "latest")
