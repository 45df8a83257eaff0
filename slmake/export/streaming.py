"""Keep one weight in memory while the model builder quantizes, not the model.

The builder of onnxruntime-genai 0.18 writes all weights in float32 into one message before it quantizes the first. Here that
message has names and shapes only: a weight is read from its file when its product is quantized, and released after it. The
quantizer, its order and the bytes are the builder's own.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from slmake import memory
from slmake.export.builder_fixes import replaced

LARGE = 2**20  # bytes of a weight that is worth releasing


@contextlib.contextmanager
def streamed(builder, weights: Mapping[str, Callable[[], np.ndarray]]) -> Iterator[None]:
    """Change the builder's module while the block runs.

    Args:
        weights: by a product's name, what gives its weight, float32 [out, in], where that is not the model's own.
    """
    model, mapped = builder.Model, []
    load_weights, make_initializer, to_nbits = model.load_weights, model.make_initializer, model.to_nbits

    def load(self, input_path):
        network = load_weights(self, input_path)
        for parameter in network.parameters():
            if parameter.dim() == 1:  # Gemma's norms add 1 to their weights, which bfloat16 would round
                parameter.data = parameter.data.float()
        mapped.extend(parameter.data for parameter in network.parameters() if parameter.nbytes > LARGE)
        return network

    def make(self, tensor, /, name, **options):
        make_initializer(self, tensor, name, **options)
        memory.release(mapped)  # it reads q, k and v to join them

    def quantize(self):
        graph = self.model.graph
        products = {node.inputs[1].name: node.name for node in graph if node.op_type == "MatMul"}
        sources = {name: value.const_value for name, value in graph.initializers.items() if len(value.shape) == 2}

        def value_of(name: str) -> np.ndarray:
            source, weight = sources[name], weights.get(products.get(name))
            value = source.numpy() if weight is None else weight().T.astype(source.dtype.numpy())
            memory.release(mapped)
            return np.ascontiguousarray(value)

        for name, source in sources.items():
            graph.initializers[name].const_value = _without_data(name, source)
        with _read(sources, value_of):
            exported = to_nbits(self)
        for name in sources.keys() & exported.graph.initializers.keys():  # those that stay as they are
            exported.graph.initializers[name].const_value = sources[name]
        return exported

    with (
        replaced(model, "load_weights", load),
        replaced(model, "make_initializer", make),
        replaced(model, "to_nbits", quantize),
    ):
        yield


def _without_data(name: str, source):
    """A tensor of that name with the type and the shape of another one."""
    import onnx
    from onnx_ir.serde import TensorProtoTensor

    return TensorProtoTensor(onnx.TensorProto(name=name, data_type=source.dtype, dims=source.shape.numpy()))


@contextlib.contextmanager
def _read(names, value_of: Callable[[str], np.ndarray]) -> Iterator[None]:
    """Make ONNX Runtime's quantizers get the values of some tensors from a function: both ways in which they read them."""
    from onnx import numpy_helper
    from onnx_ir.serde import TensorProtoTensor

    to_array, numpy = numpy_helper.to_array, TensorProtoTensor.numpy

    def array_of(tensor, base_dir=""):
        return value_of(tensor.name) if tensor.name in names else to_array(tensor, base_dir)

    def numpy_of(self):
        return value_of(self.name) if self.name in names else numpy(self)

    with replaced(numpy_helper, "to_array", array_of), replaced(TensorProtoTensor, "numpy", numpy_of):
        yield
