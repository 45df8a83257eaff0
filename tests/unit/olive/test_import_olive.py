"""Olive's configurations, of each form: what they become, and that no field is lost."""

import copy
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from slmake import params
from slmake.azureml import settings
from slmake.olive.reader import Reader
from tools import import_olive

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test asks the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def config(name: str = "tutorial-lora") -> dict:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def rows(read: Reader, kind: str) -> dict[str, str]:
    return {row.field: row.note for row in read.rows if row.kind == kind}


class Imported(NamedTuple):
    """What a run of the importer left: exit code, both streams, the folder that it was to write."""

    code: int
    stdout: str
    stderr: str
    folder: Path


@pytest.fixture
def run_import(tmp_path, capsys):
    """Run the importer in this process on a configuration (a mapping, or the text of a file)."""

    def run(content: dict | str, *options: str, name: str = "olive-config.json") -> Imported:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        code = 0
        try:
            import_olive.main([str(tmp_path / name), "--output", str(tmp_path / "imported"), *options])
        except SystemExit as error:
            code = error.code
        stdout, stderr = capsys.readouterr()
        return Imported(code, stdout, stderr, tmp_path / "imported")

    return run


def leaves(value: object, where: str = "") -> list[str]:
    """Every field of a configuration that is not a mapping itself."""
    if not isinstance(value, dict):
        return [where]
    return [leaf for key, item in value.items() for leaf in leaves(item, f"{where}.{key}".lstrip("."))]


def test_the_tutorial(run_import):
    done = run_import(config())
    assert done.code == 0, done.stderr
    made = params.load(done.folder / "params.yaml")
    assert made.fetch_model.source == "hf:microsoft/Phi-3-mini-4k-instruct@main"
    assert made.all.stages == ["finetune", "merge", "quantize", "evaluate", "report"]
    assert made.prepare.text_template == "<|user|>\n{phrase}<|end|>\n<|assistant|>\n{tone}\n<|end|>"
    assert (made.prepare.strategy, made.prepare.max_seq_len, made.prepare.eval_fraction) == ("join", 2048, 0.1)
    tune = made.finetune
    assert (tune.method, tune.lora_r, tune.lora_alpha, tune.lora_dropout) == ("lora", 64, 64, 0.1)
    assert tune.target_modules == ["o_proj", "qkv_proj"]
    assert (tune.learning_rate, tune.max_steps, tune.gradient_accumulation_steps, tune.seed) == (1e-4, 100, 4, 0)
    assert (made.quantize.precision, made.quantize.execution_provider) == ("int4", "cuda")
    azure = settings.load(done.folder / "settings.yaml")
    assert azure.subscription_id == "11111111-2222-3333-4444-555555555555"
    assert azure.data == "azureml://datastores/workspaceblobstore/paths/phrases/train.json"
    assert azure.cluster("finetune").name == "gpu-cluster"
    assert azure.cluster("prepare").name == "cpu-cluster"
    assert azure.clusters["azure_arc"].instance_type == "gpu-large"
    for title in ("taken over (", "taken over under another name (", "without meaning here (", "to be filled in ("):
        assert title in done.stdout
    assert "not understood" not in done.stdout


def test_the_present_schema(run_import):
    done = run_import(config("current"))
    assert done.code == 0, done.stderr
    made = params.load(done.folder / "params.yaml")
    assert made.fetch_model.source == "models/smollm2"
    assert made.prepare.source == "data/dataset.json"
    assert (made.finetune.method, made.finetune.lora_r, made.finetune.compute_dtype) == ("qlora", 16, "bfloat16")
    assert made.finetune.max_steps is None
    assert (made.quantize.algo_config, made.quantize.matmul_mixed_precision) == (
        "k_quant",
        "last_matmul:int8,mixed_layers:int8",
    )
    assert (made.quantize.block_size, made.quantize.is_symmetric, made.quantize.execution_provider) == (32, True, "cpu")
    assert not (done.folder / "settings.yaml").exists()


