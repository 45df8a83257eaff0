"""Olive's systems, azureml_client, host and target, as azureml/settings.yaml and quantize.execution_provider."""

import re

from slmake.olive.fields import OFF, Drop

PROVIDERS = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
    "WebGpuExecutionProvider": "webgpu",
}
SPELLINGS = {name.lower(): provider for name, provider in PROVIDERS.items()}
SPELLINGS |= {provider: provider for provider in PROVIDERS.values()} | {
    "directml": "dml",
    "directmlexecutionprovider": "dml",
}
SPELLINGS |= {"js": "webgpu", "jsexecutionprovider": "webgpu"}
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
            "default_auth_params": Drop("azure-identity's DefaultAzureCredential logs you in"),
            "read_timeout": Drop("set by the SDK"),
            "max_operation_retries": Drop("set by the SDK"),
            "operation_retry_interval": Drop("set by the SDK"),
        },
    )


def systems(reader, field: str, value: dict) -> None:
    """Rules for `systems`."""
    if not isinstance(value, dict):
        reader.unknown(field, f"expected a mapping, found {type(value).__name__}")
        return
    for name, system in value.items():
        read_system(reader, f"{field}.{name}", str(name), system)


def read_system(reader, base: str, name: str, system: object) -> None:
    """One system, whether below `systems` or written in the place of its name."""
    if not isinstance(system, dict):
        reader.unknown(base, f"expected a mapping, found {type(system).__name__}")
        return
    kind = str(system.get("type", "")).lower()
    nested = isinstance(system.get("config"), dict)
    flat = {key: inner for key, inner in system.items() if key != "type" and not (key == "config" and nested)}
    reader.systems[name] = {"remote": kind == "azureml", "gpu": False, "provider": None, "devices": []}
    if kind not in KINDS:
        reader.unknown(f"{base}.type", f"{system.get('type')!r} is no kind of system")
        return
    reader.row("dropped" if kind != "azureml" else "renamed", f"{base}.type", KINDS[kind])
    config = {**flat, **(system["config"] if nested else {})}
    reader.walk(f"{base}.config" if nested else base, config, COMMON | (AZURE if kind == "azureml" else ELSEWHERE))


KINDS = {
    "azureml": "azureml/settings.yaml: clusters",
    "localsystem": "snakemake runs here",
    "pythonenvironment": "the environment is that of `make setup`",
    "docker": "the image is that of `make image` (docs/containers.md)",
    "isolatedort": "the environment is that of `make setup`",
}


def _name(field: str) -> str:
    """The system that a field belongs to: `systems.NAME.…`, or `engine.target.…` for one that is written there."""
    parts = field.split(".")
    return parts[1] if parts[0] == "systems" else next(part for part in parts if part in ("host", "target"))


def accelerators(reader, field: str, value: object) -> None:
    """Devices and execution providers: `["gpu"]`, or a list of mappings."""
    system = reader.systems[_name(field)]
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        options = {"device": item} if isinstance(item, str) else item
        if not isinstance(options, dict):
            reader.unknown(f"{field}.{i}", f"{item!r} is no accelerator")
            continue
        for key in options:
            if key not in ("device", "execution_providers", "memory"):
                reader.unknown(f"{field}.{i}.{key}")
        device = str(options.get("device") or "").lower()
        system["gpu"] |= device == "gpu"
        where = f"{field}.{i}.execution_providers"
        provider = provider_of(reader, where, options.get("execution_providers"), device)
        if provider and system["provider"] is None:
            system["provider"] = (where, provider)
        elif device and not options.get("execution_providers"):
            system["devices"].append((f"{field}.{i}.device", device))


def provider_of(reader, field: str, value: object, device: str = "") -> str | None:
    """The execution provider that the export is made for; of several the first that runs on the device. None if there is none."""
    given = value if isinstance(value, list) else [value] if value else []
    names = [item[0] if isinstance(item, list) and item else item for item in given]
    strange = [name for name in names if not isinstance(name, str) or name.lower() not in SPELLINGS]
    if strange:
        reader.unknown(field, f"{strange[0]}: exported are {', '.join(PROVIDERS)}")
        return None
    providers = list(dict.fromkeys(SPELLINGS[name.lower()] for name in names))
    fitting = [name for name in providers if device != "gpu" or name != "cpu"] or providers
    if len(providers) > 1:
        others = ", ".join(name for name in providers if name != fitting[0])
        reader.row(
            "nearest", field, f"one export for one provider: {fitting[0]}; for {others} set quantize.execution_provider"
        )
    return fitting[0] if fitting else None


