"""Check that an exported graph has what was asked for, and that the model generates."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from slmake import params
from slmake.errors import NotBuildable, first_line
from slmake.export.builder import level_of
from slmake.generation import Exported
from slmake.machine_errors import is_of_machine


class Trial(NamedTuple):
    """What an export generated (token ids), and the execution provider that it ran on."""

    tokens: list[int]
    runs_on: str


@dataclass(frozen=True)
class Graph:
    """What the checks read of an exported graph.

    Attributes:
        nodes: names of all nodes, with their operators.
        products: integer attributes (bits, block_size, accuracy_level, …) of every quantized product, by node name.
        with_zero_points: names of the quantized products that have zero points.
        matrix_types: ONNX data types of the floating-point matrices among the weights.
        pruned: logits are computed for the last position only.
    """

    nodes: dict[str, str]
    products: dict[str, dict[str, int]]
    with_zero_points: set[str]
    matrix_types: set[int]
    pruned: bool

    def with_bits(self, bits: int) -> set[str]:
        """Names of the quantized products of so many bits."""
        return {name for name, values in self.products.items() if values["bits"] == bits}

    @property
    def gathers(self) -> int:
        """Number of quantized embeddings."""
        return list(self.nodes.values()).count("GatherBlockQuantized")

    @property
    def block_sizes(self) -> list[int]:
        return sorted({values["block_size"] for values in self.products.values()})

    def summary(self) -> dict:
        """Number of quantized products by bits, block sizes, plain products, quantized embeddings."""
        bits = Counter(values["bits"] for values in self.products.values())
        return {
            "quantized_matmuls_by_bits": {str(key): bits[key] for key in sorted(bits)},
            "block_sizes": self.block_sizes,
            "plain_matmuls": list(self.nodes.values()).count("MatMul"),
            "quantized_gathers": self.gathers,
        }


def read_graph(folder: Path) -> Graph:
    """The graph of an export, without its weights."""
    import onnx

    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    quantized = [node for node in graph.node if node.op_type == "MatMulNBits"]
    logits = next(output for output in graph.output if output.name == "logits")
    return Graph(
        nodes={node.name: node.op_type for node in graph.node},
        products={
            node.name: {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT} for node in quantized
        },
        with_zero_points={node.name for node in quantized if len(node.input) > 3 and node.input[3]},
        matrix_types={
            tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.data_type in floats
        },
        pruned=logits.type.tensor_type.shape.dim[1].dim_value == 1,
    )


def _prune_lm_head(section: params.Quantize, graph: Graph) -> Iterator[str]:
    if graph.pruned != section.prune_lm_head:
        asked, positions = str(section.prune_lm_head).lower(), "the last" if graph.pruned else "every"
        yield f"prune_lm_head: {asked} was asked for, the graph gives logits of {positions} position"


def _full_precision(section: params.Quantize, graph: Graph) -> Iterator[str]:
    import onnx

    asked = f"precision {section.precision} was asked for"
    wanted = {"fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}[section.precision]
    if graph.products:
        yield f"{asked}, but {len(graph.products)} products are quantized"
    if graph.matrix_types - {wanted}:
        yield f"{asked}, but some weights have another type"


def _quantized_precision(section: params.Quantize, graph: Graph) -> Iterator[str]:
    bits = {"int4": 4, "int8": 8}[section.precision]
    if not graph.with_bits(bits):
        yield f"precision {section.precision} was asked for, but no product has {bits} bits"


def _matmul_mixed_precision(section: params.Quantize, graph: Graph) -> Iterator[str]:
    if section.precision != "int4":
        return
    eight = graph.with_bits(8)
    head, mixed = {name for name in graph.products if "lm_head" in name}, section.matmul_mixed_precision or ""
    if "last_matmul:int8" in mixed and not head & eight:
        yield "last_matmul:int8 was asked for, but the output head is not in 8 bits"
    if "mixed_layers:int8" in mixed and not eight - head:
        yield "mixed_layers:int8 was asked for, but no layer is in 8 bits"
    if not mixed and not section.int8_nodes and eight:
        yield f"no mixed precision was asked for, but {len(eight)} products are in 8 bits"


def _int8_nodes(section: params.Quantize, graph: Graph) -> Iterator[str]:
    names = {name: name.removesuffix("_Q4") for name in graph.products if name in graph.with_bits(4)}
    for pattern in section.int8_nodes:
        four = [name for name, plain in names.items() if fnmatch.fnmatchcase(plain, pattern)]
        if four:
            yield f"int8_nodes `{pattern}` was asked for, but {four[0]} is in 4 bits"


def _block_size(section: params.Quantize, graph: Graph) -> Iterator[str]:
    if set(graph.block_sizes) - {section.block_size}:
        yield f"block_size {section.block_size} was asked for, the graph has {graph.block_sizes}"


def _accuracy_level(section: params.Quantize, graph: Graph) -> Iterator[str]:
    levels = {name: values.get("accuracy_level", 0) for name, values in graph.products.items()}
    others = {level for name, level in levels.items() if level != level_of(section, name)}
    if others:
        by_node = " and node_accuracy_levels" if section.node_accuracy_levels else ""
        yield f"accuracy_level {section.accuracy_level}{by_node} was asked for, the graph has {sorted(others)}"


def _is_symmetric(section: params.Quantize, graph: Graph) -> Iterator[str]:
    count = len(graph.with_zero_points)
    if section.is_symmetric and count and section.algo_config != "k_quant":  # k_quant has zero points in any case
        yield f"is_symmetric: true was asked for, but {count} products have zero points"
    if not section.is_symmetric and not count:
        yield "is_symmetric: false was asked for, but no product has zero points"


def _op_types_to_quantize(section: params.Quantize, graph: Graph) -> Iterator[str]:
    if "Gather" in (section.op_types_to_quantize or ()) and not graph.gathers:
        yield "Gather was asked to be quantized, but no GatherBlockQuantized node is there"


def _nodes_to_exclude(section: params.Quantize, graph: Graph) -> Iterator[str]:
    quantized = sorted(name for name in section.nodes_to_exclude if any(name in other for other in graph.products))
    unknown = sorted(set(section.nodes_to_exclude) - graph.nodes.keys() - set(quantized))
    if quantized:
        yield f"nodes_to_exclude: {', '.join(quantized)} is quantized all the same"
    if unknown:
        names = sorted(name for name, operator in graph.nodes.items() if "MatMul" in operator)
        yield f"nodes_to_exclude: no node {', '.join(unknown)}; names look like {names[0] if names else 'none'}"


# One check per option; each yields what differs from the request.
Check = Callable[[params.Quantize, Graph], Iterator[str]]
FULL_PRECISION: dict[str, Check] = {"prune_lm_head": _prune_lm_head, "precision": _full_precision}
QUANTIZED: dict[str, Check] = {
    "prune_lm_head": _prune_lm_head,
    "precision": _quantized_precision,
    "matmul_mixed_precision": _matmul_mixed_precision,
    "int8_nodes": _int8_nodes,
    "block_size": _block_size,
    "accuracy_level": _accuracy_level,
    "is_symmetric": _is_symmetric,
    "op_types_to_quantize": _op_types_to_quantize,
    "nodes_to_exclude": _nodes_to_exclude,
}


def check_graph(section: params.Quantize, folder: Path) -> dict:
    """Compare the written graph with what was asked for.

    Returns:
        The graph's `summary`.

    Raises:
        NotBuildable: the graph differs from the request; every difference is named.
    """
    graph = read_graph(folder)
    checks = FULL_PRECISION if section.precision in ("fp16", "fp32") else QUANTIZED
    wrong = [difference for check in checks.values() for difference in check(section, graph)]
    if wrong:
        raise NotBuildable(
            "the model builder did not do what the section quantize asks for:\n  "
            + "\n  ".join(wrong)
            + "\nChange these options: this version of the builder does not honour them for this model."
        )
    return graph.summary()


def check_generates(folder: Path, tokens: int = 4) -> Trial:
    """Load an export as a user does, and generate a few tokens greedily.

    Raises:
        NotBuildable: ONNX Runtime refuses the model; the message has its reason.
    """
    try:
        model = Exported(folder)
        return Trial(model.generate(model.encode("The quick brown fox"), tokens), model.runs_on)
    except Exception as error:
        if is_of_machine(error):
            raise
        raise NotBuildable(
            f"ONNX Runtime cannot run the exported model: {first_line(error)}. "
            "Other options of the section quantize may work: algo_config k_quant, is_symmetric true, no matmul_mixed_precision."
        ) from error
