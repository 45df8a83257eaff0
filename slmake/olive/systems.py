"""Olive's systems, azureml_client, host and target, as azureml/settings.yaml and quantize.execution_provider."""

import re

from slmake.olive.fields import OFF, Drop

PROVIDERS = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
    "WebGpuExecutionProvider": "webgpu",
}
OURS = "the image is that of `make image`: Olive's packages are not what the rules need"
NAME = r"[A-Za-z][A-Za-z0-9-]{1,31}"


def azureml_client(reader, field: str, value: dict) -> None:
    """Rules for `azureml_client`."""

    def setting(reader, field, inner):
        if not reader.blank(field, inner):
            reader.put(field, f"settings.{field.rpartition('.')[2]}", inner)

    reader.settings["experiment_name"] = "slmake"
    reader.walk(
        field,
        value,
        {
            "subscription_id": setting,
            "resource_group": setting,
            "workspace_name": setting,
            "keyvault_name": Drop("no secret is sent: the hub's token comes from HF_TOKEN where the rule runs"),
            "aml_config_path": Drop(
                "put its subscription_id, resource_group and workspace_name into azureml/settings.yaml"
            ),
            "default_auth_params": Drop("azure-identity's DefaultAzureCredential finds out who you are"),
            "read_timeout": Drop("set by the SDK"),
            "max_operation_retries": Drop("set by the SDK"),
            "operation_retry_interval": Drop("set by the SDK"),
        },
    )


def systems(reader, field: str, value: dict) -> None:
    """Rules for `systems`."""
    for name, system in value.items():
        base = f"{field}.{name}"
        kind = str(system.get("type", "")).lower()
        flat = {key: inner for key, inner in system.items() if key not in ("type", "config")}
        config = {**flat, **(system.get("config") or {})}
        where = f"{base}.config" if "config" in system else base
        reader.systems[name] = {"remote": kind == "azureml", "gpu": False, "provider": None}
        if kind not in ("azureml", "localsystem", "pythonenvironment", "docker", "isolatedort"):
            reader.unknown(f"{base}.type", f"{system.get('type')!r} is no kind of system")
            continue
        reader.row("dropped" if kind != "azureml" else "renamed", f"{base}.type", KINDS[kind])
        reader.walk(where, config, COMMON | (AZURE if kind == "azureml" else ELSEWHERE))


KINDS = {
    "azureml": "azureml/settings.yaml: clusters",
    "localsystem": "snakemake runs here",
    "pythonenvironment": "the environment is that of `make setup`",
    "docker": "the image is that of `make image` (docs/containers.md)",
    "isolatedort": "the environment is that of `make setup`",
}


def _system(reader, field: str) -> dict:
    return reader.systems[field.split(".")[1]]


def accelerators(reader, field: str, value: list) -> None:
    """Devices and execution providers: `["gpu"]`, or a list of mappings."""
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        options = {"device": item} if isinstance(item, str) else item
        for key in options:
            if key not in ("device", "execution_providers", "memory"):
                reader.unknown(f"{field}.{i}.{key}")
        if options.get("device") == "gpu":
            _system(reader, field)["gpu"] = True
        names = [name if isinstance(name, str) else name[0] for name in options.get("execution_providers") or []]
        strange = [name for name in names if name not in PROVIDERS]
        if strange:
            reader.unknown(f"{field}.{i}.execution_providers", f"{strange[0]}: exported are {', '.join(PROVIDERS)}")
        elif names and _system(reader, field)["provider"] is None:
            _system(reader, field)["provider"] = (f"{field}.{i}.execution_providers", PROVIDERS[names[0]])
        elif options.get("device"):
            reader.row(
                "dropped",
                f"{field}.{i}.device",
                "found out where the rule runs"
                if options["device"] == "cpu"
                else "rules that use it are listed in compute",
            )


def compute(reader, field: str, value: str) -> None:
    """The name of a compute in the workspace."""
    if reader.blank(field, value):
        return
    if not re.fullmatch(NAME, value):
        reader.unknown(field, f"{value!r} cannot be the name of a compute")
        return
    _system(reader, field)["name"] = value
    reader.row("renamed", field, f"azureml/settings.yaml: clusters.{field.split('.')[1]}.name: {value}")


