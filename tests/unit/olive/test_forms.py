"""The forms of Olive's configurations: the tutorial's blocks in every spelling, what Olive has had since, and what is no configuration."""

import copy
import itertools
import json

import pytest
import yaml

from slmake import params
from slmake.azureml import settings
from slmake.errors import UserError
from slmake.olive import reader as reader_module
from slmake.olive.reader import Reader
from slmake.params.dataset_files import hub_split, source_files
from slmake.sources import hub
from tools import import_olive

TEMPLATE = "### Text: {phrase}\n### The tone is:\n{tone}"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CLIENT = {
    "subscription_id": "11111111-2222-3333-4444-555555555555",
    "resource_group": "group",
    "workspace_name": "workspace",
}
LOADER = {"trust_remote_code": True, "_attn_implementation": "eager", "sliding_window": None, "torch_dtype": "bfloat16"}
STORE = {
    "type": "azureml_datastore",
    "config": {"azureml_client": CLIENT, "datastore_name": "store", "relative_path": "a/b.json"},
}
REGISTRY = {"type": "azureml_registry_model", "config": {"registry_name": "azureml", "name": "Phi-3", "version": "7"}}
TRAINING = {
    "seed": 0, "data_seed": 42, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_steps": 100,
    "gradient_accumulation_steps": 4, "gradient_checkpointing": False, "learning_rate": 0.0001, "num_train_epochs": 3,
    "logging_steps": 10, "evaluation_strategy": "steps", "eval_steps": 187, "group_by_length": True, "adam_beta2": 0.999,
    "max_grad_norm": 0.3,
}  # fmt: skip
LORA = {
    "target_modules": ["o_proj", "qkv_proj"],
    "double_quant": True,
    "lora_r": 64,
    "lora_alpha": 64,
    "lora_dropout": 0.1,
}


def nested(value: dict) -> dict:
    """The old spelling: everything but the type below `config`."""
    return {"type": value["type"], "config": {key: item for key, item in value.items() if key != "type"}}


def tutorial(loader: str = "from_pretrained_args", model: object = "org/name", data: object = "data/rows.json", method: str = "LoRA",
             old: bool = True, spelling: str = "blocks") -> dict:  # fmt: skip
    """A configuration of the tutorial's blocks."""
    spell = nested if old else dict
    hf = {"task": "text-generation", loader: LOADER} | ({"model_name": model} if isinstance(model, str) else {})
    source = {} if isinstance(model, str) else {"model_path": model, "model_file_format": "PyTorch.MLflow"}
    rows = {"data_name": "json", "data_files": data, "split": "train"}
    text = {
        "dataset_type": "corpus", "text_cols": ["phrase", "tone"], "text_template": TEMPLATE, "corpus_strategy": "join",
        "source_max_len": 2048, "pad_to_max_len": False, "use_attention_mask": False,
    }  # fmt: skip
    blocks = {
        "blocks": {"load_dataset_config": {"params": rows}, "pre_process_data_config": {"params": text}},
        "flat": {"load_dataset_config": rows, "pre_process_data_config": text},
        "kwargs": {"params_config": rows | {"component_kwargs": {"pre_process_data": text}}},
        "components": {"load_dataset_config": rows, "components": {"pre_process_data": {"params": text}}},
    }[spelling]
    more = {"compute_dtype": "bfloat16", "quant_type": "nf4"} if method == "QLoRA" else {}
    system = {"type": "AzureML", "accelerators": [{"device": "gpu", "execution_providers": [CUDA]}], "hf_token": True,
              "aml_docker_config": {"base_image": "image", "conda_file_path": "conda.yaml"}}  # fmt: skip
    return {
        "azureml_client": CLIENT | {"keyvault_name": "vault"},
        "input_model": spell({"type": "PyTorchModel", "hf_config": hf, **source}),
        "systems": {
            "aml": spell(system | {"aml_compute": "gpu-cluster"}),
            "azure_arc": spell(system | {"aml_compute": "arc-compute", "instance_type": "large"}),
        },
        "data_configs": [{"name": "train", "type": "HuggingfaceContainer", **blocks}],
        "passes": {
            "lora": spell({"type": method, **LORA, **more, "train_data_config": "train", "eval_dataset_size": 0.3,
                           "training_args": TRAINING}),
            "merge": {"type": "MergeAdapterWeights"},
            "builder": spell({"type": "ModelBuilder", "precision": "int4"}),
        },
        "engine": {"log_severity_level": 0, "host": "aml", "target": "aml", "search_strategy": False,
                   "execution_providers": [CUDA], "cache_dir": "cache", "output_dir": "models"},
    }  # fmt: skip