@pytest.mark.parametrize("name", ["tutorial-lora", "current"])
def test_every_field_is_in_the_table(name):
    """Each leaf of the configuration, or something that holds it, has a row."""
    content = config(name)
    reported = [row.field for row in Reader(content, "main").run().rows]
    content["data_configs"] = {str(i): item for i, item in enumerate(content["data_configs"])}
    for leaf in leaves(content):
        assert any(
            field == leaf or leaf.startswith(f"{field}.") or field.startswith(f"{leaf}.") for field in reported
        ), leaf


@pytest.mark.parametrize("name", ["tutorial-lora", "current"])
def test_an_unknown_field_anywhere_is_named_and_stops_the_import(run_import, name):
    """A strange field is put into every mapping of the configuration, one after the other."""
    places = []

    def walk(value, path):
        if isinstance(value, dict):
            places.append(path)
            for key, item in value.items():
                walk(item, [*path, key])
        elif isinstance(value, list):
            for i, item in enumerate(value):
                walk(item, [*path, i])

    walk(config(name), [])
    skipped = (["systems"], ["passes"])  # their fields are names that the user gives
    for path in places:
        content = config(name)
        inner = content
        for part in path:
            inner = inner[part]
        inner["strange_field"] = {"type": "Strange"} if path in skipped else 1
        unknown = rows(Reader(content, "main").run(), "unknown")
        assert any("strange_field" in field for field in unknown), (path, unknown)
    content = config(name)
    content["passes"][next(iter(content["passes"]))]["strange_field"] = 1
    done = run_import(content)
    assert done.code == 1
    assert "not understood: passes." in done.stderr
    assert "strange_field" in done.stderr
    assert not done.folder.exists()
    done = run_import(content, "--leave-out")
    assert done.code == 0, done.stderr
    assert "strange_field" in done.stdout
    assert done.folder.exists()


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
    ("path", "value", "message"),
    [
        (
            ("passes", "builder", "type"),
            "VisionEncoderSplit",
            "passes are LoRA, QLoRA, MergeAdapterWeights, ModelBuilder",
        ),
        (("input_model", "type"), "ONNXModel", "base models are PyTorch models"),
        (("passes", "lora", "config", "train_data_config"), "other", "is none of data_configs: dataset_default_train"),
        (("passes", "lora", "config", "modules_to_save"), ["lm_head"], "only LoRA matrices are trained"),
        (("passes", "lora", "config", "eval_dataset_size"), 0.7, "prepare.eval_fraction is a share"),
        (("engine", "host"), "nowhere", "is none of systems"),
        (("engine", "search_strategy"), True, "quantize.search"),
        (("systems", "aml", "type"), "Slurm", "is no kind of system"),
        (
            ("data_configs", 0, "pre_process_data_config", "params", "corpus_strategy"),
            "tile",
            "line-by-line or join",
        ),
    ],
)
def test_what_cannot_be_had_is_named(path, value, message):
    content = copy.deepcopy(config())
    inner = content
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    unknown = rows(Reader(content, "main").run(), "unknown")
    name = ".".join(map(str, path))
    assert message in unknown[name]


def test_a_value_out_of_range_is_named_as_in_params_yaml(run_import):
    content = config()
    content["passes"]["lora"]["config"]["lora_r"] = 0
    done = run_import(content)
    assert done.code == 1
    assert "olive-config.json, as params.yaml: 1 error" in done.stderr
    assert "finetune.lora_r: 0 is not allowed" in done.stderr
    assert not done.folder.exists()


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "expected a mapping")])
def test_bad_files(run_import, text, message):
    done = run_import(text)
    assert done.code == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_overwritten(tmp_path, run_import):
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "mine").touch()
    done = run_import(config())
    assert done.code == 1
    assert "already exists" in done.stderr


def test_yaml_is_read_too(run_import):
    done = run_import(yaml.safe_dump(config("current")), name="olive.yaml")
    assert done.code == 0, done.stderr


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        import_olive.main([str(tmp_path / "none.json")])
    assert "none.json: no such file." in capsys.readouterr().err
