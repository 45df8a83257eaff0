"""Olive's configurations, of each form: what they become, and that no field is lost."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from tiny import run_script

from slmake import params
from slmake.azureml import settings
from slmake.olive.reader import Reader

HERE = Path(__file__).parent / "olive"


def config(name: str = "tutorial-lora") -> dict:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def rows(read: Reader, kind: str) -> dict[str, str]:
    return {row.field: row.note for row in read.rows if row.kind == kind}


def imported(tmp_path: Path, content: dict, *options: str):
    """Run the script on a configuration; the finished process and the folder it wrote."""
    (tmp_path / "olive-config.json").write_text(json.dumps(content), encoding="utf-8")
    done = run_script("tools.import_olive", "olive-config.json", *options, cwd=tmp_path)
    return done, tmp_path / "imported"


def leaves(value: object, where: str = "") -> list[str]:
    """Every field of a configuration that is not a mapping itself."""
    if not isinstance(value, dict):
        return [where]
    return [leaf for key, one in value.items() for leaf in leaves(one, f"{where}.{key}".lstrip("."))]


def test_the_tutorial(tmp_path):
    done, folder = imported(tmp_path, config())
    assert done.returncode == 0, done.stderr
    made = params.load(folder / "params.yaml")
    assert made.fetch_model.source == "hf:microsoft/Phi-3-mini-4k-instruct@main"
    assert made.all.stages == ["finetune", "merge", "quantize", "evaluate", "report"]
    assert made.prepare.text_template == "<|user|>\n{phrase}<|end|>\n<|assistant|>\n{tone}\n<|end|>"
    assert (made.prepare.strategy, made.prepare.max_seq_len, made.prepare.eval_fraction) == ("join", 2048, 0.1)
    tune = made.finetune
    assert (tune.method, tune.lora_r, tune.lora_alpha, tune.lora_dropout) == ("lora", 64, 64, 0.1)
    assert tune.target_modules == ["o_proj", "qkv_proj"]
    assert (tune.learning_rate, tune.max_steps, tune.gradient_accumulation_steps, tune.seed) == (1e-4, 100, 4, 0)
    assert (made.quantize.precision, made.quantize.execution_provider) == ("int4", "cuda")
    azure = settings.load(folder / "settings.yaml")
    assert azure.subscription_id == "11111111-2222-3333-4444-555555555555"
    assert azure.data == "azureml://datastores/workspaceblobstore/paths/phrases/train.json"
    assert azure.cluster("finetune").name == "gpu-cluster"
    assert azure.cluster("prepare").name == "cpu-cluster"
    assert azure.clusters["azure_arc"].instance_type == "gpu-large"
    for title in ("taken over (", "taken over under another name (", "without meaning here (", "to be filled in ("):
        assert title in done.stdout
    assert "not understood" not in done.stdout


def test_the_present_schema(tmp_path):
    done, folder = imported(tmp_path, config("current"))
    assert done.returncode == 0, done.stderr
    made = params.load(folder / "params.yaml")
    assert made.fetch_model.source == "models/smollm2"
    assert made.prepare.source == "data/dataset.json"
    assert (made.finetune.method, made.finetune.lora_r, made.finetune.compute_dtype) == ("qlora", 16, "bfloat16")
    assert made.finetune.max_steps is None
    assert (made.quantize.algo_config, made.quantize.matmul_mixed_precision) == (
        "k_quant",
        "last_matmul:int8,mixed_layers:int8",
    )
    assert (made.quantize.block_size, made.quantize.is_symmetric, made.quantize.execution_provider) == (32, True, "cpu")
    assert not (folder / "settings.yaml").exists()


@pytest.mark.parametrize("name", ["tutorial-lora", "current"])
def test_every_field_is_in_the_table(name):
    """Each leaf of the configuration, or something that holds it, has a row."""
    content = config(name)
    told = [row.field for row in Reader(content, "main").run().rows]
    content["data_configs"] = {str(i): one for i, one in enumerate(content["data_configs"])}
    for leaf in leaves(content):
        assert any(field == leaf or leaf.startswith(f"{field}.") or field.startswith(f"{leaf}.") for field in told), (
            leaf
        )


@pytest.mark.parametrize("name", ["tutorial-lora", "current"])
def test_an_unknown_field_anywhere_is_named_and_stops_the_import(tmp_path, name):
    """A strange field is put into every mapping of the configuration, one after the other."""
    places = []

    def walk(value, path):
        if isinstance(value, dict):
            places.append(path)
            for key, one in value.items():
                walk(one, [*path, key])
        elif isinstance(value, list):
            for i, one in enumerate(value):
                walk(one, [*path, i])

    walk(config(name), [])
    skipped = (["systems"], ["passes"])  # their fields are names that the user gives
    for path in places:
        content = config(name)
        inner = content
        for part in path:
            inner = inner[part]
        inner["strange_field"] = {"type": "Strange"} if path in skipped else 1
        found = rows(Reader(content, "main").run(), "unknown")
        assert any("strange_field" in field for field in found), (path, found)
    content = config(name)
    content["passes"][next(iter(content["passes"]))]["strange_field"] = 1
    done, folder = imported(tmp_path, content)
    assert done.returncode == 1
    assert "not understood: passes." in done.stderr
    assert "strange_field" in done.stderr
    assert not folder.exists()
    done, folder = imported(tmp_path, content, "--leave-out")
    assert done.returncode == 0, done.stderr
    assert "strange_field" in done.stdout
    assert folder.exists()


@pytest.mark.parametrize(
    ("model", "source", "azure"),
    [
        ({"type": "HfModel", "model_path": "org/name", "load_kwargs": {"revision": "v2"}}, "hf:org/name@v2", None),
        ({"type": "HfModel", "model_path": "./models/mine"}, "./models/mine", None),
        (
            {"type": "PyTorchModel", "config": {"model_path": {"type": "local_folder", "config": {"path": "models/mine"}}}},
            "models/mine",
            None,
        ),
        (
            {"type": "PyTorchModel", "config": {"model_path": {"type": "azureml_registry_model",
             "config": {"registry_name": "azureml", "name": "Phi-3", "version": "7"}}}},
            "azureml://registries/azureml/models/Phi-3/versions/7",
            None,
        ),
        ({"type": "HfModel", "model_path": "azureml://registries/azureml/models/Phi-3/versions/7"},
         "azureml://registries/azureml/models/Phi-3/versions/7", None),
        (
            {"type": "HfModel", "model_path": {"type": "azureml_model", "name": "mine", "version": "3"}},
            "data/model",
            "azureml:mine:3",
        ),
        (
            {"type": "HfModel", "model_path": {"type": "azureml_datastore", "config": {"datastore_name": "s", "relative_path": "m"}}},
            "azureml://datastores/s/paths/m#etag=UNKNOWN",
            "azureml://datastores/s/paths/m",
        ),
    ],
)  # fmt: skip
def test_input_models(model, source, azure):
    read = Reader(config() | {"input_model": model}, "main").run()
    assert rows(read, "unknown") == {}
    assert read.params["fetch_model"]["source"] == source
    assert read.settings.get("model") == azure


def test_placeholders_are_to_be_filled_in():
    content = config()
    content["azureml_client"]["subscription_id"] = "Your Azure Subscription ID"
    content["systems"]["aml"]["config"]["aml_compute"] = "Your Azure ML Compute Cluster"
    content["data_configs"][0]["load_dataset_config"]["params"]["data_files"]["config"]["azureml_client"][
        "subscription_id"
    ] = "<id>"
    read = Reader(content, "main").run()
    assert rows(read, "unknown") == {}
    assert {"azureml_client.subscription_id", "systems.aml.config.aml_compute"} <= set(rows(read, "todo"))
    assert "subscription_id" not in read.settings
    assert read.settings["clusters"]["aml"]["name"] == "aml-cluster"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            ("passes", "builder", "type"),
            "GptqQuantizer",
            "passes are LoRA, QLoRA, MergeAdapterWeights and ModelBuilder",
        ),
        (("input_model", "type"), "ONNXModel", "base models are PyTorch models"),
        (("passes", "lora", "config", "train_data_config"), "other", "is none of data_configs: dataset_default_train"),
        (("passes", "lora", "config", "modules_to_save"), ["lm_head"], "only LoRA matrices are trained"),
        (("passes", "lora", "config", "eval_dataset_size"), 200, "prepare.eval_fraction is a share"),
        (("engine", "host"), "nowhere", "is none of systems"),
        (("engine", "search_strategy"), True, "quantize.search"),
        (("systems", "aml", "type"), "Slurm", "is no kind of system"),
        (
            ("data_configs", 0, "pre_process_data_config", "params", "corpus_strategy"),
            "join-random",
            "line-by-line or join",
        ),
        (("data_configs", 0, "user_script"), "my.py", "no code of a data set is run"),
    ],
)
def test_what_cannot_be_had_is_said(path, value, said):
    content = copy.deepcopy(config())
    inner = content
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    found = rows(Reader(content, "main").run(), "unknown")
    name = ".".join(map(str, path))
    assert said in found[name]


def test_a_value_out_of_range_is_told_by_our_name(tmp_path):
    content = config()
    content["passes"]["lora"]["config"]["lora_r"] = 0
    done, folder = imported(tmp_path, content)
    assert done.returncode == 1
    assert "olive-config.json, as params.yaml: 1 error" in done.stderr
    assert "finetune.lora_r: 0 is not allowed" in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "said"), [("{", "cannot be read"), ("[]", "expected a mapping"), (None, "no such file")]
)
def test_bad_files(tmp_path, text, said):
    if text is not None:
        (tmp_path / "olive-config.json").write_text(text)
    done = run_script("tools.import_olive", "olive-config.json", cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "mine").touch()
    done, _ = imported(tmp_path, config())
    assert done.returncode == 1
    assert "already exists" in done.stderr


def test_yaml_is_read_too(tmp_path):
    (tmp_path / "olive.yaml").write_text(yaml.safe_dump(config("current")), encoding="utf-8")
    done = run_script("tools.import_olive", "olive.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
