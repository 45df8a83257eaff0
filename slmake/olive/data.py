"""Olive's data configurations, of all spellings, as the section prepare."""

import re

from slmake.credentials import scrub
from slmake.olive import defaults, fields, models
from slmake.olive.fields import OFF, Drop

FORMS = ("json", "jsonl", "csv", "parquet", "text")
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
OLIVES = ("huggingface_dataset", "local_dataset", "dummy_dataset")  # loading functions of its own
CHOSEN = "{!r}: put the chosen rows into the file"
LOADING = ("data_name", "subset", "split", "data_files", "data_dir", "col_filters", "data_type")


def train_data(reader, field: str, value: object) -> None:
    """The data of a pass: a name of data_configs, or the configuration itself."""
    where, config = named(reader, field, value)
    if config is not None:
        reader.row("renamed", field, "prepare")
        data(reader, where, config, "train")


def eval_data(reader, field: str, value: object) -> None:
    """A dataset of its own for the loss during training."""
    if value is None:
        reader.row("dropped", field, "cut from the training rows: prepare.eval_fraction")
        return
    where, config = named(reader, field, value)
    if config is not None:
        reader.row("renamed", field, "prepare.source.eval")
        data(reader, where, config, "eval")


def calibration_data(reader, field: str, value: object) -> None:
    """The data of a pass that calibrates."""
    if value is None:
        reader.row("dropped", field, "the training rows calibrate, or the fixed texts where there is no dataset")
    else:
        note = "the training rows calibrate, or the fixed texts where there is no dataset: quantize.calibration_rows"
        reader.row("nearest", field, note)


def named(reader, field: str, value: object) -> tuple[str, dict | None]:
    """Where a data configuration is written, and the configuration; None if it is reported already."""
    if isinstance(value, dict):
        return field, value
    if not isinstance(value, str) or value not in reader.data:
        names = ", ".join(map(str, reader.data)) or "there are none"
        reader.unknown(field, f"{value!r} is none of data_configs: {names}")
        return field, None
    where, config = reader.data[value]
    return f"data_configs.{where}", config


class Loading:
    """What a configuration says of where its rows are, collected from all its blocks."""

    def __init__(self, function: str | None):
        self.given: dict[str, tuple[str, object]] = {}  # name to field and value
        self.function = function  # a loading function of the user's

    def rule(self, name: str):
        """A rule that collects a field."""

        def collect(reader, field, value):
            self.given[name] = (field, value)

        return collect

    def get(self, name: str) -> object:
        return self.given[name][1] if name in self.given else None


def data(reader, base: str, config: dict, split: str) -> None:
    """One data configuration."""
    loading = Loading(own_function(config))
    again = split == "eval" and "text_template" in reader.params["prepare"]

    def load(reader, field, value):
        walk_component(reader, field, value, load_rules(loading), loading)

    def process(reader, field, value):
        if again:
            reader.row("dropped", field, "both datasets have the training rows' template")
        else:
            walk_component(reader, field, value, text_rules(value), None)

    components = {
        "load_dataset": load,
        "pre_process_data": process,
        "post_process_data": Drop("a loss on the answer's tokens"),
        "dataloader": Drop("batches are finetune's"),
    }

    def component(reader, field, value):
        reader.walk(field, value or {}, components)

    reader.walk(
        base,
        config,
        {
            "name": Drop("a name to refer to"),
            "type": Drop("rows are read from a file"),
            "load_dataset_config": load,
            "pre_process_data_config": process,
            "params_config": lambda reader, field, value: reader.walk(
                field, value, load_rules(loading) | {"component_kwargs": component}
            ),
            "components": component,
            "post_process_data_config": Drop("a loss on the answer's tokens"),
            "dataloader_config": Drop("batches are finetune's"),
            "user_script": Drop("no code of a dataset is run; a function of it that is used is named"),
            "script_dir": Drop("no code of a dataset is run; a function of it that is used is named"),
        },
    )
    place_rows(reader, base, loading, split)


def own_function(config: object) -> str | None:
    """The name of a loading function that is not Olive's own, where a configuration names one."""
    blocks = [config.get("load_dataset_config")] if isinstance(config, dict) else []
    components = config.get("components") if isinstance(config, dict) else None
    blocks += [components.get("load_dataset")] if isinstance(components, dict) else []
    kinds = [block.get("type") for block in blocks if isinstance(block, dict)]
    return next((kind for kind in kinds if isinstance(kind, str) and kind not in OLIVES), None)