def small(*passes: dict, **more: object) -> dict:
    """A configuration of the present form that only quantizes."""
    named = {f"p{i}": item for i, item in enumerate(passes)}
    return {"input_model": {"type": "HfModel", "model_path": "org/name"}, "passes": named, **more}


BUILDER = {"type": "ModelBuilder", "precision": "int4"}


def read(content: dict) -> Reader:
    return Reader(content, "main").run()


def notes(imported: Reader, kind: str) -> dict[str, str]:
    return {row.field: row.note for row in imported.rows if row.kind == kind}


def loaded(imported: Reader, tmp_path) -> params.Params:
    """The parameters that were read, as the pipeline loads them."""
    assert notes(imported, "unknown") == {}
    (tmp_path / "params.yaml").write_text(reader_module.as_yaml(imported.params), encoding="utf-8")
    return params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("loader", "model", "data", "method", "old", "spelling"),
    itertools.product(
        ("from_pretrained_args", "model_loading_args"), ("org/name", REGISTRY), ("data/rows.json", STORE), ("LoRA", "QLoRA"),
        (True, False), ("blocks", "flat", "kwargs", "components"),
    ),
)  # fmt: skip
def test_the_tutorials_blocks_in_every_spelling(tmp_path, loader, model, data, method, old, spelling):
    imported = read(tutorial(loader, model, data, method, old, spelling))
    made = loaded(imported, tmp_path)
    named = isinstance(model, str)
    assert made.fetch_model.source == (
        "hf:org/name@main" if named else "azureml://registries/azureml/models/Phi-3/versions/7"
    )
    assert made.fetch_model.dtype == "bfloat16"
    stored = "azureml://datastores/store/paths/a/b.json"
    assert made.prepare.source == (data if isinstance(data, str) else f"{stored}#etag=UNKNOWN")
    assert made.prepare.text_template == TEMPLATE
    assert (made.prepare.strategy, made.prepare.max_seq_len, made.prepare.use_attention_mask) == ("join", 2048, False)
    assert (made.finetune.method, made.finetune.lora_r, made.finetune.max_steps) == (method.lower(), 64, 100)
    assert made.finetune.target_modules == ["o_proj", "qkv_proj"]
    assert made.prepare.eval_fraction == 0.3
    assert (made.quantize.precision, made.quantize.execution_provider) == ("int4", "cuda")
    (tmp_path / "settings.yaml").write_text(reader_module.settings_text(imported.settings), encoding="utf-8")
    azure = settings.load(tmp_path / "settings.yaml")
    assert azure.data == (None if isinstance(data, str) else stored)
    assert azure.cluster("finetune").name == "gpu-cluster"
    assert azure.clusters["azure_arc"].instance_type == "large"


@pytest.mark.parametrize("field", ["model_script", "io_config", "dummy_inputs_func", "user_script"])
def test_fields_of_the_tracing_exporter_have_no_meaning(field):
    content = tutorial()
    content["input_model"]["config"][field] = {"input_names": ["input_ids"]} if field == "io_config" else "user.py"
    assert "to trace the model" in notes(read(content), "dropped")[f"input_model.config.{field}"]


def hub_data(train: dict, held: dict) -> dict:
    """A tutorial's configuration whose rows for training and for the loss are datasets of the hub."""
    content = tutorial(old=False)
    text = {"text_template": "{q} {a}", "max_samples": 128}
    content["data_configs"] = [
        {"name": "train", "load_dataset_config": train, "pre_process_data_config": text},
        {"name": "held", "load_dataset_config": held},
    ]
    content["passes"]["lora"]["eval_data_config"] = "held"
    return content


