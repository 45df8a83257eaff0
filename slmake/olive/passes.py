"""Olive's passes, as the sections finetune, merge and quantize; what has no counterpart is named with the nearest thing."""

from slmake.olive import data, defaults, fields, goals, quantizers
from slmake.olive.fields import OFF, Drop

DTYPES = ("float32", "bfloat16")
BUILDS = "ModelBuilder writes the graph, optimized and quantized"
NEAREST = {  # passes that cannot be had: what is nearest
    **dict.fromkeys(("dora", "loha", "lokr", "loftq"), "LoRA, or QLoRA"),
    **dict.fromkeys(("autoawqquantizer", "awq", "quarot", "spinquant", "autogptqquantizer", "hqq"), "gptq"),
    **dict.fromkeys(("onnxmatmul4quantizer", "onnxkquantquantization", "onnxhqqquantization"), BUILDS),
    **dict.fromkeys(("onnxblockwisertnquantization", "onnxquantization", "onnxdynamicquantization"), BUILDS),
    **dict.fromkeys(("onnxconversion", "optimumconversion", "orttransformersoptimization"), BUILDS),
    **dict.fromkeys(("onnxiofloat16tofloat32", "onnxfloattofloat16", "mobiusbuilder"), BUILDS),
    "matmulnbitstoqdq": "weights stay in MatMulNBits, which runs on cpu, cuda, dml and webgpu",
    "extractadapters": "MergeAdapterWeights before ModelBuilder: the adapter becomes part of the weights",
    "ortsessionparamstuning": "`evaluate` measures latency; session options are in genai_config.json",
    "ortperftuning": "`evaluate` measures latency; session options are in genai_config.json",
    **dict.fromkeys(("sparsegpt", "slicegpt", "torchtrtconversion"), "quantize.precision int4: weights are not pruned"),
}


def passes(reader, field: str, value: dict) -> None:
    """Rules for `passes`, by their types, in the order in which they run."""
    if not isinstance(value, dict) or not value:
        why = f"expected a mapping, found {type(value).__name__}" if value != {} else "empty: nothing to do"
        reader.unknown(field, why)
        return
    for name in chosen(reader, field, value):
        entry = value[name]
        for i, options in enumerate(entry if isinstance(entry, list) else [entry]):
            base = f"{field}.{name}" + (f".{i}" if isinstance(entry, list) and len(entry) > 1 else "")
            if isinstance(options, dict):
                read_pass(reader, base, options)
            else:
                reader.unknown(base, f"expected a mapping, found {type(options).__name__}")
    adapted = "finetune" in reader.stages or reader.params["adapter"].get("source")
    if adapted and "quantize" in reader.stages and "merge" not in reader.stages:
        reader.stages.add("merge")
        reader.row(
            "nearest",
            field,
            "no MergeAdapterWeights: merge is added, because the export has the adapter in its weights",
        )
    quantizers.finish(reader)
    if "finetune" in reader.stages:
        data.complete(reader)


def chosen(reader, field: str, value: dict) -> list[str]:
    """Names of the passes that run: all of them, or those of the first of pass_flows, in its order."""
    flows = reader.config.get("pass_flows")
    if not flows or not isinstance(flows, list) or not isinstance(flows[0], list):
        return list(value)
    names = [name for name in flows[0] if isinstance(name, str) and name in value]
    if len(names) < len(flows[0]) or not names:
        return list(value)  # `flows_of` reports it
    for name in value:
        if name not in names:
            reader.row("dropped", f"{field}.{name}", "not in the first of pass_flows, so it does not run")
    return names


def flows_of(reader, field: str, value: object) -> None:
    """pass_flows: one flow is an order; of several the first is taken."""
    if value in OFF:
        reader.row("dropped", field, "passes run in the order in which they are written")
        return
    known = reader.config.get("passes") if isinstance(reader.config.get("passes"), dict) else {}
    for i, flow in enumerate(value if isinstance(value, list) else [value]):
        names = flow if isinstance(flow, list) else [flow]
        strange = [name for name in names if not isinstance(name, str) or name not in known]
        if strange and not reader.blank(f"{field}.{i}", strange[0]):
            reader.unknown(f"{field}.{i}", f"{strange[0]!r} is none of passes")
        elif not strange and i == 0:
            reader.row("renamed", f"{field}.{i}", f"the order of passes: {', '.join(names)}")
        elif not strange:
            reader.row("todo", f"{field}.{i}", f"another run: import again with this flow alone: {', '.join(names)}")


