"""azureml/settings.yaml: what a user fills in, checked as params.yaml is."""

import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from slmake.credentials import holds_secret, masked
from slmake.errors import UserError
from slmake.params import RULES as RULE_NAMES
from slmake.params import Section
from slmake.params.errors import Loader, lines, yaml_problem

NOBODY = "00000000-0000-0000-0000-000000000000"
# Rules that are no steps: `register` is Azure ML's way to publish; a rehearsal is for the machine that submits.
LEFT_HERE = ("publish", "rehearse")
RULES = Literal[
    tuple(name for name in RULE_NAMES if name not in (*LEFT_HERE, "candidate"))
]  # the rules that become steps
# What Azure ML can mount: an asset of the workspace, a path in a datastore, a model of a registry.
ASSET = r"azureml:[\w.-]+(:[\w.-]+|@[\w.-]+)"
DATASTORE = r"azureml://((subscriptions|workspaces)/\S+/)?datastores/[\w-]+/paths/\S+"
REGISTRY = r"azureml://registries/[\w-]+/models/[\w.-]+/versions/[\w.-]+"


class Build(Section):
    """An image that Azure ML builds."""

    context: str = Field(min_length=1, description="Folder to send, from the project's folder on.")
    dockerfile: str = Field("Dockerfile", min_length=1, description="Recipe in it.")


class Environment(Section):
    """Where the steps run. Its packages must be those of envs/cpu.lock or envs/cuda.lock: every step compares them first."""

    image: str | None = Field(
        None,
        pattern=r"^[\w.-]+(:\d+)?/[^\s@]+(@sha256:[0-9a-f]{64})?$",
        description="Image in a registry that the workspace can read, `HOST/NAME@sha256:…` (`make image` builds it). With conda_file "
        "a tag will do: the packages come from the file.",
    )
    conda_file: str | None = Field(None, min_length=1, description="Conda file to install on top of `image`.")
    build: Build | None = Field(None, description="In place of both: an image to build.")

    @model_validator(mode="after")
    def _one_way(self):
        if (self.image is None) == (self.build is None):
            raise ValueError("give either image (with its digest, or with conda_file) or build")
        if self.build and self.conda_file:
            raise ValueError("conda_file goes with image, not with build")
        if self.image and not self.conda_file and "@sha256:" not in self.image:
            raise ValueError(
                "image has no digest, so tomorrow it could be another: HOST/NAME@sha256:… (or add conda_file)"
            )
        for field, path in (("conda_file", self.conda_file), ("build.context", self.build and self.build.context)):
            if path and not Path(path).exists():
                raise ValueError(f"{field}: {path}: no such file or folder")
        if self.build and not Path(self.build.context, self.build.dockerfile).is_file():
            raise ValueError(f"build.dockerfile: {self.build.context}/{self.build.dockerfile}: no such file")
        return self