CODES = {"data_name": "org/codes", "subset": "small", "col_filters": {"language": "Python"}, "token": True}


def test_datasets_of_the_hub_are_read_as_they_are(tmp_path):
    made = loaded(read(hub_data(CODES | {"split": "train[:70%]"}, CODES | {"split": "train[-128:]"})), tmp_path).prepare
    assert source_files(made) == {"train": "hf:org/codes@main", "eval": "hf:org/codes@main"}
    assert (made.config, made.where, made.max_samples) == ("small", {"language": "Python"}, 128)
    assert [hub_split(made, name) for name in ("train", "eval", "test")] == ["train[:70%]", "train[-128:]", None]


def test_two_datasets_of_the_hub(tmp_path):
    imported = read(hub_data({"data_name": "org/codes"}, {"data_name": "org/other", "split": "validation"}))
    made = loaded(imported, tmp_path).prepare
    assert source_files(made) == {"train": "hf:org/codes@main", "eval": "hf:org/other@main"}
    assert [hub_split(made, name) for name in ("train", "eval")] == ["train", "validation"]
    assert (made.config, made.where) == (None, {})
    only = hub_data({"data_name": "org/codes"}, {})
    del only["passes"]["lora"]["eval_data_config"]
    assert loaded(read(only), tmp_path).prepare.split is None


@pytest.mark.parametrize(
    ("train", "held", "field", "message"),
    [
        (CODES, CODES | {"subset": "large"}, "1.load_dataset_config.data_name", "another subset, or other col_filters"),
        (CODES, {"data_name": "org/codes"}, "1.load_dataset_config.data_name", "another subset"),
        ({"data_name": "a b"}, CODES, "0.load_dataset_config.data_name", "'a b' is no dataset of the hub"),
        (CODES | {"data_dir": "sub"}, CODES, "0.load_dataset_config.data_dir", "a folder of a dataset is its config"),
    ],
)
def test_datasets_of_the_hub_that_cannot_be_had(train, held, field, message):
    assert message in notes(read(hub_data(train, held)), "unknown")[f"data_configs.{field}"]


