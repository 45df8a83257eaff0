"""Olive's passes over PyTorch weights (gptq, rtn, kquant, SelectiveMixedPrecision), as options of the export.

There a pass quantizes the weights and ModelBuilder writes them out; here the export does both. So their options are collected
first, and become one section quantize when all passes are read.
"""

from slmake.olive import defaults, fields
from slmake.olive.data import calibration_data
from slmake.olive.goals import several

TYPES = {  # what becomes of each kind of pass
    "gptq": "quantize.calibration: 'gptq'",
    "rtn": "quantize.algo_config: 'rtn'",
    "kquant": "quantize.algo_config: 'k_quant'",
    "mixed": "quantize: which products keep 8 bits",
}
BLOCKS = (16, 32, 64, 128, 256)
ATTENTION, DOWN = "*/attn/*", "*/down_proj/*"
# What SelectiveMixedPrecision keeps in 8 bits: the output head, and these nodes of all layers.
MIXED = {
    "k_quant_last": [],
    "k_quant_down": [DOWN],
    "k_quant_mixed": [ATTENTION, DOWN],
    "high_precision_mlp_down_qkv": [ATTENTION, DOWN],
    "kld_gradient": [ATTENTION, DOWN],
}


def collected(kind: str):
    """A rule for the options of a pass: they are kept with their fields, for `finish`."""

    def rules(reader) -> dict:
        options = reader.weights.setdefault(kind, {})

        def keep(name):
            def rule(reader, field, value):
                options[name] = (field, value)

            return rule

        names = ("bits", "sym", "group_size", "lm_head", "embeds", "overrides", "algorithm", "high_bits", "ratio")
        data = dict.fromkeys(("data_config", "calibration_data_config"), calibration_data)
        return fields.WEIGHTS | {name: keep(name) for name in names} | data

    return rules


def finish(reader) -> None:
    """The section quantize from the options that were collected."""
    if not reader.weights:
        return
    if "quantize" not in reader.stages:
        reader.unknown(
            "passes", f"{', '.join(reader.weights)} without ModelBuilder: the export quantizes; add ModelBuilder"
        )
        return
    section = reader.params["quantize"]
    given = {kind: set(options) for kind, options in reader.weights.items()}
    for kind, options in reader.weights.items():
        if kind != "mixed":
            bits(reader, kind, options, section)
            block(reader, options, section)
    method(reader, section)
    defaults.weights(reader, given)
    if "mixed" in reader.weights:
        mixed(reader, reader.weights["mixed"], section)


def bits(reader, kind: str, options: dict, section: dict) -> None:
    """How many bits weights have: 4, or with rtn alone 8; beside gptq rtn is for the output head and the embedding."""
    field, value = options.pop("bits", (None, 4))
    rest = kind == "rtn" and "gptq" in reader.weights
    if field is None:
        return
    if value == 8 and kind in ("rtn", "kquant") and not rest:
        reader.put(field, "quantize.precision", "int8")
    elif value == 8 and rest:
        section["matmul_mixed_precision"] = "last_matmul:int8"
        reader.row("renamed", field, "quantize.matmul_mixed_precision: 'last_matmul:int8'")
    elif value == 4:
        reader.row("dropped", field, "4 bits: quantize.precision is int4")
    else:
        reader.unknown(field, f"{value!r}: weights have 4 bits, or with rtn 8")


def block(reader, options: dict, section: dict) -> None:
    """Weights that share a scale."""
    if "group_size" not in options:
        return
    field, value = options.pop("group_size")
    if isinstance(value, list) and all(size in BLOCKS for size in value):
        several(reader, field, "block_size", value)
    elif value not in BLOCKS or isinstance(value, bool):
        reader.unknown(field, f"{value!r} is none of {', '.join(map(str, BLOCKS))}")
    elif section.get("block_size", value) != value:
        reader.row("nearest", field, f"one block size for all weights: quantize.block_size: {section['block_size']}")
    else:
        reader.put(field, "quantize.block_size", value)


def method(reader, section: dict) -> None:
    """Algorithm, calibration and symmetry."""
    if "gptq" in reader.weights:
        section |= {"calibration": "gptq", "algo_config": "rtn", "is_symmetric": True}
        section.setdefault("matmul_mixed_precision", None)
        section.setdefault("int8_nodes", [])
    elif "rtn" in reader.weights or "kquant" in reader.weights:
        section["algo_config"] = "rtn" if "rtn" in reader.weights else "k_quant"
        section.setdefault("matmul_mixed_precision", None)
    for options in reader.weights.values():
        if "sym" in options:
            field, value = options.pop("sym")
            if "gptq" not in reader.weights:
                reader.put(field, "quantize.is_symmetric", value)
            elif value:
                reader.row("dropped", field, "gptq rounds symmetrically")
            else:
                reader.row("nearest", field, "gptq rounds symmetrically here: quantize.is_symmetric: True")
        for name, note in (
            ("lm_head", "the output head is quantized as the other products are"),
            (
                "overrides",
                "other bits for the output head: quantize.matmul_mixed_precision; for nodes: quantize.int8_nodes",
            ),
        ):
            if name in options:
                field, value = options.pop(name)
                reader.row("dropped" if name == "lm_head" else "nearest", field, note)
        if "embeds" in options:
            field, value = options.pop("embeds")
            if value and section.get("precision") == "int8":
                reader.row("nearest", field, "the builder's int8 quantizes products only; the embedding keeps its type")
            elif value:
                reader.put(field, "quantize.op_types_to_quantize", ["MatMul", "Gather"])
            else:
                reader.row("dropped", field, "only products are quantized")


def mixed(reader, options: dict, section: dict) -> None:
    """Which products keep 8 bits."""
    field, algorithm = options.pop("algorithm", ("passes", None))
    for name in list(options):
        where, value = options.pop(name)
        if name in ("bits", "high_bits") and value not in (4, 8):
            reader.unknown(where, f"{value!r}: products have 4 or 8 bits")
        else:
            reader.row("dropped", where, "quantize.int8_nodes says which products keep 8 bits, the others have 4")
    if not isinstance(algorithm, str) or algorithm not in MIXED:
        reader.unknown(field, f"{algorithm!r} is none of {', '.join(MIXED)}")
    elif "gptq" not in reader.weights and algorithm in ("k_quant_last", "k_quant_mixed"):
        reader.put(field, "quantize.matmul_mixed_precision", fields.ALGORITHMS[algorithm][1])
    else:
        section |= {"matmul_mixed_precision": "last_matmul:int8", "int8_nodes": MIXED[algorithm]}
        same = algorithm == "k_quant_last"
        note = "the output head keeps 8 bits" + (
            f", and {', '.join(MIXED[algorithm])} of all layers" if not same else ""
        )
        reader.row("renamed" if same else "nearest", field, f"{algorithm!r}: {note}: quantize.int8_nodes")


def surgeries(reader, field: str, value: object) -> None:
    """GraphSurgeries: the one that ties the embedding, which the builder does by itself."""
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        name = item.get("surgeon") if isinstance(item, dict) else item
        if name == "TieWordEmbeddings":
            reader.row(
                "dropped", f"{field}.{i}.surgeon", "the builder shares a tied embedding: quantize.shared_embeddings"
            )
        else:
            reader.unknown(f"{field}.{i}.surgeon", f"{name!r}: the builder's graph is shipped as it is")
        for key in item if isinstance(item, dict) else ():
            if key != "surgeon":
                reader.unknown(f"{field}.{i}.{key}")


GRAPH = {"surgeries": surgeries, "save_as_external_data": fields.WRITTEN, "all_tensors_to_one_file": fields.WRITTEN}