def read_pass(reader, base: str, options: dict) -> None:
    """One pass."""
    kind = str(options.get("type", "")).lower()
    where = f"{base}.config" if isinstance(options.get("config"), dict) else base
    if kind in WEIGHTS:
        reader.row("renamed", f"{base}.type", quantizers.TYPES[WEIGHTS[kind]])
        reader.walk(where, flat(options), COMMON | quantizers.collected(WEIGHTS[kind])(reader))
        return
    if kind == "graphsurgeries":
        reader.row("dropped", f"{base}.type", "each surgery is named below")
        reader.walk(where, flat(options), COMMON | quantizers.GRAPH)
        return
    if kind not in PASSES:
        near = NEAREST.get(kind)
        hint = f"cannot be had here; nearest: {near}" if near else f"no such pass here; passes are {', '.join(NAMES)}"
        reader.unknown(f"{base}.type", f"{options.get('type')!r} {hint}")
        return
    stage, rules, method = PASSES[kind]
    if stage in reader.stages:
        reader.unknown(base, f"a second {stage}")
        return
    reader.stages.add(stage)
    if method:
        reader.put(f"{base}.type", "finetune.method", method)
    else:
        reader.row("renamed", f"{base}.type", f"all.stages: {stage}")
    reader.walk(where, flat(options), COMMON | rules)
    if method:
        defaults.training(reader, where)
    section = reader.params["quantize"]
    if (
        stage == "quantize"
        and "algo_config" not in section
        and not reader.weights
        and section.get("precision", "int4") == "int4"
    ):
        note = "no algorithm named: quantize.algo_config has its default, k_quant with 8 bits where it matters"
        reader.row("dropped", where, note)


def flat(value: dict) -> dict:
    """A pass's options: below `config` in old forms, beside `type` in the present one."""
    beside = {key: inner for key, inner in value.items() if key not in ("type", "config")}
    config = value.get("config")
    return {**beside, **(config if isinstance(config, dict) else {} if config is None else {"config": config})}


def read_data(reader) -> set[str]:
    """Names of the data configurations that a known pass reads."""
    names = set()
    given = reader.config.get("passes")
    for entry in given.values() if isinstance(given, dict) else ():
        for item in entry if isinstance(entry, list) else [entry]:
            options = flat(item) if isinstance(item, dict) else {}
            values = [options.get(key) for key in ("train_data_config", "eval_data_config")]
            names |= {value for value in values if isinstance(value, str)}
    return names


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def compute_dtype(reader, field: str, value: str | None) -> None:
    """In which type products are computed; `compute_dtype` goes before `torch_dtype`."""
    if value is None or (field.endswith("torch_dtype") and reader.params["finetune"].get("compute_dtype")):
        reader.row("dropped", field, "finetune.compute_dtype says in which type")
    elif value in DTYPES:
        reader.put(field, "finetune.compute_dtype", value)
    elif value == "float16":
        reader.params["finetune"]["compute_dtype"] = "bfloat16"
        reader.row("nearest", field, "float16 needs loss scaling; finetune.compute_dtype: 'bfloat16'")
    else:
        reader.unknown(field, f"{value!r} is none of {', '.join(DTYPES)}")


def max_steps(reader, field: str, value: int) -> None:
    """-1 means by epochs."""
    reader.put(field, "finetune.max_steps", None if value in (-1, 0, None) else value)


def targets(reader, field: str, value: object) -> None:
    """Which modules get an adapter."""
    if value is None:
        reader.row("dropped", field, "as if it were left out")
    else:
        reader.put(field, "finetune.target_modules", value)


def best_model(reader, field: str, value: object) -> None:
    """Keep the adapter with the lowest eval loss, without an early stop."""
    if value in OFF:
        reader.row("dropped", field, "the last adapter is kept")
    else:
        reader.put(field, "finetune.keep_best", value)


def training(reader, field: str, value: dict | None) -> None:
    """Arguments of the Hugging Face trainer; `extra_args` holds more of them."""
    rules = {"max_steps": max_steps, "extra_args": training, "load_best_model_at_end": best_model}
    reader.walk(field, value or {}, fields.TRAINING | rules)


def eval_size(reader, field: str, value: float | None) -> None:
    """Share of the rows for the eval split, or their number."""
    if value is None:
        reader.row("dropped", field, "prepare.eval_fraction has its default")
    elif isinstance(value, float) and 0 <= value <= 0.5:
        reader.put(field, "prepare.eval_fraction", value)
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        reader.put(field, "prepare.eval_samples", value)
    else:
        reader.unknown(field, f"{value!r}: prepare.eval_fraction is a share from 0 to 0.5, eval_samples a number")


# -- export ------------------------------------------------------------------------------------------------------------


