"""quantize: a graph that is not what was asked for, or that does not run, is refused."""

import shutil
from pathlib import Path

import pytest
from quantize_script import run, section

from slmake.errors import UserError
from slmake.export import graph_checks

# -- a graph that is not what was asked for ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, untied) -> dict[str, Path]:
    """Exports of the untied model with different settings."""
    wanted = {
        "int4": {},
        "int8": {"precision": "int8"},
        "fp32": {"precision": "fp32"},
        "head": {"matmul_mixed_precision": "last_matmul:int8"},
        "layers": {"matmul_mixed_precision": "mixed_layers:int8"},
        "zero points": {"is_symmetric": False},
        "level 1": {"accuracy_level": 1},
    }
    folder = tmp_path_factory.mktemp("graphs")
    return {name: run(folder / name, untied, **changes) for name, changes in wanted.items()}


WRONG = [
    ("int8", {}, "precision int4 was asked for, but no product has 4 bits"),
    ("fp32", {}, "precision int4 was asked for, but no product has 4 bits"),
    ("int4", {"precision": "int8"}, "precision int8 was asked for, but no product has 8 bits"),
    ("int4", {"precision": "fp32"}, "precision fp32 was asked for, but 11 products are quantized"),
    ("int4", {"block_size": 64}, "block_size 64 was asked for, the graph has [32]"),
    ("level 1", {}, "accuracy_level 4 was asked for, the graph has [1]"),
    ("int4", {"accuracy_level": 0}, "accuracy_level 0 was asked for, the graph has [4]"),
    ("zero points", {}, "is_symmetric: true was asked for, but 11 products have zero points"),
    ("int4", {"is_symmetric": False}, "is_symmetric: false was asked for, but no product has zero points"),
    ("head", {}, "no mixed precision was asked for, but 1 products are in 8 bits"),
    ("layers", {}, "no mixed precision was asked for, but "),
    (
        "int4",
        {"matmul_mixed_precision": "last_matmul:int8"},
        "last_matmul:int8 was asked for, but the output head is not in 8 bits",
    ),
    (
        "head",
        {"matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"},
        "mixed_layers:int8 was asked for, but no layer is in 8 bits",
    ),
    (
        "layers",
        {"matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"},
        "last_matmul:int8 was asked for, but the output head is not in 8 bits",
    ),
    ("head", {"int8_nodes": ["*/attn/*"]}, "int8_nodes `*/attn/*` was asked for, but /model/layers.0/attn/"),
    (
        "int4",
        {"op_types_to_quantize": ["MatMul", "Gather"]},
        "Gather was asked to be quantized, but no GatherBlockQuantized node is there",
    ),
    (
        "int4",
        {"nodes_to_exclude": ["/lm_head/MatMul"]},
        "nodes_to_exclude: /lm_head/MatMul is quantized all the same",
    ),
    ("int4", {"prune_lm_head": True}, "prune_lm_head: true was asked for, the graph gives logits of every position"),
]


@pytest.mark.parametrize(("built", "asked", "text"), WRONG, ids=[f"{built}-{asked}" for built, asked, _ in WRONG])
def test_graph_that_is_not_what_was_asked_for(graphs, built, asked, text):
    with pytest.raises(UserError) as caught:
        graph_checks.check_graph(section(**asked), graphs[built])
    message = str(caught.value)
    assert message.startswith("the model builder did not do what the section quantize asks for:\n")
    assert text in message
    assert message.count("\n  ") == (2 if built == "int8" else 1)  # an int8 graph has products in 8 bits, too


def test_all_differences_are_told_at_once(graphs):
    with pytest.raises(UserError) as caught:
        graph_checks.check_graph(section(block_size=64, is_symmetric=False, accuracy_level=0), graphs["int4"])
    assert str(caught.value).count("was asked for") == 3


# -- a model that does not run -----------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path, graphs) -> Path:
    """A copy of an int4 export that a test may damage."""
    return Path(shutil.copytree(graphs["int4"], tmp_path / "damaged"))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_weights_are_found(damaged, share):
    path = damaged / "model.onnx.data"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="ONNX Runtime cannot run the exported model: "):
        graph_checks.check_generates(damaged)


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "text", "half"])
def test_damaged_graph_is_found(damaged, content):
    path = damaged / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(UserError, match="ONNX Runtime cannot run the exported model: "):
        graph_checks.check_generates(damaged)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"])
def test_missing_file_is_found(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(UserError, match="ONNX Runtime cannot run the exported model: "):
        graph_checks.check_generates(damaged)


def test_a_machine_that_fails_is_not_the_models_fault(damaged, monkeypatch):
    def fail(*_):
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(graph_checks, "Exported", fail)
    with pytest.raises(RuntimeError, match="bad_alloc"):
        graph_checks.check_generates(damaged)
