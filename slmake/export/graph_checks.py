"""Check that an exported graph has what was asked for, and that the model generates."""

import fnmatch
from collections import Counter
from pathlib import Path

from slmake import params
from slmake.errors import UserError
from slmake.export.builder import level_of
from slmake.generation import greedy


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
