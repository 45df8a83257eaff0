"""What the files that params.yaml names read in turn: modules that a metric's file imports, files that a task's YAML names."""

import ast
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml


def with_what_they_read(names: Iterable[str]) -> list[str]:
    """The files, and behind each those that it reads, directly and through others; each once, relative to the project's folder.

    Python files are followed through their imports of files of the project, YAML files through every text that names a file: `include`,
    `data_files`, `!function utils.read`. What is not there, or cannot be read, is left to the one that uses it.
    """
    files: dict[str, None] = {}
    waiting = list(names)[::-1]
    while waiting:
        name = waiting.pop()
        if name not in files:
            files[name] = None
            waiting += sorted(map(_as_named, _read_by(Path(name))), reverse=True)
    return list(files)


def _as_named(path: Path) -> str:
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def _read_by(file: Path) -> Iterator[Path]:
    readers = {".py": _imports, ".yaml": _texts, ".yml": _texts}
    try:
        yield from readers.get(file.suffix, lambda _: ())(file)
    except (OSError, ValueError, SyntaxError, RecursionError, yaml.YAMLError):
        return


def _imports(file: Path) -> Iterator[Path]:
    """Files of the project that a Python file imports; the project's folder is where Python looks."""
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    for name in names:
        for end in (".py", "/__init__.py"):
            path = Path(name.replace(".", "/") + end)
            if path.is_file() and path.parts[0] != "slmake":  # the pipeline's own code is an input already
                yield path


def _texts(file: Path) -> Iterator[Path]:
    """Files that a task of the lm-evaluation-harness names, from its folder or the project's; of a dataset's folder all files."""
    waiting, seen = [yaml.compose(file.read_text(encoding="utf-8"))], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias, perhaps of what it is in
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            waiting += [value for _, value in node.value]
            for key, value in node.value:
                if key.value in ("dataset_path", "data_dir") and isinstance(value, yaml.ScalarNode):
                    yield from (path for path in Path(value.value).rglob("*") if path.is_file())
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif node is not None:
            text = f"{node.value.rpartition('.')[0].replace('.', '/')}.py" if node.tag == "!function" else node.value
            yield from (path for path in (file.parent / text, Path(text)) if text and path.is_file())
