"""Olive's passes and the data they read, as the sections finetune, merge, quantize and prepare."""

from slmake.olive import fields, models
from slmake.olive.fields import OFF, Drop

DTYPES = ("float32", "bfloat16")


def flat(value: dict) -> dict:
    """A pass's options: below `config` in old forms, beside `type` in the present one."""
    return {
        **{key: inner for key, inner in value.items() if key not in ("type", "config")},
        **(value.get("config") or {}),
    }


def passes(reader, field: str, value: dict) -> None:
    """Rules for `passes`, by their types."""
    for name, entry in value.items():
        for i, options in enumerate(entry if isinstance(entry, list) else [entry]):
            base = f"{field}.{name}" + (f".{i}" if isinstance(entry, list) and len(entry) > 1 else "")
            kind = str(options.get("type", "")).lower()
            if kind not in PASSES:
                reader.unknown(
                    f"{base}.type",
                    f"{options.get('type')!r}: passes are LoRA, QLoRA, MergeAdapterWeights and ModelBuilder",
                )
                continue
            stage, rules, method = PASSES[kind]
            if stage in reader.stages:
                reader.unknown(base, f"a second {stage}")
                continue
            reader.stages.add(stage)
            if method:
                reader.put(f"{base}.type", "finetune.method", method)
            else:
                reader.row("renamed", f"{base}.type", f"all.stages: {stage}")
            where = f"{base}.config" if "config" in options else base
            reader.walk(where, flat(options), COMMON | rules)
            if stage == "quantize" and "algo_config" not in reader.params["quantize"]:
                reader.row(
                    "dropped",
                    where,
                    "no algorithm named: quantize.algo_config has its default, k_quant with 8 bits where it matters",
                )


def algorithm(reader, field: str, value: str) -> None:
    """The builder's algorithm, whose name may say what keeps 8 bits."""
    if value is None:
        reader.row("dropped", field, "quantize.algo_config has its default")
    elif value not in fields.ALGORITHMS:
        reader.unknown(field, f"{value!r} is none of {', '.join(fields.ALGORITHMS)}")
    else:
        reader.params["quantize"]["matmul_mixed_precision"] = fields.ALGORITHMS[value][1]
        reader.put(field, "quantize.algo_config", fields.ALGORITHMS[value][0])


def extra_options(reader, field: str, value: dict) -> None:
    """More of the builder's options."""
    reader.walk(field, value or {}, BUILDER)


def compute_dtype(reader, field: str, value: str | None) -> None:
    """In which type products are computed; `compute_dtype` goes before `torch_dtype`."""
    if value is None or (field.endswith("torch_dtype") and reader.params["finetune"].get("compute_dtype")):
        reader.row("dropped", field, "finetune.compute_dtype says in which type")
    elif value in DTYPES:
        reader.put(field, "finetune.compute_dtype", value)
    else:
        reader.unknown(field, f"{value!r} is none of {', '.join(DTYPES)}")


def max_steps(reader, field: str, value: int) -> None:
    """-1 means by epochs."""
    reader.put(field, "finetune.max_steps", None if value in (-1, 0, None) else value)


def targets(reader, field: str, value: object) -> None:
    """Which modules get an adapter."""
    if value is None:
        reader.row("dropped", field, "all linear layers get an adapter")
    else:
        reader.put(field, "finetune.target_modules", value)


def training(reader, field: str, value: dict | None) -> None:
    """Arguments of the Hugging Face trainer; `extra_args` holds more of them."""
    rules = fields.TRAINING | {"max_steps": max_steps, "extra_args": training}
    reader.walk(field, value or {}, rules)


def eval_size(reader, field: str, value: float | None) -> None:
    """Share of the rows for the eval split."""
    if value is None:
        reader.row("dropped", field, "prepare.eval_fraction has its default")
    elif isinstance(value, float) and 0 <= value <= 0.5:
        reader.put(field, "prepare.eval_fraction", value)
    else:
        reader.unknown(field, f"{value!r}: prepare.eval_fraction is a share from 0 to 0.5")


def train_data(reader, field: str, value: object) -> None:
    """The data of a pass: a name of data_configs, or the configuration itself."""
    where, config = _named(reader, field, value)
    if config is not None:
        reader.row("renamed", field, "prepare")
        data(reader, where, config, "train")


def eval_data(reader, field: str, value: object) -> None:
    """A data set of its own for the loss during training."""
    if value is None:
        reader.row("dropped", field, "cut from the training rows: prepare.eval_fraction")
        return
    where, config = _named(reader, field, value)
    if config is not None:
        reader.row("renamed", field, "prepare.source.eval")
        data(reader, where, config, "eval")


def _named(reader, field: str, value: object) -> tuple[str, dict | None]:
    if isinstance(value, dict):
        return field, value
    if value not in reader.data:
        reader.unknown(
            field, f"{value!r} is none of data_configs: {', '.join(map(str, reader.data)) or 'there are none'}"
        )
        return field, None
    where, config = reader.data[value]
    return f"data_configs.{where}", config


def read_data(reader) -> set[str]:
    """Names of the data configurations that a known pass reads."""
    named = set()
    for entry in (reader.config.get("passes") or {}).values():
        for item in entry if isinstance(entry, list) else [entry]:
            options = flat(item)
            named |= {
                options.get(key)
                for key in ("train_data_config", "eval_data_config")
                if isinstance(options.get(key), str)
            }
    return named


