"""Push and pull of a folder with DVC, as tools/remote.py sets it up, against the Azure SDK's own parallel transfer of the same bytes.

    python bench/transfer.py --megabytes 2000 --output bench/results/transfer.json

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
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "real" / "helpers"))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the folder (default: 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument(
        "--jobs", type=int, nargs="*", help="values of DVC's jobs to try (default: that of tools/remote.py)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args()

    from azure.storage.blob import BlobServiceClient
    from azurite import Azurite

    from tools import remote

    jobs = args.jobs or [int(remote.SETTINGS["jobs"])]
    with tempfile.TemporaryDirectory(prefix="slmake-transfer-") as scratch:
        here = Path(scratch)
        (here / "disk").mkdir()
        server = Azurite(here / "disk").start()
        try:
            os.environ["AZURE_STORAGE_CONNECTION_STRING"] = server.connection()
            client = BlobServiceClient.from_connection_string(server.connection())
            project = here / "project"
            project.mkdir()
            for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
                subprocess.run(command, cwd=project, check=True)
            shutil.copyfile(ROOT / ".dvc" / "config", project / ".dvc" / "config")
            make_folder(project / "folder", args.megabytes)
            total = sum(path.stat().st_size for path in (project / "folder").iterdir())
            dvc(project, "add", "folder")
            figures: dict[str, list[float]] = {}

            def note(name: str, took: float) -> None:
                figures.setdefault(name, []).append(took)
                print(f"{name:22} {took:7.2f} s  {total / took / 1e6:7.1f} MB/s", flush=True)

            for number in range(args.rounds):
                name = f"sdk-{number}"
                client.create_container(name)

                def sdk_upload(name=name) -> None:
                    for path in sorted((project / "folder").iterdir()):
                        with open(path, "rb") as handle:
                            client.get_blob_client(name, path.name).upload_blob(handle, max_concurrency=CONCURRENCY)

                def sdk_download(name=name) -> None:
                    (here / "got").mkdir()
                    for path in sorted((project / "folder").iterdir()):
                        with open(here / "got" / path.name, "wb") as out:
                            client.get_blob_client(name, path.name).download_blob(max_concurrency=CONCURRENCY).readinto(
                                out
                            )

                note("sdk upload", seconds(sdk_upload))
                note("sdk download", seconds(sdk_download))
                shutil.rmtree(here / "got")
                client.delete_container(name)
                for count in jobs:
                    container = f"dvc-{number}-{count}"
                    client.create_container(container)
                    dvc(project, "remote", "add", "--force", "--default", "storage", f"azure://{container}/x")
                    dvc(project, "remote", "modify", "storage", "verify", "true")
                    dvc(project, "remote", "modify", "storage", "jobs", str(count))
                    shutil.rmtree(project / ".dvc" / "tmp", ignore_errors=True)
                    note(f"dvc push, jobs {count}", seconds(lambda: dvc(project, "push")))
                    shutil.move(project / ".dvc" / "cache", here / "cache")
                    shutil.move(project / "folder", here / "folder")
                    note(f"dvc pull, jobs {count}", seconds(lambda: dvc(project, "pull")))
                    # What of a pull is neither network nor disk: start-up and looking at what is there, and hashing.
                    note("dvc pull, all there", seconds(lambda: dvc(project, "pull")))
                    note("md5, one thread", seconds(lambda: hash_all(project / "folder")))
                    shutil.rmtree(here / "cache")
                    shutil.rmtree(here / "folder")
                    if number + 1 == args.rounds and count == jobs[-1]:
                        before = {blob.name for blob in client.get_container_client(container).list_blobs()}
                        changed = project / "folder" / "file-05.bin"
                        content = changed.read_bytes()
                        changed.unlink()
                        changed.write_bytes(content[:-1] + b"x")
                        dvc(project, "add", "folder")
                        second = seconds(lambda: dvc(project, "push"))
                        moved = [
                            blob
                            for blob in client.get_container_client(container).list_blobs()
                            if blob.name not in before
                        ]
                    client.delete_container(container)
        finally:
            server.kill()
    middle = {name: statistics.median(values) for name, values in figures.items()}
    result = {
        "bytes": total,
        "rounds": args.rounds,
        "seconds": figures,
        "push_share_of_sdk": {str(count): middle["sdk upload"] / middle[f"dvc push, jobs {count}"] for count in jobs},
        "pull_share_of_sdk": {str(count): middle["sdk download"] / middle[f"dvc pull, jobs {count}"] for count in jobs},
        "second_push": {"seconds": second, "blobs": len(moved), "bytes": sum(blob.size for blob in moved)},
    }
    print(json.dumps({key: value for key, value in result.items() if key != "seconds"}, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
