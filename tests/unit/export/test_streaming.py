"""streaming: the builder's bytes without the model in memory."""

import contextlib
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_families import export, make_twin

from slmake.export import builder, streaming

MIXED = {"matmul_mixed_precision": "last_matmul:int8"}
OPTIONS = [
    {"algo_config": "rtn", "int8_nodes": ["*/attn/*"], **MIXED},
    {"algo_config": "k_quant", **MIXED},
    {"algo_config": "default"},
    {"algo_config": "default", "op_types_to_quantize": ["MatMul", "Gather"]},
    {"execution_provider": "cuda"},
]


@pytest.fixture(scope="module", params=["llama", "llama-tied", "phi3-long"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    make_twin(request.param, folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


def at_once(_builder, _weights):
    return contextlib.nullcontext()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bytes_are_those_of_the_builder_alone(tmp_path, model, options, monkeypatch):
    streamed = export(model, tmp_path / "streamed" / "onnx", precision="int4", **options)
    monkeypatch.setattr(builder, "streamed", at_once)
    alone = export(model, tmp_path / "alone" / "onnx", precision="int4", **options)
    for name in ("model.onnx", "model.onnx.data"):
        assert (streamed / name).read_bytes() == (alone / name).read_bytes(), name


def test_the_quantizer_gets_a_message_without_weights(tmp_path, model, monkeypatch):
    from onnxruntime_genai.models import builder as upstream

    base, sizes = sys.modules[upstream.Model.__module__], []

    class Quantizer(base.MatMulNBitsQuantizer):
        def __init__(self, model, **options):
            sizes.append(sum(tensor.ByteSize() for tensor in model.graph.initializer if len(tensor.dims) == 2))
            super().__init__(model, **options)

    monkeypatch.setattr(base, "MatMulNBitsQuantizer", Quantizer)
    export(model, tmp_path / "streamed" / "onnx", precision="int4")
    monkeypatch.setattr(builder, "streamed", at_once)
    export(model, tmp_path / "alone" / "onnx", precision="int4")
    assert sizes[0] < 5000 < 100_000 < sizes[1]


def test_given_weights_are_exported_in_place_of_the_models(tmp_path, monkeypatch):
    from slmake import params

    make_twin("llama", tmp_path / "model")
    node = "/model/layers.1/mlp/up_proj/MatMul"
    weight = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    (tmp_path / "onnx").mkdir()
    section = params.Quantize(precision="int8", matmul_mixed_precision=None, int8_nodes=[], block_size=32)
    builder.export(section, tmp_path / "model", tmp_path / "onnx", tmp_path / "cache", {node: lambda: weight})
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    product = next(product for product in graph.node if product.name.startswith(node))
    levels, scales = (tensors[name].astype(np.float32) for name in product.input[1:3])
    exported = (levels.reshape(128, -1, 32) - 128) * scales.reshape(128, -1, 1)
    assert np.abs(exported.reshape(128, 64) - weight).max() < np.abs(weight).max() / 100


def test_gemmas_norms_are_not_rounded_to_bfloat16(tmp_path):
    """The builder adds 1 to them in the type of the model's file."""
    network = make_twin("gemma", tmp_path / "model").to(torch.bfloat16)
    norm = network.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        norm.copy_(torch.linspace(-0.01, 0.01, len(norm)))
    network.save_pretrained(tmp_path / "model")
    graph = onnx.load(export(tmp_path / "model", tmp_path / "onnx") / "model.onnx").graph
    exported = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    np.testing.assert_array_equal(exported["model.layers.0.input_layernorm.weight"], 1 + norm.detach().float().numpy())


def test_nothing_stays_changed(tmp_path):
    from onnxruntime_genai.models import builder as upstream

    before = (upstream.Model.to_nbits, upstream.Model.load_weights, numpy_helper.to_array)
    with contextlib.suppress(RuntimeError), streaming.streamed(upstream, {}):
        raise RuntimeError
    assert before == (upstream.Model.to_nbits, upstream.Model.load_weights, numpy_helper.to_array)