def walk_component(reader, field: str, value: object, rules: dict, loading: Loading | None) -> None:
    """The fields of a component: in `params` or `kwargs`, or beside its type."""
    if not isinstance(value, dict):
        reader.walk(field, value, rules)
        return
    function = loading.function if loading else None
    if function and value.get("type") == function:
        target = file_for(function, "rows")
        reader.row(
            "todo", f"{field}.type", f"no code of a dataset is run: write the rows that {function} returns to {target}"
        )
    elif "type" in value:
        reader.row("dropped", f"{field}.type", "a component of Olive's")
    flat = {key: item for key, item in value.items() if key not in ("type", "params", "kwargs")}
    blocks = [(field, flat), *((f"{field}.{name}", value[name]) for name in ("params", "kwargs") if name in value)]
    for where, block in blocks:
        if function and isinstance(block, dict):
            for key in [key for key in block if key not in rules]:
                reader.row("dropped", f"{where}.{key}", f"an argument of {function}")
            block = {key: item for key, item in block.items() if key in rules}
        if block or where != field:
            reader.walk(where, block or {}, rules)


def load_rules(loading: Loading) -> dict:
    """Rules for the fields that say where rows are."""
    return fields.LOAD | {name: loading.rule(name) for name in LOADING}


def place_rows(reader, base: str, loading: Loading, split: str) -> None:
    """Set prepare.source (or the settings' data) from what was collected."""
    name = loading.get("data_name")
    hub = isinstance(name, str) and name not in FORMS and "data_files" not in loading.given
    if loading.function:
        set_source(reader, split, file_for(loading.function, "rows"))
    elif hub:
        hub_rows(reader, loading, split)
        return
    elif "data_files" in loading.given:
        files(reader, *loading.given["data_files"], split)
    else:
        reader.unknown(f"{base}.load_dataset_config", "no data_files and no data_name: where are the rows?")
    drops = {
        "data_name": "the file's ending says of which form it is",
        "subset": "the file has the rows of the subset",
        "data_type": "the file's ending says of which form it is",
    }
    for key, (field, value) in loading.given.items():
        if key == "split":
            cut(reader, field, value, split)
        elif key in drops:
            reader.row("dropped", field, drops[key])
        elif key != "data_files" and value in OFF:
            reader.row("dropped", field, "absent")
        elif key != "data_files":
            reader.unknown(field, CHOSEN.format(scrub(str(value))[:60]))


def file_for(name: str, split: str) -> str:
    """A file for rows that the user is to write."""
    return f"data/{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-')}-{split}.jsonl"


def set_source(reader, split: str, file: str) -> None:
    prepare = reader.params["prepare"]
    prepare["source"] = file if split == "train" else {"train": prepare.get("source"), "eval": file}


def hub_rows(reader, loading: Loading, split: str) -> None:
    """A dataset of the hub, as prepare.source with config, split and where."""
    field, name = loading.given["data_name"]
    if reader.blank(field, name):
        return
    if not HUB_NAME.fullmatch(name):
        reader.unknown(field, f"{name!r} is no dataset of the hub: ORG/NAME, or a file in data_files")
        return
    prepare, source, part = reader.params["prepare"], f"hf:{name}@main", loading.get("split") or "train"
    chosen = {"config": loading.get("subset") or None, "where": loading.get("col_filters") or {}}
    if split == "train":
        prepare |= {"source": source, **chosen} | ({"split": part} if part != "train" else {})
    elif {key: prepare.get(key) for key in chosen} != chosen:
        reader.unknown(field, "another subset, or other col_filters, than the training rows have")
        return
    else:
        same = prepare["source"] == source
        prepare["source"] = source if same else {"train": prepare["source"], "eval": source}
        prepare["split"] = {"train": prepare.get("split", "train"), "eval": part}
    reader.row("renamed", field, f"prepare.source: {source!r}")
    reader.row("todo", field, models.BRANCH)
    names = {"subset": "prepare.config", "split": "prepare.split", "col_filters": "prepare.where"}
    for key, (where, value) in loading.given.items():
        if key in names:
            reader.row("renamed", where, f"{names[key]}: {value!r}")
        elif key == "data_dir" and value not in OFF:
            reader.unknown(where, f"{value!r}: a folder of a dataset is its config, or the file is named")
        elif key != "data_name":
            reader.row("dropped", where, "the files say of which form they are")


