"""The code that a rule runs, found from its imports, and digests of source files.

Source files (code, locks, data, a local base model) are compared by content, not by time: the Snakefile lists them as
`ancient` inputs and puts their digest among the rule's params, which Snakemake compares with those of the last run.
Facts of a file are kept under its size, times and inode, so that only a file that moved is read again.
"""

import ast
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
import time
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path

from slmake import outputs
from slmake.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGES = ("scripts", "slmake", "tools")
SETTLED = 2.0  # seconds: a file changed later may change again within its time stamp, so it is read again
# No result depends on them: the terminal, error messages, and parameter models (a rule's section is among its params).
WITHOUT_RESULT = ("slmake.cli", "slmake.errors", "slmake.params")
# Of a rule's text: when and where it runs, but not what it makes.
SCHEDULING = ("mem_mb=", "runtime=", "turns=", "priority:")
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
# Which files are read; what a gate bounds and which rows it needs; what a metric's figure is called.
WITH_RESULT = ("slmake.params.dataset_files", "slmake.params.gates", "slmake.params.metrics")


def rule_digest(rule: str, snakefile: Path = Path("Snakefile")) -> str:
    """SHA-256 of a rule's text in the Snakefile, 64 hex digits: its inputs, options and command, and of what defines the names in it.

    Without comments, layout, and SCHEDULING.
    """
    blocks = _blocks(snakefile)
    own = _words("".join(block for block in blocks if block.startswith(f"rule {rule}:")))
    kept = hashlib.sha256("".join(own).encode())  # one after the other: Python 3.12 splits texts with braces
    waiting, others = (
        set(re.findall(r"\w+", " ".join(own))),
        [block for block in blocks if not block.startswith("rule ")],
    )
    while used := [block for block in others if waiting & _defined(block)]:
        others = [block for block in others if block not in used]
        for words in map(_words, used):
            kept.update("".join(words).encode())
            waiting |= set(re.findall(r"\w+", " ".join(words)))
    return kept.hexdigest()


def snakefiles(snakefile: Path = Path("Snakefile")) -> list[Path]:
    """A Snakefile and the files that it includes, directly and through others."""
    text = snakefile.read_text(encoding="utf-8") if snakefile.is_file() else ""
    included = [snakefile.parent / name for name in re.findall(r"""^include:\s*['"](.+?)['"]""", text, re.M)]
    return [snakefile, *(file for other in included if other != snakefile for file in snakefiles(other))]


def _blocks(snakefile: Path) -> list[str]:
    """The parts of a Snakefile and of those that it includes, each from a line that is not indented to the next."""
    texts = [file.read_text(encoding="utf-8") for file in snakefiles(snakefile) if file.is_file()]
    return [
        block
        for text in texts
        for block in re.findall(r"^[^\s#].*?(?=^(?!else:|elif )[^\s#)\]}]|\Z)", text, re.M | re.S)
    ]


def _words(text: str) -> list[str]:
    """The tokens of a part of a Snakefile that can change a result."""
    words = []
    with contextlib.suppress(tokenize.TokenError):  # Snakemake says what is wrong with it
        for kind, word, *_, line in tokenize.generate_tokens(io.StringIO(text).readline):
            if kind not in LAYOUT and not line.strip().startswith(SCHEDULING):
                words.append(word)
    return words


def _defined(block: str) -> set[str]:
    """Names that a part of a Snakefile defines; none, if it is not Python."""
    try:
        tree = ast.parse(block)
    except (SyntaxError, ValueError, RecursionError):
        return set()
    return _stored(tree)


def _stored(node: ast.AST) -> set[str]:
    """Names that a node gives a value, but not those of functions' and comprehensions' own."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return set()
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*map(_stored, ast.iter_child_nodes(node)))


@functools.cache  # a parse of the Snakefile asks for the same rules a hundred times
def code(rule: str) -> list[str]:
    """Files of the code that a rule runs: its script and the project's modules that it imports, directly and through others."""
    return modules(f"scripts.{rule}")


def modules(start: str, root: Path = ROOT) -> list[str]:
    """The project's files that a module consists of: its own and those of what it imports, anywhere in the code.

    Args:
        start: dotted name of a module.
        root: the project's folder.

    Returns:
        Paths relative to `root`, the module's own first, then sorted. Without modules that no result depends on.

    Raises:
        UserError: there is no such module, or a module is not valid Python.
    """
    seen: dict[str, Path] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen or _without_result(name):
            continue
        file = file_of(name, root)
        if file is None:
            if name == start:
                raise UserError(f"{name}: no such module in {root}.")
            continue
        seen[name] = file
        if "imports" not in _facts(file):
            raise UserError(f"{file}: not valid Python.")
        waiting += _facts(file)["imports"]
    found = {path.relative_to(root).as_posix() for path in seen.values() if path.stat().st_size}
    own = seen[start].relative_to(root).as_posix()
    return [own, *sorted(found - {own})]