def algorithm(reader, field: str, value: str) -> None:
    """The builder's algorithm, whose name may say what keeps 8 bits."""
    if value is None:
        reader.row("dropped", field, "quantize.algo_config has its default")
    elif isinstance(value, list):
        goals.algorithms(reader, field, value)
    elif not isinstance(value, str) or value not in fields.ALGORITHMS:
        reader.unknown(field, f"{value!r} is none of {', '.join(fields.ALGORITHMS)}")
    else:
        reader.params["quantize"]["matmul_mixed_precision"] = fields.ALGORITHMS[value][1]
        reader.put(field, "quantize.algo_config", fields.ALGORITHMS[value][0])


def precision(reader, field: str, value: object) -> None:
    """The precision; a template may leave it open."""
    if isinstance(value, list):
        goals.several(reader, field, "precision", value)
    elif not isinstance(value, str) or not reader.blank(field, value):
        reader.put(field, "quantize.precision", value)


def extra_options(reader, field: str, value: dict) -> None:
    """More of the builder's options, whose values may be texts, as on its command line."""
    reader.walk(field, value or {}, BUILDER)


def converted(target: str, convert):
    """A rule for an option whose value may be a text."""

    def rule(reader, field, value):
        if isinstance(value, list):
            goals.several(reader, field, target.partition(".")[2], [convert(item) for item in value])
        else:
            reader.put(field, target, convert(value))

    return rule


def number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def flag(value: object) -> object:
    texts = {"true": True, "1": True, "false": False, "0": False}
    return texts.get(value.lower(), value) if isinstance(value, str) else bool(value) if value in (0, 1) else value


def excluded(reader, field: str, value: object) -> None:
    """Nodes to leave unquantized, as a list or a text with commas."""
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    reader.put(field, "quantize.nodes_to_exclude", names)


def op_types(reader, field: str, value: object) -> None:
    """Operators to quantize; the builder has MatMul and Gather."""
    given = value.split("/") if isinstance(value, str) else value if isinstance(value, list) else []
    kept = [name for name in given if name in ("MatMul", "Gather")]
    reader.params["quantize"]["op_types_to_quantize"] = kept or None
    more = [str(name) for name in given if name not in kept]
    note = f"quantize.op_types_to_quantize: {kept}" + (f"; the graph has no {', '.join(more)}" if more else "")
    reader.row("nearest" if more else "renamed", field, note)


COMMON = {
    "disable_search": Drop("one value each", (*OFF, True)),
    "clean_run_cache": fields.CACHE,
    "output_name": Drop("results are in build/ and results/"),
    "host": Drop("compute in azureml/settings.yaml says where a rule runs"),
    "evaluator": Drop("`evaluate` measures by itself"),
    "user_script": Drop("no code beside the pipeline's is run", OFF),
    "script_dir": Drop("no code beside the pipeline's is run", OFF),
}
BUILDER = fields.BUILDER | {
    **dict.fromkeys(("algo_config", "int4_algo_config"), algorithm),
    **dict.fromkeys(("accuracy_level", "int4_accuracy_level"), converted("quantize.accuracy_level", number)),
    **dict.fromkeys(("block_size", "int4_block_size"), converted("quantize.block_size", number)),
    **dict.fromkeys(("is_symmetric", "int4_is_symmetric"), converted("quantize.is_symmetric", flag)),
    **dict.fromkeys(("nodes_to_exclude", "int4_nodes_to_exclude"), excluded),
    **dict.fromkeys(("op_types_to_quantize", "int4_op_types_to_quantize"), op_types),
    **dict.fromkeys(("shared_embeddings",), converted("quantize.shared_embeddings", flag)),
    "prune_lm_head": converted("quantize.prune_lm_head", flag),
    "precision": precision,
    "extra_options": extra_options,
}
LORA = fields.LORA | {
    "target_modules": targets,
    "compute_dtype": compute_dtype,
    "torch_dtype": compute_dtype,
    "train_data_config": data.train_data,
    "eval_data_config": data.eval_data,
    "eval_dataset_size": eval_size,
    "training_args": training,
}
PASSES = {
    "lora": ("finetune", LORA, "lora"),
    "qlora": ("finetune", LORA, "qlora"),
    "mergeadapterweights": ("merge", fields.MERGE, None),
    "modelbuilder": ("quantize", BUILDER, None),
    "genaimodelexporter": ("quantize", BUILDER, None),  # ModelBuilder's name before 0.7
}
WEIGHTS = {  # passes over PyTorch weights: the kind under which their options are collected
    "gptq": "gptq",
    "gptqquantizer": "gptq",
    "rtn": "rtn",
    "kquant": "kquant",
    "k_quant": "kquant",
    "selectivemixedprecision": "mixed",
}
NAMES = ("LoRA", "QLoRA", "MergeAdapterWeights", "ModelBuilder", "gptq", "rtn", "kquant", "SelectiveMixedPrecision")
