"""What an Olive target that names a device alone is exported for."""

import pytest
from test_forms import BUILDER, loaded, read, small


@pytest.mark.parametrize(("device", "provider"), [("gpu", "cuda"), ("cpu", None)])
@pytest.mark.parametrize("providers", [{}, {"execution_providers": []}])
def test_a_gpu_without_a_provider_is_that_of_cuda(device, provider, providers):
    """Olive takes what is installed there."""
    system = {"type": "LocalSystem", "accelerators": [{"device": device, **providers}]}
    imported = read(small(BUILDER, systems={"here": system}, target="here"))
    assert imported.params["quantize"].get("execution_provider") == provider
    assert "execution_provider" not in read(small(BUILDER, systems={"here": system}, host="here")).params["quantize"]


def test_an_fp32_export_is_the_processor_s(tmp_path):
    """None of CUDA's is one: quantize.execution_provider would be refused."""
    system = {"type": "LocalSystem", "accelerators": [{"device": "gpu"}]}
    content = small(BUILDER | {"precision": "fp32"}, systems={"here": system}, target="here")
    assert loaded(read(content), tmp_path).quantize.execution_provider == "cpu"