def engine_providers(reader, field: str, value: object) -> None:
    """`engine.execution_providers`: what the export is made for, where no accelerator says it."""
    provider = provider_of(reader, field, value)
    if provider:
        reader.provider = (field, provider)
    elif not value:
        reader.row("dropped", field, "absent")


def compute(reader, field: str, value: str) -> None:
    """The name of a compute in the workspace."""
    if reader.blank(field, value):
        return
    if not re.fullmatch(NAME, value):
        reader.unknown(field, f"{value!r} cannot be the name of a compute")
        return
    reader.systems[_name(field)]["name"] = value
    reader.row("renamed", field, f"azureml/settings.yaml: clusters.{_name(field)}.name: {value}")


def instance_type(reader, field: str, value: str) -> None:
    """Kubernetes: what a step gets."""
    if value and not reader.blank(field, value):
        reader.systems[_name(field)]["instance_type"] = value
        reader.row("same", field, f"azureml/settings.yaml: clusters.{_name(field)}.instance_type: {value}")


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
    "device": Drop("detected where the rule runs"),
    "execution_providers": lambda reader, field, value: accelerators(
        reader, field.rpartition(".")[0] + ".accelerators", [{"execution_providers": value}]
    ),
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
    known = reader.config.get("systems") if isinstance(reader.config.get("systems"), dict) else {}
    if value is None:
        reader.row("dropped", field, "this machine")
    elif isinstance(value, dict):
        read_system(reader, field, field.rpartition(".")[2], value)
    elif not isinstance(value, str) or value not in known:
        reader.unknown(field, f"{value!r} is none of systems")
    elif str(
        (known[value] or {}).get("type", "") if isinstance(known[value], dict) else ""
    ).lower() == "azureml" and field.endswith("host"):
        reader.row("renamed", field, f"azureml/settings.yaml: compute: {value}")
    else:
        reader.row(
            "dropped",
            field,
            "decides quantize.execution_provider" if field.endswith("target") else "snakemake runs here",
        )


HOSTS = {"host": named, "target": named, "execution_providers": engine_providers}


def finish(reader, hosts: dict[str, object]) -> None:
    """Execution provider from the target; clusters and what runs where from the systems."""
    hosts = {key: key if isinstance(value, dict) else str(value) for key, value in hosts.items()}
    named_first = [reader.systems.get(hosts[key], {}).get("provider") for key in ("target", "host")]
    providers = [system["provider"] for system in reader.systems.values()] + [reader.provider]
    used = next(filter(None, [*named_first, reader.provider]), None) if "quantize" in reader.stages else None
    if used:
        reader.put(used[0], "quantize.execution_provider", used[1])
    runs = (
        "quantize" in reader.stages and reader.params["quantize"].get("precision") != "fp32"
    )  # which cuda has none of
    for name, system in reader.systems.items():
        for field, device in system["devices"]:  # without a provider, Olive takes one that is installed
            if device == "gpu" and name == hosts["target"] and not used and runs:
                reader.put(field, "quantize.execution_provider", "cuda")
                used = (field, "cuda")
                continue
            note = "detected where the rule runs" if device == "cpu" else "rules that use it are listed in compute"
            reader.row("dropped", field, note)
    for provider in filter(None, providers):
        if provider != used:
            reason = f"the export is made for {used[1]}" if used else "nothing is exported for it"
            reader.row("dropped", provider[0], reason)
    remote = {name: system for name, system in reader.systems.items() if system["remote"]}
    if not remote and not reader.settings:
        return
    clusters = {"cpu": {"name": "cpu-cluster", "size": "Standard_D8s_v5", "max_nodes": 1}}
    for name, system in remote.items():
        kubernetes = {"instance_type": system["instance_type"]} if "instance_type" in system else {}
        clusters[name] = {"name": system.get("name", f"{name.replace('_', '-')}-cluster"), **kubernetes}
    reader.settings["clusters"] = clusters
    host = hosts["host"] if hosts["host"] in remote else next(iter(remote), "cpu")
    needs = ["finetune", "evaluate"] if "finetune" in reader.stages else ["evaluate"]
    if reader.params["quantize"].get("execution_provider") == "cuda":
        needs.append("quantize")  # the export is loaded and made to generate where it is made
    gpu = host in remote and remote[host]["gpu"]
    reader.settings["compute"] = {"default": "cpu" if gpu or host == "cpu" else host} | (
        dict.fromkeys(needs, host) if gpu else {}
    )