class Cluster(Section):
    """A compute of the workspace: a cluster of virtual machines, or attached Kubernetes (AKS or Azure Arc)."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9-]{1,31}$", description="Its name in the workspace.")
    size: str | None = Field(
        None,
        min_length=1,
        description="Size of a virtual machine, such as `Standard_NC4as_T4_v3`: `submit` creates a missing cluster of this size.",
    )
    max_nodes: int = Field(1, ge=1, le=1000, description="Created with: machines at most. None run while no step does.")
    tier: Literal["dedicated", "low_priority"] = Field(
        "dedicated",
        description="Created with: `low_priority` machines cost less and may be taken away; `finetune` then resumes from its last checkpoint.",
    )
    instance_type: str | None = Field(None, min_length=1, description="Kubernetes only: instance type of a step.")
    environment: Environment | None = Field(
        None, description="Environment of the steps here, if another than the file's."
    )

    @model_validator(mode="after")
    def _one_kind(self):
        if self.size and self.instance_type:
            raise ValueError("size is of virtual machines, instance_type of Kubernetes: give one of them")
        return self


class Settings(Section):
    """The whole file."""

    subscription_id: str = Field(
        pattern=r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$", description="Subscription."
    )
    resource_group: str = Field(pattern=r"^[\w.()-]{1,90}$", description="Resource group of the workspace.")
    workspace_name: str = Field(pattern=r"^[A-Za-z0-9][\w-]{2,32}$", description="Workspace.")
    experiment_name: str = Field(
        "slmake", pattern=r"^[\w-]+$", max_length=255, description="Experiment under which runs are listed."
    )
    data: str | dict[Literal["train", "eval", "test"], str] | None = Field(
        None,
        description="The dataset on Azure in place of prepare.source: `azureml:NAME:VERSION` or `azureml://datastores/NAME/paths/PATH` "
        "(a mapping where prepare.source is one). Without it, local files are uploaded and remote ones are read by the step.",
    )
    model: str | None = Field(
        None,
        description="The base model on Azure in place of fetch_model.source: `hf:ORG/NAME@REVISION`, `azureml://datastores/NAME/paths/PATH`, "
        "`azureml:NAME:VERSION` or `azureml://registries/REGISTRY/models/NAME/versions/VERSION`.",
    )
    model_type: Literal["custom_model", "mlflow_model"] = Field(
        "custom_model", description="How a registered model was registered: both are read, if safetensors are in it."
    )
    environment: Environment = Field(description="Where the steps run.")
    clusters: dict[str, Cluster] = Field(min_length=1, description="Computes, under names used below.")
    compute: dict[Literal["default"] | RULES, str] = Field(
        description="Which of `clusters` runs a rule; `default` runs all others."
    )

    @model_validator(mode="after")
    def _names_are_known(self):
        if "default" not in self.compute:
            raise ValueError("compute has no `default`: say which of clusters runs the rules that are not listed")
        for rule, name in self.compute.items():
            if name not in self.clusters:
                raise ValueError(f"compute.{rule}: clusters has no `{name}`; it has {', '.join(self.clusters)}")
        for text in (*self.data_files, self.model or ""):
            if "?" in text or holds_secret(text):
                raise ValueError(
                    f"`{masked(text)}`: a query, or a signature, key or token, is refused: this file, the pipeline and the run's tags are "
                    "shared. Azure ML signs in by itself"
                )
        for text in self.data_files:
            if not re.fullmatch(f"{ASSET}|{DATASTORE}", text):
                raise ValueError(
                    f"data: `{masked(text)}` is neither azureml:NAME:VERSION nor azureml://datastores/NAME/paths/PATH"
                )
        if self.model and not re.fullmatch(rf"{ASSET}|{DATASTORE}|{REGISTRY}|hf:[^@\s]+@\S+", self.model):
            raise ValueError(
                f"model: `{masked(self.model)}` is none of hf:ORG/NAME@REVISION, azureml://datastores/NAME/paths/PATH, azureml:NAME:VERSION, "
                "azureml://registries/REGISTRY/models/NAME/versions/VERSION"
            )
        return self

    @property
    def data_files(self) -> list[str]:
        """What `data` names."""
        return [*self.data.values()] if isinstance(self.data, dict) else [*filter(None, [self.data])]

    def cluster(self, rule: str) -> Cluster:
        """The compute that runs a rule."""
        return self.clusters[self.compute.get(rule, self.compute["default"])]

    def refuse_blanks(self, path: Path) -> None:
        """Raise UserError while the file still is the one that the project ships."""
        if self.subscription_id == NOBODY:
            raise UserError(
                f"{path}: subscription_id is still the placeholder. Fill in subscription_id, resource_group and workspace_name: "
                "they are on the workspace's overview page in the Azure portal, and in its config.json."
            )


def load(path: Path) -> Settings:
    """Read and validate the settings.

    Raises:
        UserError: the file is missing, is not YAML, or breaks the schema; every broken field is named at once.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. Restore it with `git checkout {path}`, or name yours: --settings FILE."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {yaml_problem(error)}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected fields such as `workspace_name:`, found {type(data).__name__}.")
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        problems = list(dict.fromkeys(line.removeprefix("params: ") for line in lines(error.errors(), data, Settings)))
        raise UserError(
            f"{path}: {len(problems)} error{'s' * (len(problems) > 1)}; nothing was sent. See docs/azureml.md.\n"
            + "\n".join("  " + line for line in problems)
        ) from None