def cut(reader, field: str, value: object, split: str) -> None:
    """A slice of a file's rows: fractions of prepare cut the file once more."""
    if value in OFF or (isinstance(value, str) and re.fullmatch(r"[\w.-]+(\[:\])?", value)):
        reader.row("dropped", field, "all rows of the file; prepare.eval_fraction and test_fraction cut it")
        return
    share = re.fullmatch(r"train\[:(\d+)%\]", str(value))
    if share and split == "train" and 50 <= int(share[1]) < 100:
        reader.put(field, "prepare.eval_fraction", round(1 - int(share[1]) / 100, 4))
        return
    source = reader.params["prepare"].get("source")
    if split == "eval" and isinstance(source, dict) and source["train"] == source["eval"]:
        reader.params["prepare"]["source"] = source["train"]
        reader.row("nearest", field, "cut from the training rows by prepare.eval_fraction")
    else:
        reader.unknown(field, CHOSEN.format(scrub(str(value))[:60]))


def files(reader, field: str, value: object, split: str) -> None:
    """Where the rows are."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and "type" not in value and set(value) <= {"train"}:
        field, value = f"{field}.train", value.get("train")
    text = models.resource(reader, field, value)
    if text is None:
        return
    if text.startswith("azureml://"):
        reader.settings["data"] = text if split == "train" else {"train": reader.settings.get("data"), "eval": text}
        reader.row("renamed", field, f"azureml/settings.yaml: data: {text}")
        models.pin(reader, field, text)
        text = f"{text}#etag=UNKNOWN"
    else:
        reader.row("renamed", field, f"prepare.source: {text}")
        models.elsewhere(reader, field, text)
    set_source(reader, split, text)


def text_rules(given: object) -> dict:
    """Rules for how a row becomes a text."""
    inner = given if isinstance(given, dict) else {}
    blocks = [inner, inner.get("params"), inner.get("kwargs")]
    template = next(
        (block["text_template"] for block in blocks if isinstance(block, dict) and block.get("text_template")), None
    )

    def columns(reader, field, value):
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []
        if template:
            reader.row("dropped", field, "prepare.text_template names its fields")
        elif len(names) < 2:
            reader.row("todo", field, f"{value!r}: put fields of prompt and answer into prepare.text_template")
        else:
            text = "".join(f"{{{name}}}\n" for name in names[:-1]) + f"{{{names[-1]}}}"
            reader.put(field, "prepare.text_template", text)

    def strategy(reader, field, value):
        if value in ("line-by-line", "join"):
            reader.put(field, "prepare.strategy", value)
        elif value in ("line-by-line-random", "join-random", "join-sliding-window"):
            near = "line-by-line" if value.startswith("line") else "join"
            reader.params["prepare"]["strategy"] = near
            reader.row("nearest", field, f"{value!r}: prepare.strategy: {near!r}, in an order by finetune.data_seed")
        else:
            reader.unknown(field, f"{value!r} cannot be had here: line-by-line or join")

    def text(reader, field, value):
        if value:
            reader.put(field, "prepare.text_template", value)
        else:
            reader.row("dropped", field, "absent")

    return fields.PREPARE | {
        "text_cols": columns,
        "corpus_strategy": strategy,
        "strategy": strategy,
        "text_template": text,
    }


def complete(reader) -> None:
    """What prepare needs and the configuration does not say is to be filled in."""
    prepare = reader.params["prepare"]
    if not prepare.get("source"):
        reader.row(
            "todo",
            "data_configs",
            "no rows are named; prepare.source: data/rows.jsonl is to hold rows that scores are taken on",
        )
        prepare["source"] = "data/rows.jsonl"
    if not prepare.get("text_template") and not prepare.get("messages"):
        reader.row(
            "todo",
            "data_configs",
            "no template is named; put the row's fields into prepare.text_template: prompt, then answer",
        )
        prepare["text_template"] = "{prompt}\n{answer}"
    defaults.rows(reader)
