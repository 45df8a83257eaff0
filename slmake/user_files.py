"""What the files that params.yaml names read in turn: modules that a metric's file imports, files that it or a task's YAML names."""

import ast
import contextlib
import glob
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from slmake.code_inputs import code, imports, modules_behind

MADE = ("build", "results", "logs", "benchmarks")  # folders of what rules write
LONGEST = 4096  # characters of a path; longer texts name no file


def with_what_they_read(names: Iterable[str]) -> list[str]:
    """The files, and behind each those that it reads, directly and through others; each once, relative to the project's folder.

    Python files are followed through their imports of files of the project and beside them, through what they name in a list INPUTS, and
    through every text that names a file; YAML files through every text that names a file or a pattern: `include`, `data_files`, `!function utils.read`,
    `use_prompt: prompts.yaml:one`. What is not there, or cannot be read, is left to the one that uses it.
    """
    files: dict[str, None] = {}
    waiting = list(names)[::-1]
    included: set[str] = set()  # YAML, whatever their names: the harness's own end in _yaml
    while waiting:
        name = waiting.pop()
        if name not in files:
            files[name] = None
            read = {_as_named(path): kind for path, kind in _read_by(Path(name), name in included)}
            included |= {name for name, kind in read.items() if kind == "include"}
            waiting += sorted(read, reverse=True)
    return list(files)


def _as_named(path: Path) -> str:
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def _read_by(file: Path, is_yaml: bool) -> Iterator[tuple[Path, str]]:
    """The files that a file reads, each with the YAML key that names it."""
    try:
        if is_yaml or file.suffix in (".yaml", ".yml"):
            yield from _texts(file)
        elif file.suffix == ".py":
            yield from ((path, "") for path in itertools.chain(_imports(file), _inputs(file)))
    except (OSError, ValueError, SyntaxError, RecursionError, yaml.YAMLError):
        return


def _imports(file: Path) -> Iterator[Path]:
    """Files of the project that a Python file imports; Python looks in the project's folder, and in the file's if that says so."""
    for name in filter(None, imports(ast.parse(file.read_bytes()), Path(_as_named(file)).parent.parts)):
        parts = name.split(".")
        if parts[0] == "slmake":  # the pipeline's own code is an input of its rules already, as far as they use it
            own = set(code("evaluate")) & set(code("candidate"))
            yield from (Path(path) for path in modules_behind(name) if path not in own)
        else:
            for folder in (Path(), file.parent):
                ends = [
                    folder.joinpath(*parts).with_suffix(".py"),
                    *(folder.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)),
                ]
                yield from filter(Path.is_file, ends)


def _inputs(file: Path) -> Iterator[Path]:
    """Files that a Python file names: in a list `INPUTS = ["words.json"]`, from the project's folder, and in any text, if they are there.

    A text may also name them from the file's own folder. What rules make is left out: its rule is an input already, or refused.
    """
    module = ast.parse(file.read_bytes())
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < LONGEST:
            for path in (Path(node.value), file.parent / node.value):
                with contextlib.suppress(OSError, ValueError):
                    if path.is_file() and Path(_as_named(path)).parts[0] not in MADE:
                        yield path
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == "INPUTS" for target in targets)
        if named and isinstance(node.value, ast.List | ast.Tuple):
            yield from (Path(name) for name in ast.literal_eval(node.value) if isinstance(name, str))


def _texts(file: Path) -> Iterator[tuple[Path, str]]:
    """Files that a task of the lm-evaluation-harness names, from its folder or the project's; of a dataset's folder all files."""
    waiting, seen = [(yaml.compose(file.read_text(encoding="utf-8")), "")], set()
    while waiting:
        node, key = waiting.pop()
        if id(node) in seen:  # an alias, perhaps of what it is in
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            waiting += [(value, name.value) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(value, key) for value in node.value]
        elif node is not None:
            yield from ((path, key) for path in _named_by(node, key, file.parent))


def _named_by(node: yaml.ScalarNode, key: str, folder: Path) -> Iterator[Path]:
    text = f"{node.value.rpartition('.')[0].replace('.', '/')}.py" if node.tag == "!function" else node.value
    for start in filter(None, dict.fromkeys((text, text.rpartition(":")[0]))):
        for path in (folder / start, Path(start)):
            if path.is_file():
                yield path
            elif key in ("dataset_path", "data_dir"):
                yield from filter(Path.is_file, path.rglob("*"))
            elif key and glob.has_magic(start) and "/" in start:
                yield from filter(Path.is_file, map(Path, glob.glob(str(path))))  # noqa: PTH207
