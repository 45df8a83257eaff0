"""Runs a compiled pipeline as Azure ML would, on this machine: each step in an empty working folder with nothing but its code,
inputs at random read-only paths, outputs at random paths, in the container image where there is one."""

import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import preloaded
import yaml

from slmake.azureml.step import sums

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # as tests/conftest.py sets it


class Runner:
    """Steps and pipelines below `folder`; `image` is a .sif file, or None for the Python that runs the tests.

    Outside of an image, `fresh` steps are new processes that share nothing; otherwise tests/preloaded.py spares them the imports.
    """

    def __init__(self, folder: Path, image: str | None = None, fresh: bool = False):
        self.folder, self.image, self.fresh = folder, image, fresh

    def new_path(self, name: str) -> Path:
        """A path that nobody could have guessed, in a folder of its own."""
        folder = self.folder / f"{name}-{secrets.token_hex(8)}"
        folder.mkdir(parents=True)
        return folder / secrets.token_hex(4)

    def step(self, code: Path, command: str, inputs: dict[str, Path], outputs: dict[str, Path], start=subprocess.run):
        """Run one step's command; the finished process, with both streams in stdout.

        Args:
            inputs, outputs: where the content of each is; outputs need not exist.
            start: what starts the process: subprocess.run, or Popen to deal with it while it runs.
        """
        work = self.new_path("work")
        shutil.copytree(code, work)
        mounted = {name: self._mount(path) for name, path in inputs.items()}
        for path in outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        filled = re.sub(r"\$\{\{inputs\.(\w+)\}\}", lambda match: str(mounted[match[1]]), command)
        filled = re.sub(r"\$\{\{outputs\.(\w+)\}\}", lambda match: str(outputs[match[1]]), filled)
        assert "${{" not in filled, filled
        before = {name: sums(path) for name, path in mounted.items()}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": path, "LANG": "C.UTF-8", "HOME": str(self.folder), **THREADS}
        if not (self.fresh or self.image):
            preloaded.program("python", variables)
        done = start(
            self._command(filled, work, [*mounted.values(), *outputs.values()]),
            cwd=work,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if start is subprocess.run:
            assert {name: sums(path) for name, path in mounted.items()} == before, "a step wrote into its input"
        return done

    def _mount(self, path: Path) -> Path:
        target = self.new_path("in")
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
        for part in [target, *target.rglob("*")] if target.is_dir() else [target]:
            part.chmod(0o555 if part.is_dir() else 0o444)
        return target

    def _command(self, command: str, work: Path, mounts: list[Path]) -> list[str]:
        if not self.image:
            return ["bash", "-c", command]
        binds = ",".join(f"{path.parent}:{path.parent}" for path in mounts)
        base = ["apptainer", "exec", "--cleanenv", "--home", str(work), "--bind", binds, "--pwd", str(work)]
        threads = ",".join(f"{name}={value}" for name, value in THREADS.items())
        return [*base, "--env", threads, self.image, "bash", "-c", command]

    def pipeline(self, file: Path, held: dict[str, Path] | None = None) -> dict[str, Path]:
        """Run a whole pipeline.yml; where each of its outputs lies, by name.

        Args:
            held: what Azure holds, by its address: datastores, assets and registries.
        """
        held = held or {}
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        inputs_of_job = {
            name: held.get(value["path"]) or (file.parent / value["path"]).resolve()
            for name, value in document["inputs"].items()
        }
        outputs_of_job = {name: self.new_path("out") for name in document["outputs"]}
        left = dict(document["jobs"])
        while left:
            name = next(name for name, step in left.items() if not waits(step, left))
            step = left.pop(name)
            inputs = {key: inputs_of_job[reference(value)] if "parent.inputs" in value else outputs_of_job[reference(value)]
                      for key, value in step["inputs"].items()}  # fmt: skip
            outputs = {
                key: outputs_of_job[reference(value)] if isinstance(value, str) else self.new_path("out")
                for key, value in step["outputs"].items()
            }
            done = self.step((file.parent / step["code"]).resolve(), step["command"], inputs, outputs)
            assert done.returncode == 0, f"{name}:\n{done.stdout}"
        return outputs_of_job


def reference(binding: str) -> str:
    """The name at the end of `${{parent.….NAME}}`."""
    return re.fullmatch(r"\$\{\{parent\.(?:\w+\.)*(\w+)\}\}", binding)[1]


def waits(step: dict, left: dict) -> bool:
    """Whether one of the steps in `left` must run before this one."""
    return any(f"parent.jobs.{name}." in str(value) for name in left for value in step["inputs"].values())