def test_a_datasets_branch_becomes_its_commit(monkeypatch, tmp_path):
    """That of the dataset, not of a model with the same name."""
    content = hub_data({"data_name": "org/name"}, {"data_name": "org/other"})
    (tmp_path / "olive.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "commit_of", lambda source, kind: (kind[0] + source.name[4]) * 20)
    import_olive.main([str(tmp_path / "olive.json"), "--output", str(tmp_path / "imported")])
    made = params.load(tmp_path / "imported" / "params.yaml")
    assert made.fetch_model.source == f"hf:org/name@{'mn' * 20}"
    assert source_files(made.prepare) == {"train": f"hf:org/name@{'dn' * 20}", "eval": f"hf:org/other@{'do' * 20}"}


def test_slices_of_one_file_are_fractions(tmp_path):
    def data(name, split):
        return {"name": name, "load_dataset_config": {"data_name": "json", "data_files": "data/a.json", "split": split},
                "pre_process_data_config": {"text_template": "{q} {a}"}}  # fmt: skip

    content = tutorial(old=False)
    content["data_configs"] = [data("train", "train[:70%]"), data("held", "train[70%:]")]
    del content["passes"]["lora"]["eval_dataset_size"]
    content["passes"]["lora"]["eval_data_config"] = "held"
    made = loaded(read(content), tmp_path)
    assert made.prepare.source == "data/a.json"
    assert made.prepare.eval_fraction == 0.3


PLAIN, SLICES = ("train", "validation", "train[:]", None), ("train[:10%]", "train[:100]", "train[70%:]", "a+b", 5)


@pytest.mark.parametrize("split", PLAIN + SLICES)
def test_a_slice_of_a_file_that_no_fraction_is_stops_the_import(split):
    content = tutorial(old=False, spelling="flat")
    content["data_configs"][0]["load_dataset_config"]["split"] = split
    [row] = [row for row in read(content).rows if row.field.endswith(".split")]
    assert row.kind == ("dropped" if split in PLAIN else "unknown")
    assert split in PLAIN or row.note == f"{str(split)!r}: put the chosen rows into the file"


def test_a_loading_function_is_named_with_what_to_do(tmp_path):
    content = tutorial(old=False, spelling="flat")
    content["data_configs"][0] |= {"user_script": "mine.py"}
    content["data_configs"][0]["load_dataset_config"] = {
        "type": "my_rows",
        "params": {"language": "Python", "split": "train"},
    }
    imported = read(content)
    assert loaded(imported, tmp_path).prepare.source == "data/my-rows-rows.jsonl"
    assert (
        "write the rows that my_rows returns to data/my-rows-rows.jsonl"
        in notes(imported, "todo")["data_configs.0.load_dataset_config.type"]
    )
    assert notes(imported, "dropped")["data_configs.0.load_dataset_config.params.language"] == "an argument of my_rows"


def test_rows_of_the_eval_split_by_number_and_the_best_adapter(tmp_path):
    content = tutorial(old=False)
    content["passes"]["lora"] |= {
        "eval_dataset_size": 1024,
        "training_args": TRAINING | {"load_best_model_at_end": True},
    }
    imported = read(content)
    made = loaded(imported, tmp_path)
    assert made.prepare.eval_samples == 1024
    assert (made.finetune.keep_best, made.finetune.early_stopping_patience) == (True, 0)


def test_an_adapter_without_a_merge_is_merged(tmp_path):
    content = tutorial(old=False)
    del content["passes"]["merge"]
    imported = read(content)
    assert loaded(imported, tmp_path).all.stages[:3] == ["finetune", "merge", "quantize"]
    assert "merge is added" in notes(imported, "nearest")["passes"]


@pytest.mark.parametrize("passes", [[{"type": "MergeAdapterWeights"}, BUILDER], [BUILDER]])
def test_an_adapter_from_elsewhere_is_merged(tmp_path, passes):
    content = small(*passes)
    content["input_model"]["adapter_path"] = "adapters/mine"
    imported = read(content)
    made = loaded(imported, tmp_path)
    assert made.adapter.source == "adapters/mine"
    assert made.all.stages == ["merge", "quantize", "evaluate", "report"]
    assert ("passes" in notes(imported, "nearest")) is (passes == [BUILDER])
    content["input_model"]["adapter_path"] = "org/adapter"
    assert loaded(read(content), tmp_path).adapter.source == "hf:org/adapter@main"


@pytest.mark.parametrize(
    ("resource", "source", "todo"),
    [
        (
            {"type": "azureml_model", "config": {"name": "tones", "version": "3"}},
            "data/adapter",
            "put the folder of azureml:tones:3 into data/adapter",
        ),
        (
            "azureml://datastores/mine/paths/adapters/tones",
            "azureml://datastores/mine/paths/adapters/tones#etag=UNKNOWN",
            "python -m tools.pin",
        ),
    ],
)
def test_an_adapter_of_azure_ml_is_not_passed_over(tmp_path, resource, source, todo):
    content = small({"type": "MergeAdapterWeights"}, BUILDER)
    content["input_model"]["adapter_path"] = resource
    imported = read(content)
    assert imported.params["adapter"]["source"] == source
    assert todo in notes(imported, "todo")["input_model.adapter_path"]


def test_pass_flows(tmp_path):
    content = tutorial(old=False) | {"pass_flows": [["builder"], ["lora", "merge", "builder"]]}
    imported = read(content)
    assert loaded(imported, tmp_path).all.stages == ["quantize", "evaluate", "report"]
    assert "lora, merge, builder" in notes(imported, "todo")["pass_flows.1"]
    assert notes(imported, "dropped")["passes.lora"] == "not in the first of pass_flows, so it does not run"
    imported = read(tutorial(old=False) | {"pass_flows": [["lora", "merge", "builder"]]})
    assert loaded(imported, tmp_path).all.stages[:3] == ["finetune", "merge", "quantize"]
    assert "`'nobody'`" not in notes(imported, "unknown")
    assert notes(read(tutorial() | {"pass_flows": [["nobody"]]}), "unknown") == {
        "pass_flows.0": "'nobody' is none of passes"
    }
    assert "placeholder" in notes(read(tutorial() | {"pass_flows": [["<place_holder>"]]}), "todo")["pass_flows.0"]


@pytest.mark.parametrize(
    ("given", "device", "provider"),
    [
        ([CPU], "cpu", "cpu"), (["cuda"], "gpu", "cuda"), ([CPU, CUDA], "GPU", "cuda"), ([CPU, CUDA], "cpu", "cpu"),
        (["DmlExecutionProvider"], "gpu", "dml"), (["DirectML"], None, "dml"), (["webgpuexecutionprovider"], "gpu", "webgpu"),
        ([[CUDA, {"device_id": 0}]], "gpu", "cuda"),
    ],
)  # fmt: skip
def test_execution_providers_by_any_spelling(tmp_path, given, device, provider):
    system = {
        "type": "LocalSystem",
        "accelerators": [{"execution_providers": given} | ({"device": device} if device else {})],
    }
    for content in (
        small(BUILDER, systems={"here": system}, target="here"),
        small(BUILDER, engine={"target": system}),
    ):
        assert loaded(read(content), tmp_path).quantize.execution_provider == provider
    imported = read(small(BUILDER, engine={"execution_providers": given}))
    assert imported.params["quantize"]["execution_provider"] in (provider, "cpu")
    strange = read(small(BUILDER, engine={"execution_providers": ["QNNExecutionProvider"]}))
    assert "exported are CPUExecutionProvider" in notes(strange, "unknown")["engine.execution_providers"]


GPTQ = {"type": "gptq", "bits": 4, "sym": True, "group_size": 64}
RTN = {"type": "rtn", "bits": 8, "sym": True, "group_size": 32, "lm_head": True}


@pytest.mark.parametrize(
    ("passes", "expected", "nearest"),
    [
        ([BUILDER | {"int4_block_size": 64, "int4_accuracy_level": 1, "int4_algo_config": "rtn"}],
         {"block_size": 64, "accuracy_level": 1, "algo_config": "rtn", "matmul_mixed_precision": None}, 0),
        ([BUILDER | {"extra_options": {"block_size": "128", "algo_config": "k_quant_last", "is_symmetric": "false",
                                       "nodes_to_exclude": "/a/MatMul,/lm_head/MatMul", "op_types_to_quantize": "MatMul/Gather"}}],
         {"block_size": 128, "algo_config": "k_quant", "matmul_mixed_precision": "last_matmul:int8", "is_symmetric": False,
          "nodes_to_exclude": ["/a/MatMul", "/lm_head/MatMul"], "op_types_to_quantize": ["MatMul", "Gather"]}, 0),
        ([GPTQ, BUILDER], {"calibration": "gptq", "algo_config": "rtn", "is_symmetric": True, "block_size": 64}, 0),
        ([GPTQ | {"sym": False}, BUILDER], {"calibration": "gptq", "is_symmetric": True}, 1),
        ([{"type": "GptqQuantizer", "group_size": 32, "data_config": "wiki"}, BUILDER], {"calibration": "gptq", "block_size": 32}, 1),
        ([RTN, BUILDER | {"precision": "int8"}], {"precision": "int8", "algo_config": "rtn", "block_size": 32}, 0),
        ([RTN | {"embeds": True}, BUILDER | {"precision": "int8"}], {"precision": "int8", "op_types_to_quantize": None}, 1),
        ([RTN | {"bits": 4, "embeds": True}, BUILDER], {"op_types_to_quantize": ["MatMul", "Gather"]}, 0),
        ([RTN | {"bits": 4, "sym": False}, BUILDER], {"precision": "int4", "algo_config": "rtn", "is_symmetric": False}, 0),
        ([{"type": "kquant", "bits": 4, "group_size": 16}, BUILDER], {"algo_config": "k_quant", "block_size": 16}, 0),
        ([GPTQ, RTN, BUILDER], {"calibration": "gptq", "matmul_mixed_precision": "last_matmul:int8", "block_size": 64}, 1),
        ([{"type": "SelectiveMixedPrecision", "algorithm": "k_quant_mixed"}, BUILDER],
         {"matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"}, 0),
        ([{"type": "SelectiveMixedPrecision", "algorithm": "k_quant_down"}, GPTQ, BUILDER],
         {"int8_nodes": ["*/down_proj/*"], "matmul_mixed_precision": "last_matmul:int8", "calibration": "gptq"}, 1),
        ([BUILDER, {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}]}], {"precision": "int4"}, 0),
        ([{"type": "GenAIModelExporter", "precision": "int4"}], {"precision": "int4"}, 0),
    ],
)  # fmt: skip
def test_passes_that_quantize(tmp_path, passes, expected, nearest):
    imported = read(small(*passes))
    made = loaded(imported, tmp_path)
    assert {name: getattr(made.quantize, name) for name in expected} == expected
    assert len(notes(imported, "nearest")) == nearest
    assert made.prepare is None  # nothing is trained: no dataset is needed, and none is invented


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olive.json", "olive.yaml", "olive.yml"])
def test_a_byte_order_mark_is_no_matter(tmp_path, name):
    content = small(BUILDER)
    text = json.dumps(content) if name.endswith("json") else yaml.safe_dump(content)
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    assert import_olive.read(tmp_path / name) == content


