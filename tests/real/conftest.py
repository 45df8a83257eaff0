"""Fixtures of the tests against real components."""

import os

import pytest
from azurite import Azurite, program
from proxy import Faulty


@pytest.fixture(scope="session")
def blob_server(tmp_path_factory):
    """A running Azurite; each test takes a container of its own."""
    if program() is None:
        pytest.skip("Azurite is not installed: `make azurite` (needs npm)")
    server = Azurite(tmp_path_factory.mktemp("azurite")).start()
    yield server
    server.kill()


@pytest.fixture
def container(blob_server, monkeypatch) -> str:
    """A new container; the environment leads to its account."""
    for name in [name for name in os.environ if name.startswith(("AZURE_", "AZUREML_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection())
    return blob_server.container()


@pytest.fixture
def proxy(blob_server, container, monkeypatch):
    """A proxy before the blob server, without faults yet; the environment leads through it."""
    with Faulty(blob_server.port) as between:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", blob_server.connection(between.port))
        yield between