def data(reader, base: str, config: dict, split: str) -> None:
    """One data configuration."""
    again = split == "eval" and "text_template" in reader.params["prepare"]

    def inside(reader, field, value):
        """The fields of a component, whether in its `params` or beside its type; what stands beside `params` is told."""
        if "params" not in value:
            return field, {key: item for key, item in value.items() if key != "type"}
        beside = {key: item for key, item in value.items() if key != "params"}
        reader.walk(field, beside, {"type": Drop("a component of Olive's")})
        return f"{field}.params", value["params"]

    def load(reader, field, value):
        reader.walk(*inside(reader, field, value), loading)

    def process(reader, field, value):
        where, inner = inside(reader, field, value)
        if again:
            reader.row("dropped", field, "both data sets have the training rows' template")
            return
        texts(reader, where, inner)

    def component(reader, field, value):
        reader.walk(
            field,
            value or {},
            {
                "load_dataset": load,
                "pre_process_data": process,
                "post_process_data": Drop("a loss on the answer's tokens"),
                "dataloader": Drop("batches are finetune's"),
            },
        )

    loading = fields.LOAD | {
        "data_name": Drop("the file's ending says of which form it is", ("json", "csv", "parquet", None)),
        "data_files": lambda reader, field, value: files(reader, field, value, split),
        "data_dir": Drop("name the file", OFF),
        "subset": Drop("one file", OFF),
        "split": Drop(
            "all rows of the file; prepare.eval_fraction and test_fraction cut it", ("train", "train[:]", *OFF)
        ),
        "streaming": Drop("rows are streamed"),
        "component_kwargs": component,
    }
    reader.walk(
        base,
        config,
        {
            "name": Drop("a name to refer to"),
            "type": Drop("rows are read from a file"),
            "load_dataset_config": load,
            "pre_process_data_config": process,
            "params_config": lambda reader, field, value: reader.walk(field, value, loading),
            "components": component,
            "post_process_data_config": Drop("a loss on the answer's tokens"),
            "dataloader_config": Drop("batches are finetune's"),
            "user_script": Drop("no code of a data set is run", OFF),
            "script_dir": Drop("no code of a data set is run", OFF),
        },
    )


def files(reader, field: str, value: object, split: str) -> None:
    """Where the rows are."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and "type" not in value and set(value) <= {"train"}:
        field, value = f"{field}.train", value.get("train")
    text = models.resource(reader, field, value)
    if text is None:
        return
    prepare = reader.params["prepare"]
    if text.startswith("azureml://"):
        reader.settings["data"] = text if split == "train" else {"train": reader.settings.get("data"), "eval": text}
        reader.row("renamed", field, f"azureml/settings.yaml: data: {text}")
        models.pin(reader, field, text)
        text = f"{text}#etag=UNKNOWN"
    else:
        reader.row("renamed", field, f"prepare.source: {text}")
    prepare["source"] = text if split == "train" else {"train": prepare.get("source"), "eval": text}


def texts(reader, field: str, value: dict) -> None:
    """How a row becomes a text."""

    def columns(reader, field, inner):
        names = [inner] if isinstance(inner, str) else list(inner or [])
        if value.get("text_template"):
            reader.row("dropped", field, "prepare.text_template names its fields")
        elif len(names) < 2:
            reader.unknown(field, f"{inner!r}: what is prompt and what is answer? Give a text_template of two fields")
        else:
            reader.put(
                field, "prepare.text_template", "".join(f"{{{name}}}\n" for name in names[:-1]) + f"{{{names[-1]}}}"
            )

    def strategy(reader, field, inner):
        if inner in ("line-by-line", "join"):
            reader.put(field, "prepare.strategy", inner)
        else:
            reader.unknown(field, f"{inner!r} cannot be had here: line-by-line or join")

    def template(reader, field, inner):
        if inner:
            reader.put(field, "prepare.text_template", inner)
        else:
            reader.row("dropped", field, "absent")

    reader.walk(
        field,
        value,
        fields.PREPARE
        | {"text_cols": columns, "corpus_strategy": strategy, "strategy": strategy, "text_template": template},
    )


COMMON = {
    "disable_search": Drop("one value each", (*OFF, True)),
    "clean_run_cache": fields.CACHE,
    "output_name": Drop("results are in build/ and results/"),
    "host": Drop("compute in azureml/settings.yaml says where a rule runs"),
    "evaluator": Drop("`evaluate` measures by itself"),
    "user_script": Drop("no code beside the pipeline's is run", OFF),
    "script_dir": Drop("no code beside the pipeline's is run", OFF),
}
BUILDER = fields.BUILDER | {"algo_config": algorithm, "int4_algo_config": algorithm, "extra_options": extra_options}
LORA = fields.LORA | {
    "target_modules": targets,
    "compute_dtype": compute_dtype,
    "torch_dtype": compute_dtype,
    "train_data_config": train_data,
    "eval_data_config": eval_data,
    "eval_dataset_size": eval_size,
    "training_args": training,
}
PASSES = {
    "lora": ("finetune", LORA, "lora"),
    "qlora": ("finetune", LORA, "qlora"),
    "mergeadapterweights": ("merge", fields.MERGE, None),
    "modelbuilder": ("quantize", BUILDER, None),
}
