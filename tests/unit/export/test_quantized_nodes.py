"""quantize: which products of the graph get 8 bits, which none, and by which options of the builder."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from quantize_script import divergence, load, onnx_logits, refused, run, section, torch_logits
from tiny import make_model

from slmake.errors import UserError
from slmake.export import builder, graph_checks


def bits_of(folder: Path) -> dict[str, int]:
    """Bits of every quantized product, by the name it had before."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            (bits,) = [attribute.i for attribute in node.attribute if attribute.name == "bits"]
            found[node.name.removesuffix(f"_Q{bits}")] = bits
    return found


# -- products in 8 bits ------------------------------------------------------------------------------------------------


def test_mixed_layers_follow_the_builders_rule(tmp_path):
    """Sixteen layers: the first and last eighth, and every third between; value (or fused) and down projections."""
    model = make_model(tmp_path / "deep", num_hidden_layers=16)
    folder = run(tmp_path, model, matmul_mixed_precision="mixed_layers:int8")
    bits = bits_of(folder)
    chosen = {i for i in range(16) if i < 2 or i >= 14 or (i - 2) % 3 == 2}
    assert chosen == {0, 1, 4, 7, 10, 13, 14, 15}
    for name, value in bits.items():
        layer = int(name.split("/")[2].removeprefix("layers.")) if "layers" in name else -1
        eight = layer in chosen and name.split("/")[-2] in ("qkv_proj", "v_proj", "down_proj")
        assert value == (8 if eight else 4), name
    assert sum(value == 8 for value in bits.values()) == 16


