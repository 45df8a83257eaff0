"""Olive's input_model, of each kind, as a source of a base model; and its resource paths, which datasets use too."""

import re
from pathlib import Path

from slmake.credentials import scrub
from slmake.olive.fields import OFF, TRACED, Drop

REMOTE_CODE = Drop("no code of a model repository is run; the model must be native to transformers")
HUB = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the hub, unless a folder's name is at its beginning
LOCAL = (".", "models/", "data/", "adapters/")
BRANCH = "the revision is a branch: put a commit or a tag behind the @, so that it stays the same"
ATTENTION = Drop("attention is the project's own while training, the builder's in the export")
LOADED = {
    "trust_remote_code": REMOTE_CODE,
    "torch_dtype": "fetch_model.dtype",
    "dtype": "fetch_model.dtype",
    "attn_implementation": ATTENTION,
    "_attn_implementation": ATTENTION,
    "sliding_window": Drop("read from the model's config.json"),
    "use_flash_attention_2": ATTENTION,
    "device_map": Drop("the device is detected"),
    "use_cache": Drop("set by each rule"),
    "low_cpu_mem_usage": Drop("weights are read tensor by tensor"),
    "token": Drop("the hub's token comes from HF_TOKEN"),
    "use_auth_token": Drop("the hub's token comes from HF_TOKEN"),
}
TASK = Drop("text generation", (*OFF, "text-generation", "text-generation-with-past"))


def revision_of(value: object, *names: str) -> str | None:
    """The revision that the arguments of a loader name, if they do."""
    for name in names:
        arguments = value.get(name) if isinstance(value, dict) else None
        if isinstance(arguments, dict) and isinstance(arguments.get("revision"), str):
            return arguments["revision"]
    return None


def input_model(reader, field: str, value: dict) -> None:
    """Rules for `input_model`; old forms keep everything below `config`, the present one does not."""
    if not isinstance(value, dict):
        reader.unknown(field, f"expected a mapping, found {type(value).__name__}")
        return
    kind = str(value.get("type", "")).lower()
    if kind not in ("pytorchmodel", "hfmodel"):
        reader.unknown(f"{field}.type", f"{value.get('type')!r}: base models are PyTorch models in Hugging Face layout")
        return

    def config(reader, field, inner):
        reader.walk(field, inner, rules)

    def hugging_face(reader, field, inner):
        revision = revision_of(inner, "from_pretrained_args", "model_loading_args")
        reader.walk(
            field,
            inner,
            {
                "model_name": lambda reader, field, name: source(reader, field, name, revision),
                "task": TASK,
                "feature": TASK,
                "from_pretrained_args": loading,
                "model_loading_args": loading,
                "model_class": Drop("transformers knows the class from config.json"),
                "components": Drop("the whole model", OFF),
            },
        )

    def loading(reader, field, inner):
        reader.walk(
            field, inner, {**LOADED, "revision": Drop("stands behind the @ of fetch_model.source"), "extra_args": more}
        )

    def more(reader, field, inner):
        reader.walk(field, inner or {}, LOADED)

    config_block = value.get("config")
    pinned = revision_of({**value, **(config_block if isinstance(config_block, dict) else {})}, "load_kwargs")
    rules = {
        "type": Drop("the only kind"),
        "config": config,
        "hf_config": hugging_face,
        "load_kwargs": loading,
        "task": TASK,
        "model_path": lambda reader, field, path: source(reader, field, path, pinned),
        "model_file_format": Drop("safetensors"),
        "model_attributes": Drop("read from the model's config.json"),
        **dict.fromkeys(("io_config", "dummy_inputs_func", "model_script", "user_script", "script_dir"), TRACED),
        "generative": Drop("it generates", (*OFF, True)),
        "adapter_path": adapter,
        "model_loader": Drop("no code of a model repository is run", OFF),
    }
    reader.walk(field, value, rules)


def adapter(reader, field: str, value: object) -> None:
    """An adapter that another trainer made: a folder, or a hub's repository."""
    if value is None:
        reader.row("dropped", field, "absent")
        return
    text = resource(reader, field, value)
    if text is None:
        return
    if text.startswith("azureml:") and not text.startswith("azureml://"):
        reader.put(field, "adapter.source", "data/adapter")
        reader.row("todo", field, f"put the folder of {text} into data/adapter: a workspace's model is not read here")
    elif text.startswith("azureml://datastores/"):
        reader.put(field, "adapter.source", f"{text}#etag=UNKNOWN")
        pin(reader, field, text)
    elif HUB.fullmatch(text) and not text.startswith(LOCAL):
        reader.put(field, "adapter.source", f"hf:{text}@main")
        reader.row("todo", field, BRANCH)
    else:
        reader.put(field, "adapter.source", text)
        elsewhere(reader, field, text)


def source(reader, field: str, value: object, revision: str | None = None) -> None:
    """Set fetch_model.source (and the settings' model) from a name, a path or a resource path."""
    if value is None:
        reader.row("dropped", field, "the model is named elsewhere")
        return
    text = resource(reader, field, value)
    if text is None:
        if isinstance(value, str):  # a placeholder
            reader.params["fetch_model"]["source"] = "data/model"
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
    elif HUB.fullmatch(text) and not text.startswith(LOCAL):
        chosen = revision or reader.revision
        reader.put(field, "fetch_model.source", f"hf:{text}@{chosen}")
        if not revision and chosen == "main":
            reader.row("todo", field, BRANCH)
    else:
        reader.put(field, "fetch_model.source", text)
        elsewhere(reader, field, text)


def elsewhere(reader, field: str, text: str) -> None:
    """Report a path of another machine."""
    if re.match(r"/|[A-Za-z]:[\\/]|~", text) and not Path(text).exists():
        reader.row("todo", field, "nothing is at this path here: put yours in its place")


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
        reader.unknown(field, f"neither a path nor a resource: {scrub(str(value))[:60]}")
        return None
    kind = str(value["type"]).lower()
    config = value.get("config") or {key: inner for key, inner in value.items() if key != "type"}
    if not isinstance(config, dict):
        reader.unknown(f"{field}.config", f"expected a mapping, found {type(config).__name__}")
        return None
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
    if kind == "azureml_datastore" and isinstance(url, str) and url:
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
    top = reader.config.get("azureml_client")
    top = top if isinstance(top, dict) else {}
    if not isinstance(value, dict):
        reader.unknown(field, f"expected a mapping, found {type(value).__name__}")
        return
    for key, inner in value.items():
        if key not in ("subscription_id", "resource_group", "workspace_name"):
            reader.unknown(f"{field}.{key}")
        elif reader.blank(f"{field}.{key}", inner):
            continue
        elif key in top and top[key] != inner and not reader.blank(f"azureml_client.{key}", top[key]):
            reader.unknown(f"{field}.{key}", f"{inner!r}, but azureml_client says {top[key]!r}: one workspace only")
        elif key not in top:
            reader.put(f"{field}.{key}", f"settings.{key}", inner)
        else:
            reader.row("dropped", f"{field}.{key}", "the same workspace as azureml_client")