def _without_result(name: str) -> bool:
    skipped = any(name == module or name.startswith(f"{module}.") for module in WITHOUT_RESULT)
    return skipped and name not in WITH_RESULT


def modules_behind(name: str) -> list[str]:
    """As `modules`; none where a name is no module, or one that no result depends on."""
    file = None if _without_result(name) else file_of(name)
    return modules(name) if file and file.stat().st_size else []


def file_of(name: str, root: Path = ROOT) -> Path | None:
    """The project's file of a module, by its dotted name; None where there is none."""
    path = root.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def digest(files: Iterable[str | Path], exact: bool = False, root: Path | None = None) -> str:
    """SHA-256 over names and content of files, 64 hex digits; of a folder, of the files in it. A missing file counts as empty.

    Args:
        exact: over the very bytes; otherwise comments, docstrings and layout of Python files, and comments of locks, do not count.
        root: the folder that the names are relative to; the present one by default. The digest does not depend on it.
    """
    whole = hashlib.sha256()
    for name in files:
        path = Path(name) if root is None else root / name
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in inside:
            facts = _facts(file) if file.is_file() else {"bytes": ""}
            whole.update(
                f"{name}\0{file.relative_to(path)}\0{facts['bytes'] if exact else facts.get('meaning', facts['bytes'])}\n".encode()
            )
    return whole.hexdigest()


class _Facts:
    """What is known of files, kept beside Snakemake's records: a file of the same size, times and inode is not read again."""

    def __init__(self, path: Path):
        self.path, self.changed, self.known = path, False, {}
        # Facts that other code or another Python read may differ.
        self.reader = sys.version + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["reader"] == self.reader:
                self.known = dict(saved["files"])

    def __call__(self, file: Path) -> dict:
        mark = outputs.mark(file)
        key = os.path.abspath(file)  # noqa: PTH100
        entry = self.known.get(key)
        if not entry or entry["mark"] != mark:
            settled = time.time() - mark[2] / 1e9 > SETTLED
            entry = {"mark": mark if settled else None, **_read(file)}
            self.known[key], self.changed = entry, self.changed or settled
        return entry

    def save(self) -> None:
        """Write what was learned; where that is not possible, it is learned again next time."""
        if not self.changed:
            return
        kept = {key: entry for key, entry in self.known.items() if entry["mark"] and os.path.exists(key)}  # noqa: PTH110
        with contextlib.suppress(OSError):
            outputs.replace(self.path, json.dumps({"reader": self.reader, "files": kept}).encode())


def _read(file: Path) -> dict:
    with open(file, "rb") as handle:
        content = {"bytes": hashlib.file_digest(handle, "sha256").hexdigest()}
    if file.suffix == ".lock":
        lines = file.read_bytes().splitlines()
        kept = b"\n".join(line for line in lines if not line.lstrip().startswith(b"#"))
        return content | {"meaning": hashlib.sha256(kept).hexdigest()}
    if file.suffix != ".py":
        return content
    try:
        tree = ast.parse(file.read_bytes())
        meaning = hashlib.sha256(_canonical(tree).encode()).hexdigest()
    except (SyntaxError, ValueError, RecursionError):
        return content  # a file in a user's folder; `modules` refuses the project's own
    own = sorted(name for name in imports(tree) if name.split(".")[0] in PACKAGES)
    return content | {"meaning": meaning, "imports": own}


def imports(tree: ast.AST, package: Sequence[str] = ()) -> set[str]:
    """Dotted names of the modules that code imports, anywhere in it, and of what it takes from them, which may be modules.

    Args:
        package: names of the packages that the module is in, outermost first, for relative imports.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*above, *filter(None, [node.module])])
            names |= {start, *(f"{start}.{name.name}" for name in node.names)}
    return names


def _canonical(node: object) -> str:
    """A syntax tree without docstrings as text, the same for every Python: newer ones add fields, which are empty for older code."""
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)  # not `repr`, which depends on the version of Unicode
    if isinstance(node, ast.JoinedStr):  # Python 3.12 cuts texts in two, and adds empty ones
        runs = [(text, list(run)) for text, run in itertools.groupby(node.values, _is_text)]
        parts = ["".join(part.value for part in run) if text else run for text, run in runs]
        return f"JoinedStr({','.join(_canonical(part) for part in parts if part)})"
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    body = fields.get("body")
    if isinstance(body, list) and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
        fields["body"] = [ast.Pass(), *body[1:]]
    return f"{type(node).__name__}({','.join(f'{name}={_canonical(fields[name])}' for name in sorted(fields))})"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


_facts = _Facts(ROOT / ".snakemake" / "slmake.json")
remember = _facts.save  # called once by who planned, at its end
