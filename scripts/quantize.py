"""Export a model folder to ONNX with the ONNX Runtime GenAI model builder, and prove that the export works.

    python scripts/quantize.py --params params.yaml --model build/merged --output build/onnx-int4

Reads the section `quantize` and a model folder in Hugging Face layout. Writes what onnxruntime-genai loads: model.onnx,
model.onnx.data, genai_config.json and the tokenizer. The builder ignores options it does not know and can write graphs
that do not load, both with exit code 0; so the written graph is compared with what was asked for, and the model is
loaded and made to generate before the output counts as built.
"""

import contextlib
import fnmatch
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common import cli, outputs, params
from common.errors import UserError
from common.generation import greedy
from fetch_model import weight_files


def builder_options(section: params.Quantize) -> dict[str, str]:
    """The builder's extra options (onnxruntime-genai 0.18 names), as KEY=VALUE text values."""
    options: dict[str, object] = {"hf_token": "false", "prune_lm_head": str(section.prune_lm_head).lower()}
    if section.precision in ("int4", "int8"):
        options |= {
            "block_size": section.block_size,
            "is_symmetric": str(section.is_symmetric).lower(),
            "accuracy_level": section.accuracy_level,
        }
    if section.precision == "int4":
        options["algo_config"] = section.algo_config
        if section.matmul_mixed_precision:
            options["matmul_mixed_precision"] = section.matmul_mixed_precision.replace(" ", "")
    if section.op_types_to_quantize:
        options["op_types_to_quantize"] = "/".join(section.op_types_to_quantize)
    if section.nodes_to_exclude:
        options["nodes_to_exclude"] = ",".join(section.nodes_to_exclude)
    if section.shared_embeddings is not None:
        options["shared_embeddings"] = str(section.shared_embeddings).lower()
    return {key: str(value) for key, value in options.items()}


# Products of a decoder layer by the builder's names, and what stands there instead where it fuses or splits them.
PARTS = ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
OTHERWISE = {
    "attn/qkv_proj": ("attn/q_proj", "attn/k_proj", "attn/v_proj"),
    "mlp/gate_proj": ("mlp/gate_up_proj", "mlp/fc1"),
    "mlp/down_proj": ("mlp/fc2",),
}


def int8_overrides(section: params.Quantize, model: Path, parts: tuple[str, ...]) -> list[dict]:
    """The builder's structured overrides for `int8_nodes` and `matmul_mixed_precision`; it takes exact names only.

    Raises:
        UserError: a pattern that fits no name.
    """
    depth = json.loads((model / "config.json").read_text(encoding="utf-8")).get("num_hidden_layers", 0)
    names = [f"/model/layers.{layer}/{part}/MatMul" for layer in range(depth) for part in parts] + ["/lm_head/MatMul"]
    for pattern in section.int8_nodes:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            shown = f"{names[0]} and {names[-1]}"
            raise UserError(f"quantize.int8_nodes: `{pattern}` matches no node. Names look like {shown}.")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in section.int8_nodes)]
    presets = [part.strip().split(":") for part in (section.matmul_mixed_precision or "").split(",") if part.strip()]
    overrides = [{"match": {"preset": where}, "type": what} for where, what in presets]
    out = [{"match": {"name": name}, "exclude": True} for name in section.nodes_to_exclude]
    return out + overrides + [{"match": {"name": name}, "type": "int8"} for name in chosen]


