"""The floors of the library: a lower one never imports a higher one (docs/architecture.md)."""

import ast
from pathlib import Path

from tiny import ROOT

FLOORS = (
    *("params", "sources", "data", "training", "merging", "export"),
    *("scoring", "rehearsal", "reporting", "packaging", "platforms", "azureml"),
)
GROUND = (
    *(
        "answer_stream",
        "bounded_jinja",
        "cli",
        "code_inputs",
        "constraints",
        "credentials",
        "csv_files",
        "errors",
        "generation",
        "hard_texts",
        "json_schemas",
        "machine_errors",
        "memory",
        "openai_api",
        "outputs",
    ),
    *("patterns", "planned", "prompts", "serve", "text", "tool_calls", "user_files", "user_reads"),
)  # modules of slmake/ that all floors import
BESIDE = {
    "exported_model": "scoring",
    "model_config": "sources",
    "model_folder": "sources",
    "plan": "export",
}  # modules of slmake/ and the floor on which they stand
# Floor and the higher floor it imports -> why that is right.
EXCEPTIONS = {
    (
        "params",
        "sources",
    ): "a source is checked with params.yaml, before any job; parsing one needs the standard library only",
}


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions; names of a package count as its modules."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "slmake" or len(parts) == 1:
        return None
    floor = BESIDE.get(parts[1], parts[1])
    return floor if floor in FLOORS else None


def upward(root: Path) -> dict[tuple[str, str], set[str]]:
    """Imports of a higher floor: (floor, higher floor) -> the modules that do it."""
    upward: dict[tuple[str, str], set[str]] = {}
    for file in sorted((root / "slmake").rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        own = floor_of(module)
        for name in sorted(imported(file)):
            other = floor_of(name)
            if own and other and FLOORS.index(other) > FLOORS.index(own):
                upward.setdefault((own, other), set()).add(module)
    return upward


def test_no_floor_imports_a_higher_one():
    assert {pair: names for pair, names in upward(ROOT).items() if pair not in EXCEPTIONS} == {}


def test_exceptions_are_in_use_and_make_no_circle():
    for lower, higher in EXCEPTIONS:
        assert (lower, higher) in upward(ROOT), f"{lower} does not import {higher} any more: remove the exception"
        for file in (ROOT / "slmake" / higher).rglob("*.py"):
            assert lower not in {floor_of(name) for name in imported(file)}, file


def test_the_ground_imports_no_floor():
    for name in GROUND:
        file = ROOT / "slmake" / f"{name}.py"
        assert {floor_of(other) for other in imported(file)} <= {None}, file


def test_every_module_has_its_floor():
    """The lists have all modules and packages but olive, which only tools/import_olive.py uses."""
    slmake = ROOT / "slmake"
    assert {path.stem for path in slmake.glob("*.py")} == {*GROUND, *BESIDE, "__init__"}
    assert {path.parent.name for path in slmake.glob("*/__init__.py")} == {*FLOORS, "olive"}


def test_library_imports_neither_scripts_nor_tools_nor_bench():
    for file in (ROOT / "slmake").rglob("*.py"):
        above = {name for name in imported(file) if name.split(".")[0] in ("scripts", "tools", "bench", "tests")}
        assert not above, f"{file}: {above}"


def test_no_script_imports_another_script_or_a_tool():
    for file in (ROOT / "scripts").glob("*.py"):
        above = {name for name in imported(file) if name.split(".")[0] in ("scripts", "tools", "bench", "tests")}
        assert not above, f"{file}: {above}"


def test_an_import_of_a_higher_floor_is_seen(tmp_path):
    """Also inside a function; imports of lower floors are none."""
    for floor in ("data", "training"):
        (tmp_path / "slmake" / floor).mkdir(parents=True)
    (tmp_path / "slmake" / "data" / "rows.py").write_text("def f():\n    from slmake.training import trainer\n")
    (tmp_path / "slmake" / "training" / "trainer.py").write_text(
        "from slmake.data.rows import f\nimport slmake.params\n"
    )
    assert upward(tmp_path) == {("data", "training"): {"slmake.data.rows"}}