def instance_type(reader, field: str, value: str) -> None:
    """Kubernetes: what a step gets."""
    if value and not reader.blank(field, value):
        _system(reader, field)["instance_type"] = value
        reader.row("same", field, f"azureml/settings.yaml: clusters.{field.split('.')[1]}.instance_type: {value}")


def docker(reader, field: str, value: dict) -> None:
    """Olive's image and conda file."""
    own = Drop(OURS)
    names = (
        "base_image",
        "dockerfile",
        "build_context_path",
        "conda_file_path",
        "name",
        "version",
        "build_args",
        "image_name",
    )
    reader.walk(field, value, dict.fromkeys((*names, "container_name", "requirements_file_path"), own))


COMMON = {
    "accelerators": accelerators,
    "device": Drop("found out where the rule runs"),
    "execution_providers": Drop("named under accelerators"),
    "hf_token": Drop("the hub's token comes from HF_TOKEN where the rule runs"),
}
AZURE = {
    "aml_compute": compute,
    "instance_type": instance_type,
    "instance_count": Drop("one machine per rule", (*OFF, 1)),
    "aml_docker_config": docker,
    "aml_environment_config": docker,
    "azureml_client_config": azureml_client,
    "resources": Drop("clusters.NAME.instance_type says what a step gets", OFF),
    "tags": Drop("a run is tagged with base model, data and commit"),
    "olive_managed_env": Drop(OURS),
    "is_dev": Drop(OURS),
    "datastores": Drop("outputs go to the workspace's default datastore"),
}
ELSEWHERE = {
    "local_docker_config": docker,
    "dockerfile": Drop(OURS),
    "image_name": Drop(OURS),
    "build_context_path": Drop(OURS),
    "python_environment_path": Drop("the environment is that of `make setup`"),
    "environment_variables": Drop("set them where snakemake is called", OFF),
    "prepend_to_path": Drop("set it where snakemake is called", OFF),
    "olive_managed_env": Drop("the environment is that of `make setup`"),
    "requirements_file": Drop("the environment is that of `make setup`"),
}


def named(reader, field: str, value: object) -> None:
    """`host` and `target`: a system's name (or none)."""
    if value is None:
        reader.row("dropped", field, "this machine")
    elif not isinstance(value, str) or value not in (reader.config.get("systems") or {}):
        reader.unknown(field, f"{value!r} is none of systems")
    elif str(reader.config["systems"][value].get("type", "")).lower() == "azureml" and field.endswith("host"):
        reader.row("renamed", field, f"azureml/settings.yaml: compute: {value}")
    else:
        reader.row(
            "dropped",
            field,
            "decides quantize.execution_provider" if field.endswith("target") else "snakemake runs here",
        )


HOSTS = {"host": named, "target": named}


def finish(reader, hosts: dict[str, object]) -> None:
    """Execution provider from the target; clusters and what runs where from the systems."""
    for key in ("target", "host"):
        provider = reader.systems.get(str(hosts[key]), {}).get("provider")
        if provider and "quantize" in reader.stages:
            field, name = provider
            reader.put(field, "quantize.execution_provider", name)
            break
    used = provider[0] if provider else None
    for system in reader.systems.values():
        if system["provider"] and system["provider"][0] != used:
            reader.row(
                "dropped",
                system["provider"][0],
                f"the model is made for {hosts['target'] or hosts['host'] or 'this machine'}",
            )
    remote = {name: system for name, system in reader.systems.items() if system["remote"]}
    if not remote and not reader.settings:
        return
    clusters = {"cpu": {"name": "cpu-cluster", "size": "Standard_D8s_v5", "max_nodes": 1}}
    for name, system in remote.items():
        kubernetes = {"instance_type": system["instance_type"]} if "instance_type" in system else {}
        clusters[name] = {"name": system.get("name", f"{name.replace('_', '-')}-cluster"), **kubernetes}
    reader.settings["clusters"] = clusters
    host = str(hosts["host"]) if str(hosts["host"]) in remote else next(iter(remote), "cpu")
    needs = ["finetune", "evaluate"] if "finetune" in reader.stages else ["evaluate"]
    if reader.params["quantize"].get("execution_provider") == "cuda":
        needs.append("quantize")  # the export is loaded and made to generate where it is made
    gpu = host in remote and remote[host]["gpu"]
    reader.settings["compute"] = {"default": "cpu" if gpu or host == "cpu" else host} | (
        dict.fromkeys(needs, host) if gpu else {}
    )