def shares_embeddings(section: params.Quantize, model: Path) -> bool:
    """Whether embedding and output head become one quantized matrix."""
    tied = json.loads((model / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)
    return bool(tied if section.shared_embeddings is None else section.shared_embeddings)


@contextlib.contextmanager
def no_git() -> Iterator[None]:
    """Hide Git from the model builder, which stamps its own revision into the graph but finds that of the repository around .venv."""
    before = os.environ.get("GIT_DIR")
    os.environ["GIT_DIR"] = os.devnull
    try:
        yield
    finally:
        os.environ.pop("GIT_DIR")
        if before is not None:
            os.environ["GIT_DIR"] = before


def export(section: params.Quantize, model: Path, target: Path, scratch: Path, name: Path | None = None) -> None:
    """Run the model builder in this process; its output goes to the log.

    Args:
        name: what to call the model in a message, if `model` is a copy of it.

    Raises:
        UserError: the builder refused the model or the options; its reason is passed on.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    extra = [f"{key}={value}" for key, value in builder_options(section).items()]
    where = ("", str(model), str(target), section.precision, section.execution_provider, str(scratch))
    parts = PARTS
    if any(name in pattern for pattern in section.int8_nodes for name in ("q_proj", "k_proj", "/v_proj")):
        parts = tuple(name for part in PARTS for name in (OTHERWISE[part] if part == "attn/qkv_proj" else (part,)))
    while True:
        structured = {}
        if section.int8_nodes:
            weights: dict = {"overrides": int8_overrides(section, model, parts)}
            if shares_embeddings(section, model):  # the builder adds this by itself to its flat options only
                weights["op_types"] = ["MatMul", "Gather"]
            structured = {"builder_config_version": 2, "target_options": {"quant_config": {"weights": weights}}}
        try:
            with no_git():
                create_model(*where, **parse_extra_options(*where, extra, **structured))
            return
        except (ValueError, NotImplementedError, KeyError, AssertionError, AttributeError, OSError) as error:
            if getattr(error, "errno", None):  # a trouble of the machine, not of the model
                raise
            # A name that this architecture does not emit: take what stands there instead, and try again.
            missing = {
                part for part in parts if "did not match an emitted node" in str(error) and f"/{part}/" in str(error)
            }
            if missing:
                parts = tuple(
                    name for part in parts for name in (OTHERWISE.get(part, ()) if part in missing else (part,))
                )
                for path in target.iterdir():
                    outputs.remove(path)
                continue
            raise UserError(
                f"the model builder refused {name or model}: {type(error).__name__}: {error}. "
                "Check the section quantize, or the model's architecture."
            ) from error


def level_of(section: params.Quantize, node: str) -> int:
    """The accuracy level that a quantized product shall have, by its name in the graph."""
    name = node.removesuffix("_Q4").removesuffix("_Q8")
    matching = [level for pattern, level in section.node_accuracy_levels.items() if fnmatch.fnmatchcase(name, pattern)]
    return matching[-1] if matching else section.accuracy_level


def set_accuracy_levels(section: params.Quantize, folder: Path) -> None:
    """Write `node_accuracy_levels` into the exported graph; its weights stay where they are.

    Raises:
        UserError: a pattern that fits no quantized product.
    """
    import onnx

    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    names = [node.name.removesuffix("_Q4").removesuffix("_Q8") for node in nodes]
    for pattern in section.node_accuracy_levels:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"quantize.node_accuracy_levels: `{pattern}` matches no node. Names look like {names[0]} and {names[-1]}."
            )
    for node in nodes:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level_of(section, node.name))])
    path.write_bytes(model.SerializeToString(deterministic=True))


def check_graph(section: params.Quantize, folder: Path) -> dict:
    """Compare the written graph with what was asked for.

    Returns:
        What is there: number of quantized nodes by bits, plain matrix products, block sizes.

    Raises:
        UserError: bits, block size, symmetry, accuracy level, mixed precision or excluded nodes differ from the request.
    """
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    attributes = {
        node.name: {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT} for node in nodes
    }
    bits = Counter(values["bits"] for values in attributes.values())
    gathers = sum(node.op_type == "GatherBlockQuantized" for node in graph.node)
    found = {
        "quantized_matmuls_by_bits": {str(key): bits[key] for key in sorted(bits)},
        "block_sizes": sorted({values["block_size"] for values in attributes.values()}),
        "plain_matmuls": sum(node.op_type == "MatMul" for node in graph.node),
        "quantized_gathers": gathers,
    }
    wrong = []
    logits = next(output for output in graph.output if output.name == "logits")
    pruned = logits.type.tensor_type.shape.dim[1].dim_value == 1
    if pruned != section.prune_lm_head:
        positions = "the last position" if pruned else "every position"
        wrong.append(
            f"prune_lm_head: {str(section.prune_lm_head).lower()} was asked for, the graph gives logits of {positions}"
        )
    if section.precision in ("fp16", "fp32"):
        if nodes:
            wrong.append(f"precision {section.precision} was asked for, but {len(nodes)} products are quantized")
        wanted = {"fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}[section.precision]
        kinds = {
            tensor.data_type
            for tensor in graph.initializer
            if len(tensor.dims) == 2 and tensor.data_type in (1, 10, 16)
        }
        if kinds - {wanted}:
            wrong.append(f"precision {section.precision} was asked for, but some weights have another type")
    else:
        wanted_bits = {"int4": 4, "int8": 8}[section.precision]
        mixed = section.matmul_mixed_precision or "" if section.precision == "int4" else ""
        if not bits[wanted_bits]:
            wrong.append(f"precision {section.precision} was asked for, but no product has {wanted_bits} bits")
        head = {name for name in attributes if "lm_head" in name}
        eight = {name for name, values in attributes.items() if values["bits"] == 8}
        if wanted_bits == 4:
            if "last_matmul:int8" in mixed and not head & eight:
                wrong.append("last_matmul:int8 was asked for, but the output head is not in 8 bits")
            if "mixed_layers:int8" in mixed and not eight - head:
                wrong.append("mixed_layers:int8 was asked for, but no layer is in 8 bits")
            for pattern in section.int8_nodes:
                four = [
                    n
                    for n, v in attributes.items()
                    if v["bits"] == 4 and fnmatch.fnmatchcase(n.removesuffix("_Q4"), pattern)
                ]
                if four:
                    wrong.append(f"int8_nodes `{pattern}` was asked for, but {four[0]} is in 4 bits")
            if not mixed and not section.int8_nodes and eight:
                wrong.append(f"no mixed precision was asked for, but {len(eight)} products are in 8 bits")
        if any(values["block_size"] != section.block_size for values in attributes.values()):
            wrong.append(f"block_size {section.block_size} was asked for, the graph has {found['block_sizes']}")
        others = {
            values.get("accuracy_level", 0)
            for name, values in attributes.items()
            if values.get("accuracy_level", 0) != level_of(section, name)
        }
        if others:
            asked = f"accuracy_level {section.accuracy_level}" + " and node_accuracy_levels" * bool(
                section.node_accuracy_levels
            )
            wrong.append(f"{asked} was asked for, the graph has {sorted(others)}")
        with_zero_points = {node.name for node in nodes if len(node.input) > 3 and node.input[3]}
        if section.is_symmetric and with_zero_points and section.algo_config != "k_quant":
            wrong.append(f"is_symmetric: true was asked for, but {len(with_zero_points)} products have zero points")
        if not section.is_symmetric and not with_zero_points:
            wrong.append("is_symmetric: false was asked for, but no product has zero points")
        if section.op_types_to_quantize and "Gather" in section.op_types_to_quantize and not gathers:
            wrong.append("Gather was asked to be quantized, but no GatherBlockQuantized node is there")
        still = sorted(name for name in section.nodes_to_exclude if any(name in other for other in attributes))
        unknown = sorted(set(section.nodes_to_exclude) - {node.name for node in graph.node} - set(still))
        if still:
            wrong.append(f"nodes_to_exclude: {', '.join(still)} is quantized all the same")
        if unknown:
            names = sorted(node.name for node in graph.node if "MatMul" in node.op_type)
            wrong.append(
                f"nodes_to_exclude: no node {', '.join(unknown)}; names look like {names[0] if names else 'none'}"
            )
    if wrong:
        raise UserError(
            "the model builder did not do what the section quantize asks for:\n  "
            + "\n  ".join(wrong)
            + "\nChange these options: this version of the builder does not honour them for this model."
        )
    return found


def check_generates(folder: Path, tokens: int = 4) -> list[int]:
    """Load the model with onnxruntime-genai and generate a few tokens greedily.

    Raises:
        UserError: ONNX Runtime refuses the model, with its reason.
    """
    import onnxruntime_genai as og

    try:
        model = og.Model(str(folder))
        return greedy(model, og.Tokenizer(model).encode("The quick brown fox"), tokens)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"ONNX Runtime cannot run the exported model: {reason[0] if reason else type(error).__name__}. "
            "Other options of the section quantize may work: algo_config k_quant, is_symmetric true, no matmul_mixed_precision."
        ) from error


def build(
    section: params.Quantize, model: Path, dataset: Path | None, folder: Path, scratch: Path, job: cli.Job
) -> dict:
    """Export into an empty folder and prove that it is what was asked for, loads and generates.

    Returns:
        What is in the graph, as `check_graph` counts it.

    Raises:
        UserError: no model there, or an export that is refused, is not what was asked for, or does not run.
    """
    if not (model / "config.json").exists():
        raise UserError(f"{model}: no model here. Build it with `snakemake --cores all {model}`.")
    weight_files(model)
    name, placed = model, None
    try:
        if section.calibration == "gptq":
            import gptq

            if dataset is None:
                raise UserError("quantize.calibration: gptq needs training prompts: give --dataset.")
            calibrated = scratch / "calibrated"
            calibrated.mkdir(parents=True)
            placed = gptq.calibrate(section, model, dataset, calibrated, job)
            model = calibrated
        export(section, model, folder, scratch, name)
    finally:
        outputs.remove(scratch)
    if section.node_accuracy_levels:
        set_accuracy_levels(section, folder)
    found = check_graph(section, folder)
    if placed is not None:
        gptq.check_placed(folder, placed)
    check_generates(folder)
    return found


def take_over(search: Path, candidates: Path, folder: Path) -> dict:
    """Copy the winner of a search into an empty folder; returns its options."""
    result = outputs.read_json(search, "winner", "options")
    source = candidates / str(result["winner"]) / "model"
    if not source.is_dir():
        raise UserError(
            f"{source}: the winner of {search} is not there. Build it with `snakemake --cores all {search}`."
        )
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return result["options"]


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder in Hugging Face layout")
    parser.add_argument("--dataset", type=Path, help="the tokenized dataset's folder (for calibration)")
    parser.add_argument("--search", type=Path, help="search.json: take over its winner instead of building")
    parser.add_argument("--candidates", type=Path, help="folder of the search's candidates")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the ONNX model to")
    args = parser.parse_args(argv)
    with cli.job("quantize", args.log) as job:
        section = params.section(args.params, "quantize")
        with outputs.written(args.output) as (folder,):
            if args.search:
                options = take_over(args.search, args.candidates, folder)
                section = type(section).model_validate(section.model_dump(exclude={"search"}) | options)
                found = check_graph(section, folder)
                check_generates(folder)
            else:
                found = build(
                    section, args.model, args.dataset, folder, folder.parent / f".{args.output.name}.cache", job
                )
            job.log(f"graph: {json.dumps(found)}")
        bits = (
            ", ".join(f"{count} products in {key} bits" for key, count in found["quantized_matmuls_by_bits"].items())
            or "not quantized"
        )
        job.say(
            f"{args.output} loads and generates ({section.precision}: {bits}; {outputs.folder_size(args.output) / 1e6:.0f} MB, {job.seconds():.0f} s)"
        )


if __name__ == "__main__":
    main()
