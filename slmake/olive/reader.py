"""Olive's configuration, field by field: what each becomes here, or why it means nothing here.

A rule for a field is the name it has here (`finetune.lora_r`), a `Drop` with the reason, or a function. A field without a rule is
reported as unknown; nothing is dropped in silence.
"""

import re
from collections.abc import Callable
from typing import NamedTuple, get_args

from slmake.credentials import scrub
from slmake.olive import fields
from slmake.params import Params, dumped
from slmake.params.all import Stage

KINDS = {
    "same": "taken over",
    "renamed": "taken over under another name",
    "nearest": "not the same here; the nearest is taken",
    "default": "left out; what Olive does then",
    "dropped": "without meaning here",
    "todo": "to be filled in",
    "unknown": "not understood",
}
NOBODY = "00000000-0000-0000-0000-000000000000"
IMAGE = "myregistry.azurecr.io/slmake@sha256:" + "0" * 64


class Row(NamedTuple):
    """What became of one field."""

    kind: str
    field: str
    note: str


class Reader:
    """One configuration; after `run`: params, settings (or an empty dict) and rows."""

    def __init__(self, config: dict, revision: str):
        self.config, self.revision = config, revision
        self.params: dict[str, dict] = {name: {} for name in Params.model_fields}
        self.settings: dict = {}
        self.rows: list[Row] = []
        self.stages: set[str] = set()
        self.systems: dict[str, dict] = {}
        self.weights: dict[str, dict] = {}  # passes over PyTorch weights, by kind: their options
        self.goals: list[tuple] = []  # of evaluators: field, metric and sub-type, goal
        self.priorities: list[
            tuple[int, str]
        ] = []  # of evaluators' metrics that a search may aim at: priority and objective
        self.strategy: tuple[str, dict] | None = None  # search_strategy: field, and settings with theirs
        self.provider: tuple[str, str] | None = None  # field and name of the engine's execution provider
        self.data: dict[str, tuple[object, object]] = {}  # data configurations by name: key and content
        given = config.get("data_configs")
        if isinstance(given, dict):  # Olive 0.5: by name
            self.data = {str(name): (name, item) for name, item in given.items()}
        for i, item in enumerate(given if isinstance(given, list) else []):
            if isinstance(item, dict) and isinstance(item.get("name"), str):
                self.data[item["name"]] = (i, item)
            else:
                self.unknown(f"data_configs.{i}", "expected a mapping with a `name`")
        if given is not None and not isinstance(given, dict | list):
            self.unknown("data_configs", f"expected a list of mappings, found {type(given).__name__}")

    # -- what a rule may do ----------------------------------------------------------------------------------------

    def row(self, kind: str, field: str, note: str) -> None:
        self.rows.append(Row(kind, scrub(field), scrub(note)))

    def unknown(self, field: str, why: str = "no such field is known") -> None:
        self.row("unknown", field, why)

    def put(self, field: str, target: str, value: object) -> None:
        """Set `section.field` of params.yaml (or `settings: field`) and say so."""
        section, _, name = target.partition(".")
        if section == "settings":
            self.settings[name] = value
        else:
            self.params[section][name] = value
        short = scrub(repr(value))  # before it is cut: half a password is no longer recognized
        short = short if len(short) < 60 else f"{short[:56]} …"
        same = field.rpartition(".")[2] == name
        self.row(
            "same" if same else "renamed",
            field,
            f"{'azureml/settings.yaml: ' + name if section == 'settings' else target}: {short}",
        )

    def walk(self, where: str, values: object, rules: dict) -> None:
        """Apply `rules` to every field of a mapping."""
        if not isinstance(values, dict):
            self.unknown(where, f"expected a mapping, found {type(values).__name__}")
            return
        for key, value in values.items():
            field = f"{where}.{key}" if where else str(key)
            rule = rules.get(key)
            if rule is None:
                self.unknown(field)
            elif isinstance(rule, str):
                self.put(field, rule, value)
            elif isinstance(rule, fields.Drop):
                if rule.only is None or value in rule.only:
                    self.row("dropped", field, rule.why)
                else:
                    self.unknown(field, f"{value!r} cannot be had here: {rule.why}")
            else:
                rule(self, field, value)

    def blank(self, field: str, value: object) -> bool:
        """Whether a value is a placeholder that somebody was to fill in; says so."""
        if isinstance(value, str) and not re.search(r"(?i)^\s*(your |<.*>\s*$|$)", value):
            return False
        self.row("todo", field, f"still a placeholder: {value!r}")
        return True

    # -- the configuration as a whole ------------------------------------------------------------------------------

    def run(self) -> "Reader":
        from slmake.olive import goals, models, passes, systems

        engine = self.config["engine"] if isinstance(self.config.get("engine"), dict) else {}
        hosts = {key: self.config.get(key, engine.get(key)) for key in ("host", "target")}
        engine_rules = fields.ENGINE | systems.HOSTS | {"search_strategy": goals.strategy}
        top: dict[str, object] = {
            "input_model": models.input_model,
            "systems": systems.systems,
            "data_configs": lambda reader, field, value: None,  # read where a pass names them
            "passes": passes.passes,
            "azureml_client": systems.azureml_client,
            "pass_flows": passes.flows_of,
            "engine": lambda reader, field, value: reader.walk(field, value, engine_rules),
            "evaluators": goals.evaluators,
            **fields.TOP,
            **engine_rules,
        }
        self.walk("", self.config, top)
        systems.finish(self, hosts)
        goals.finish(self)
        goals.finish_strategy(self)
        for name, (key, _) in self.data.items():
            if name not in passes.read_data(self):
                self.row("dropped", f"data_configs.{key}", f"no pass that is taken over reads `{name}`")
        for section in ("input_model", "passes"):
            if section not in self.config:
                self.unknown(
                    section, "missing: nothing to start from" if section == "input_model" else "missing: nothing to do"
                )
        self.stages |= {"evaluate", "report"}
        self.params["all"] = {
            "stages": [name for name in get_args(Stage) if name in self.stages],
            "container": None,
        }
        self.params = {name: section for name, section in self.params.items() if section}
        return self


def as_yaml(sections: dict) -> str:
    """params.yaml with every section, because DVC looks each of them up; fields that are not named have their defaults."""
    head = "# Imported from Olive. Fields that are not here have their defaults: docs/params.md.\n"
    whole = sections | {name: {} for name in Params.model_fields if name not in sections}
    whole["prepare"] = whole["prepare"] or None  # no dataset
    return head + dumped(whole)


def settings_text(settings: dict) -> str:
    """azureml/settings.yaml, with placeholders where the configuration had none or its own."""
    full = {
        "subscription_id": NOBODY,
        "resource_group": "my-resource-group",
        "workspace_name": "my-workspace",
        "experiment_name": "slmake",
        "data": None,
        "model": None,
        "environment": {"image": IMAGE},
        **settings,
    }
    head = "# Imported from Olive. The image is that of `make image`, pushed to a registry of yours: docs/azureml.md.\n"
    return head + dumped(full)


Rule = str | fields.Drop | Callable[[Reader, str, object], None]