def test_paths_of_another_machine_and_placeholders_are_to_be_filled_in(tmp_path):
    content = tutorial(old=False, data="C:\\data\\rows.json") | {
        "input_model": {"type": "HfModel", "model_path": "/home/me/model"}
    }
    todo = notes(read(content), "todo")
    assert todo["input_model.model_path"].startswith("nothing is at this path here")
    assert todo["data_configs.0.load_dataset_config.params.data_files"].startswith("nothing is at this path here")
    content = small(BUILDER | {"precision": "<place_holder>"})
    content["input_model"]["model_path"] = "<model_name_placeholder>"
    imported = read(content)
    assert {"passes.p0.precision", "input_model.model_path"} <= notes(imported, "todo").keys()
    assert loaded(imported, tmp_path).fetch_model.source == "data/model"


def nodes(value: object, path: tuple = ()):
    """Paths of everything in a configuration."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(item, (*path, key))


@pytest.mark.parametrize("wrong", [None, 7, True, "text", [], {}, [1], {"strange": 1}, [[]]], ids=repr)
def test_a_value_of_another_kind_anywhere_ends_in_no_traceback(wrong):
    """Every value of two configurations is replaced, one after the other: each is read, and something is reported."""
    more = small(GPTQ, RTN, {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_mixed"}, BUILDER | {"extra_options": {"block_size": 32}},
                 pass_flows=[["p0", "p1", "p2", "p3"]], engine={"execution_providers": [CPU], "target": {"type": "LocalSystem", "accelerators": ["gpu"]}})  # fmt: skip
    for whole in (tutorial(data=STORE, model=REGISTRY), tutorial(old=False, spelling="kwargs"), more):
        for path in nodes(whole):
            if not path:
                continue
            content = copy.deepcopy(whole)
            inner = content
            for part in path[:-1]:
                inner = inner[part]
            inner[path[-1]] = copy.deepcopy(wrong)
            assert read(content).rows, path


def test_a_branch_becomes_the_commit_of_today(monkeypatch, tmp_path, capsys):
    (tmp_path / "olive.json").write_text(json.dumps(small(BUILDER)), encoding="utf-8")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "commit_of", lambda source, *kinds: "a" * 40)
    import_olive.main([str(tmp_path / "olive.json"), "--output", str(tmp_path / "one")])
    assert f"hf:org/name@{'a' * 40}" in (tmp_path / "one" / "params.yaml").read_text()
    assert "the commit of the branch today" in capsys.readouterr().out

    def fails(source, *kinds):
        raise UserError("out of reach")

    monkeypatch.setattr(hub, "commit_of", fails)
    import_olive.main([str(tmp_path / "olive.json"), "--output", str(tmp_path / "two")])
    assert "hf:org/name@main" in (tmp_path / "two" / "params.yaml").read_text()
    assert "put a commit or a tag behind the @" in capsys.readouterr().out