ARCHITECTURES = {
    "llama": {"attn": ["qkv_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]},
    "qwen2": {"attn": ["qkv_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]},
    "phi3": {"attn": ["qkv_proj", "o_proj"], "mlp": ["gate_up_proj", "down_proj"]},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_of(request, tmp_path_factory) -> tuple[str, Path]:
    """A tiny model of each architecture."""
    folder = tmp_path_factory.mktemp("arch") / request.param
    return request.param, make_model(folder, request.param, tie_word_embeddings=False)


@pytest.mark.parametrize("mixed", [None, "last_matmul:int8"])
def test_int8_nodes_chooses_products_by_name(tmp_path, model_of, mixed):
    """All of attention and the down projections in 8 bits, the rest in 4; the output head as mixed precision says."""
    _, model = model_of
    folder = run(tmp_path, model, int8_nodes=["*/attn/*", "*/down_proj/*"], matmul_mixed_precision=mixed)
    bits = bits_of(folder)
    for name, value in bits.items():
        eight = "/attn/" in name or "down_proj" in name or (mixed and "lm_head" in name)
        assert value == (8 if eight else 4), name
    found = graph_checks.check_graph(section(int8_nodes=["*/attn/*"], matmul_mixed_precision=mixed), folder)
    assert found["plain_matmuls"] == 0
    assert divergence(torch_logits(load(model)), onnx_logits(folder)) < 0.02


def test_int8_nodes_can_name_one_layer_or_one_projection(tmp_path, base):
    bits = bits_of(run(tmp_path / "layer", base, int8_nodes=["/model/layers.1/*"]))
    assert {name.split("/")[2] for name, value in bits.items() if value == 8} == {"layers.1"}
    bits = bits_of(run(tmp_path / "value", base, int8_nodes=["*/v_proj/*"]))
    assert sorted(name for name, value in bits.items() if value == 8) == [
        "/model/layers.0/attn/v_proj/MatMul",
        "/model/layers.1/attn/v_proj/MatMul",
    ]


def test_accuracy_levels_of_groups_of_nodes(tmp_path, base):
    """The last pattern that matches counts; the weights are those of one level for all, and level 1 takes float32 activations."""
    groups = {"*/mlp/*": 1, "/model/layers.1/mlp/down_proj/*": 0}
    plain, grouped = run(tmp_path / "plain", base), run(tmp_path / "grouped", base, node_accuracy_levels=groups)
    graph = onnx.load(grouped / "model.onnx", load_external_data=False).graph
    nodes = {node.name: node for node in graph.node if node.op_type == "MatMulNBits"}
    for name, node in nodes.items():
        level = next(a.i for a in node.attribute if a.name == "accuracy_level")
        assert level == (0 if "layers.1/mlp/down_proj" in name else 1 if "/mlp/" in name else 4), name
    assert (grouped / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()
    graph_checks.check_graph(section(node_accuracy_levels=groups), grouped)
    with pytest.raises(UserError, match=r"accuracy_level 4 was asked for, the graph has \[0, 1\]"):
        graph_checks.check_graph(section(), grouped)
    assert not np.array_equal(onnx_logits(plain), onnx_logits(grouped))


def test_accuracy_levels_of_nodes_that_are_not_there(tmp_path, capsys, base):
    message = refused(tmp_path, capsys, base, node_accuracy_levels={"*/mpl/*": 1})
    assert "quantize.node_accuracy_levels: `*/mpl/*` matches no node. Names look like /model/layers.0/attn/" in message


def test_int8_nodes_that_match_nothing(tmp_path, capsys, base):
    message = refused(tmp_path, capsys, base, int8_nodes=["*/atn/*"])
    assert "quantize.int8_nodes: `*/atn/*` matches no node. Names look like /model/layers.0/attn/" in message


# -- nodes left alone --------------------------------------------------------------------------------------------------


def test_nodes_to_exclude_is_honoured(tmp_path, untied):
    names = ["/lm_head/MatMul", "/model/layers.0/mlp/up_proj/MatMul"]
    folder = run(tmp_path, untied, nodes_to_exclude=names)
    found = graph_checks.check_graph(section(nodes_to_exclude=names), folder)
    assert found == {
        "quantized_matmuls_by_bits": {"4": 9},
        "block_sizes": [32],
        "plain_matmuls": 2,
        "quantized_gathers": 0,
    }
    assert not set(names) & set(bits_of(folder))


def test_nodes_to_exclude_goes_with_int8_nodes(tmp_path, untied):
    names = ["/model/layers.0/mlp/up_proj/MatMul"]
    bits = bits_of(run(tmp_path, untied, nodes_to_exclude=names, int8_nodes=["*/down_proj/*"]))
    assert "/model/layers.0/mlp/up_proj/MatMul" not in bits
    assert sum(value == 8 for value in bits.values()) == 2
    assert len(bits) == 10


def test_unknown_node_to_exclude_is_named(tmp_path, capsys, untied):
    message = refused(tmp_path, capsys, untied, nodes_to_exclude=["/model/layers.7/mlp/up_proj/MatMul"])
    assert "nodes_to_exclude: no node /model/layers.7/mlp/up_proj/MatMul; names look like /" in message


# -- options -----------------------------------------------------------------------------------------------------------


def test_builder_options_have_the_names_of_today():
    """The builder ignores unknown names in silence; what it does with these is checked on the graphs above."""
    asked = section(
        matmul_mixed_precision="last_matmul:int8, mixed_layers:int8",
        op_types_to_quantize=["MatMul", "Gather"],
        nodes_to_exclude=["/a/MatMul", "/b/MatMul"],
        shared_embeddings=False,
    )
    options = builder.builder_options(asked)
    assert options == {
        "hf_token": "false",
        "prune_lm_head": "false",
        "block_size": "32",
        "is_symmetric": "true",
        "accuracy_level": "4",
        "algo_config": "rtn",
        "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8",
        "op_types_to_quantize": "MatMul/Gather",
        "nodes_to_exclude": "/a/MatMul,/b/MatMul",
        "shared_embeddings": "false",
    }


def test_builder_options_of_other_precisions():
    assert builder.builder_options(section(precision="fp32")) == {"hf_token": "false", "prune_lm_head": "false"}
    assert builder.builder_options(section(precision="int8", matmul_mixed_precision=None)) == {
        "hf_token": "false",
        "prune_lm_head": "false",
        "block_size": "32",
        "is_symmetric": "true",
        "accuracy_level": "4",
    }
