"""Push and pull of a folder with DVC, as tools/remote.py sets it up, against the Azure SDK's own parallel transfer of the same bytes.

    python -m bench.transfer --megabytes 2000 --output bench/results/transfer.json

Starts the tests' blob server (`make azurite`) on loopback, in one run: SDK upload, `dvc push`, SDK download, `dvc pull`, repeated in turn, and
reports the seconds of each and DVC's share of the SDK's speed (the target is at least 0.8), then a second push after one changed file. Beside
a pull stand its fixed parts: a pull with nothing to do, and hashing the same bytes. The folder is
laid out as a build is: a few large weight files and many small ones. Random bytes, so that nothing can be compressed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONCURRENCY = 8  # of the SDK's own transfer, within a file
SHARES = (0.27, 0.27, 0.27, 0.07, 0.07, 0.05)  # three models in 32 bits, two exported ones, the rest in small files
SMALL = 40


def make_folder(folder: Path, megabytes: int) -> None:
    """A few large files and SMALL small ones of seeded random bytes."""
    folder.mkdir()
    chance = random.Random(7)
    sizes = [int(share * megabytes * 1e6) for share in SHARES[:-1]]
    sizes += [int(SHARES[-1] * megabytes * 1e6 / SMALL)] * SMALL
    for number, size in enumerate(sizes):
        with open(folder / f"file-{number:02d}.bin", "wb") as out:
            while size > 0:
                out.write(chance.randbytes(min(size, 2**22)))
                size -= 2**22


def seconds(work) -> float:
    """Wall time of a call."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def hash_all(folder: Path) -> None:
    """Hash every file of a folder as DVC does, one after another."""
    for path in folder.iterdir():
        with open(path, "rb") as handle:
            hashlib.file_digest(handle, "md5")


def dvc(folder: Path, *arguments: str) -> None:
    """Run DVC quietly; a failure ends the benchmark."""
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], cwd=folder, check=True)


class Transfers:
    """A project with one tracked folder, a blob server, and the seconds of every transfer between them."""

    def __init__(self, here: Path, client, megabytes: int):
        self.here, self.client, self.project = here, client, here / "project"
        self.figures: dict[str, list[float]] = {}
        self.project.mkdir()
        for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
            subprocess.run(command, cwd=self.project, check=True)
        shutil.copyfile(ROOT / ".dvc" / "config", self.project / ".dvc" / "config")
        make_folder(self.project / "folder", megabytes)
        self.total = sum(path.stat().st_size for path in (self.project / "folder").iterdir())
        dvc(self.project, "add", "folder")

    def note(self, name: str, action: Callable[[], object]) -> None:
        """Run and time one transfer."""
        took = seconds(action)
        self.figures.setdefault(name, []).append(took)
        print(f"{name:22} {took:7.2f} s  {self.total / took / 1e6:7.1f} MB/s", flush=True)

    def sdk(self, number: int) -> None:
        """Upload and download by the SDK alone, file by file."""
        name, target = f"sdk-{number}", self.here / "got"
        self.client.create_container(name)
        files = sorted((self.project / "folder").iterdir())

        def upload() -> None:
            for path in files:
                with open(path, "rb") as handle:
                    self.client.get_blob_client(name, path.name).upload_blob(handle, max_concurrency=CONCURRENCY)

        def download() -> None:
            target.mkdir()
            for path in files:
                with open(target / path.name, "wb") as out:
                    blob = self.client.get_blob_client(name, path.name)
                    blob.download_blob(max_concurrency=CONCURRENCY).readinto(out)

        self.note("sdk upload", upload)
        self.note("sdk download", download)
        shutil.rmtree(target)
        self.client.delete_container(name)

    def push_and_pull(self, container: str, jobs: int) -> None:
        """Push and pull by DVC, into a container that is new; beside the pull its fixed parts."""
        self.client.create_container(container)
        dvc(self.project, "remote", "add", "--force", "--default", "storage", f"azure://{container}/x")
        dvc(self.project, "remote", "modify", "storage", "verify", "true")
        dvc(self.project, "remote", "modify", "storage", "jobs", str(jobs))
        shutil.rmtree(self.project / ".dvc" / "tmp", ignore_errors=True)
        self.note(f"dvc push, jobs {jobs}", lambda: dvc(self.project, "push"))
        shutil.move(self.project / ".dvc" / "cache", self.here / "cache")
        shutil.move(self.project / "folder", self.here / "folder")
        self.note(f"dvc pull, jobs {jobs}", lambda: dvc(self.project, "pull"))
        # What of a pull is neither network nor disk: start-up and looking at what is there, and hashing.
        self.note("dvc pull, all there", lambda: dvc(self.project, "pull"))
        self.note("md5, one thread", lambda: hash_all(self.project / "folder"))
        shutil.rmtree(self.here / "cache")
        shutil.rmtree(self.here / "folder")

    def second_push(self, container: str) -> dict[str, float]:
        """Push again after one changed file: seconds, and what was uploaded."""
        blobs = self.client.get_container_client(container)
        before = {blob.name for blob in blobs.list_blobs()}
        changed = self.project / "folder" / "file-05.bin"
        content = changed.read_bytes()
        changed.unlink()
        changed.write_bytes(content[:-1] + b"x")
        dvc(self.project, "add", "folder")
        took = seconds(lambda: dvc(self.project, "push"))
        moved = [blob.size for blob in blobs.list_blobs() if blob.name not in before]
        return {"seconds": took, "blobs": len(moved), "bytes": sum(moved)}


def transfer(megabytes: int, rounds: int, jobs: list[int]) -> dict:
    """Start the blob server, measure every transfer in every round, and compare."""
    from azure.storage.blob import BlobServiceClient

    from tests.real.helpers.azurite import Azurite

    with tempfile.TemporaryDirectory(prefix="slmake-transfer-") as scratch:
        (Path(scratch) / "disk").mkdir()
        server = Azurite(Path(scratch) / "disk").start()
        try:
            os.environ["AZURE_STORAGE_CONNECTION_STRING"] = server.connection()
            client = BlobServiceClient.from_connection_string(server.connection())
            transfers = Transfers(Path(scratch), client, megabytes)
            for number in range(rounds):
                transfers.sdk(number)
                for count in jobs:
                    container = f"dvc-{number}-{count}"
                    transfers.push_and_pull(container, count)
                    if (number + 1, count) == (rounds, jobs[-1]):
                        second = transfers.second_push(container)
                    client.delete_container(container)
        finally:
            server.kill()
    middle = {name: statistics.median(values) for name, values in transfers.figures.items()}
    return {
        "bytes": transfers.total,
        "rounds": rounds,
        "seconds": transfers.figures,
        "push_share_of_sdk": {str(count): middle["sdk upload"] / middle[f"dvc push, jobs {count}"] for count in jobs},
        "pull_share_of_sdk": {str(count): middle["sdk download"] / middle[f"dvc pull, jobs {count}"] for count in jobs},
        "second_push": second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the folder (default: 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument(
        "--jobs", type=int, nargs="*", help="values of DVC's jobs to try (default: that of tools/remote.py)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args()
    from tools import remote

    result = transfer(args.megabytes, args.rounds, args.jobs or [int(remote.SETTINGS["jobs"])])
    print(json.dumps({key: value for key, value in result.items() if key != "seconds"}, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
