"""A real blob server for the tests: Azurite, Microsoft's emulator of Azure Storage, on a free loopback port."""

import base64
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).parents[1] / "azurite"
ACCOUNT = "slmaketest"


def program() -> str | None:
    """Azurite's program, as `make azurite` installs it, or on the PATH."""
    installed = HERE / "node_modules" / ".bin" / "azurite-blob"
    return str(installed) if installed.exists() else shutil.which("azurite-blob")


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Azurite:
    """The server, with an account and a random key of its own; what it holds is in `folder` and survives a restart."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.key = base64.b64encode(secrets.token_bytes(64)).decode()
        self.process: subprocess.Popen | None = None

    def start(self) -> "Azurite":
        command = [program(), "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--location", str(self.folder)]
        command += ["--blobHost", "127.0.0.1", "--blobPort", str(self.port)]
        environment = os.environ | {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{self.key}"}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(900):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            if self.process.poll() is not None:
                raise RuntimeError(f"Azurite ended: {self.process.stderr.read().decode()}")
            time.sleep(0.1)
        raise RuntimeError("Azurite does not listen after 90 s")

    def restart(self) -> None:
        """End it in peace and start it again: all it holds is on its disk then (it writes its books every five seconds only)."""
        self.process.terminate()
        self.process.wait(60)
        self.process.stderr.close()
        self.start()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def connection(self, port: int | None = None, key: str | None = None) -> str:
        """A connection string, to the server itself or to a proxy's port."""
        return (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key or self.key};"
            f"BlobEndpoint=http://127.0.0.1:{port or self.port}/{ACCOUNT};"
        )

    def client(self):
        """A client of the Azure SDK, straight to the server."""
        from azure.storage.blob import BlobServiceClient

        return BlobServiceClient.from_connection_string(self.connection())

    def container(self) -> str:
        """A new container's name."""
        name = f"test-{secrets.token_hex(6)}"
        self.client().create_container(name)
        return name
