"""Olive's input_model, of each kind, as a source of a base model; and its resource paths, which data sets use too."""

import re

from slmake.olive.fields import OFF, Drop

REMOTE_CODE = Drop("no code of a model repository is run; the model must be native to transformers")
LOADED = {
    "trust_remote_code": REMOTE_CODE,
    "torch_dtype": "fetch_model.dtype",
    "dtype": "fetch_model.dtype",
    "attn_implementation": Drop("attention is the project's own while training"),
    "device_map": Drop("the device is found out"),
    "use_cache": Drop("set by each rule"),
    "low_cpu_mem_usage": Drop("weights are read tensor by tensor"),
    "token": Drop("the hub's token comes from HF_TOKEN"),
    "use_auth_token": Drop("the hub's token comes from HF_TOKEN"),
}
TASK = Drop("text generation", (*OFF, "text-generation", "text-generation-with-past"))


def input_model(reader, field: str, value: dict) -> None:
    """Rules for `input_model`; old forms keep everything below `config`, the present one does not."""
    kind = str(value.get("type", "")).lower()
    if kind not in ("pytorchmodel", "hfmodel"):
        reader.unknown(f"{field}.type", f"{value.get('type')!r}: base models are PyTorch models in Hugging Face layout")
        return

    def config(reader, field, inner):
        reader.walk(field, inner, rules)

    def hugging_face(reader, field, inner):
        revision = (inner.get("from_pretrained_args") or {}).get("revision") if isinstance(inner, dict) else None
        reader.walk(
            field,
            inner,
            {
                "model_name": lambda reader, field, name: source(reader, field, name, revision),
                "task": TASK,
                "feature": TASK,
                "from_pretrained_args": loading,
                "model_class": Drop("a causal language model", OFF),
                "components": Drop("the whole model", OFF),
            },
        )

    def loading(reader, field, inner):
        reader.walk(
            field, inner, {**LOADED, "revision": Drop("stands behind the @ of fetch_model.source"), "extra_args": more}
        )

    def more(reader, field, inner):
        reader.walk(field, inner or {}, LOADED)

    flat = {**value, **(value.get("config") or {})}
    given = (flat.get("load_kwargs") or {}).get("revision") if isinstance(flat.get("load_kwargs"), dict) else None
    rules = {
        "type": Drop("the only kind"),
        "config": config,
        "hf_config": hugging_face,
        "load_kwargs": loading,
        "task": TASK,
        "model_path": lambda reader, field, path: source(reader, field, path, given),
        "model_file_format": Drop("safetensors"),
        "model_attributes": Drop("read from the model's config.json"),
        "io_config": Drop("the model builder knows the inputs and outputs"),
        "dummy_inputs_func": Drop("the model builder needs none"),
        "generative": Drop("it generates", (*OFF, True)),
        "adapter_path": Drop("training starts without an adapter", OFF),
        "model_loader": Drop("no code of a model repository is run", OFF),
        "model_script": Drop("no code of a model repository is run", OFF),
        "script_dir": Drop("no code of a model repository is run", OFF),
    }
    reader.walk(field, value, rules)


def source(reader, field: str, value: object, revision: str | None = None) -> None:
    """Set fetch_model.source (and the settings' model) from a name, a path or a resource path."""
    if value is None:
        reader.row("dropped", field, "the model is named elsewhere")
        return
    text = resource(reader, field, value)
    if text is None:
        return
    if text.startswith("azureml:") and not text.startswith("azureml://"):
        reader.put(field, "settings.model", text)
        reader.params["fetch_model"]["source"] = "data/model"
        reader.row(
            "todo", field, "a workspace's model is read on Azure only; for a build here put its folder into data/model"
        )
    elif text.startswith("azureml://datastores/"):
        reader.put(field, "settings.model", text)
        reader.params["fetch_model"]["source"] = f"{text}#etag=UNKNOWN"
        pin(reader, field, text)
    elif text.startswith("azureml://registries/"):
        reader.put(field, "fetch_model.source", text)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith((".", "models/", "data/")):
        chosen = revision or reader.revision
        reader.put(field, "fetch_model.source", f"hf:{text}@{chosen}")
        if not revision and chosen == "main":
            reader.row(
                "todo", field, "the revision is a branch: put a commit or a tag behind the @, so that it stays the same"
            )
    else:
        reader.put(field, "fetch_model.source", text)


def pin(reader, field: str, text: str) -> None:
    """Say how a datastore's path gets its pin."""
    reader.row(
        "todo", field, f"for a build here, pin it: python -m tools.pin '{text}' (on Azure ML it is mounted as it is)"
    )


def resource(reader, field: str, value: object) -> str | None:
    """A resource path as text that sources/schemes.py or azureml/settings.yaml knows; None if it is reported already."""
    if isinstance(value, str):
        if value.lower().endswith(".gguf") or not reader.blank(field, value):
            return value
        return None
    if not isinstance(value, dict) or "type" not in value:
        reader.unknown(field, f"neither a path nor a resource: {str(value)[:60]}")
        return None
    kind = str(value["type"]).lower()
    config = value.get("config") or {key: inner for key, inner in value.items() if key != "type"}
    names = {
        "local_file": ("path",),
        "local_folder": ("path",),
        "string_name": ("name",),
        "azureml_model": ("name", "version"),
        "azureml_registry_model": ("registry_name", "name", "version"),
        "azureml_datastore": ("datastore_name", "relative_path"),
    }.get(kind)
    if names is None:
        reader.unknown(
            f"{field}.type",
            f"{value['type']!r} is not known: {', '.join(('local_file', 'local_folder', 'azureml_model', 'azureml_registry_model', 'azureml_datastore'))}",
        )
        return None
    url = config.get("datastore_url")
    inner = f"{field}.config" if "config" in value else field
    for key in value if "config" in value else ():
        if key not in ("type", "config"):
            reader.unknown(f"{field}.{key}")
    for key in config:
        if key == "azureml_client":
            client(reader, f"{inner}.azureml_client", config[key])
        elif key not in (*names, "datastore_url"):
            reader.unknown(f"{inner}.{key}")
    if kind == "azureml_datastore" and url:
        return url
    missing = [name for name in names if config.get(name) in (None, "")]
    if missing:
        reader.unknown(f"{inner}.{missing[0]}", "missing")
        return None
    blanks = [name for name in names if isinstance(config[name], str) and reader.blank(f"{inner}.{name}", config[name])]
    if blanks:
        return None
    first, *rest = (str(config[name]) for name in names)
    if kind == "azureml_model":
        return f"azureml:{first}:{rest[0]}"
    if kind == "azureml_registry_model":
        return f"azureml://registries/{first}/models/{rest[0]}/versions/{rest[1]}"
    if kind == "azureml_datastore":
        return f"azureml://datastores/{first}/paths/{rest[0].lstrip('/')}"
    return first


def client(reader, field: str, value: dict) -> None:
    """A workspace named inside a resource: it must be the one named at the top."""
    top = reader.config.get("azureml_client") or {}
    for key, one in value.items():
        if key not in ("subscription_id", "resource_group", "workspace_name"):
            reader.unknown(f"{field}.{key}")
        elif reader.blank(f"{field}.{key}", one):
            continue
        elif key in top and top[key] != one and not reader.blank(f"azureml_client.{key}", top[key]):
            reader.unknown(f"{field}.{key}", f"{one!r}, but azureml_client says {top[key]!r}: one workspace only")
        elif key not in top:
            reader.put(f"{field}.{key}", f"settings.{key}", one)
        else:
            reader.row("dropped", f"{field}.{key}", "the same workspace as azureml_client")
