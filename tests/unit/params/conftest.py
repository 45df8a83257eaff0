"""Fixtures of the tests of params.yaml."""

import copy
from pathlib import Path

import pytest
import yaml

from slmake import params
from slmake.errors import UserError

SMALLEST = {
    "fetch_model": {"source": "models/tiny"},
    "prepare": {"source": "data/rows.json", "text_template": "{phrase}\n{tone}"},
}


@pytest.fixture
def write(tmp_path):
    """A params.yaml with the smallest valid content and `section={field: value}` on top."""

    def made(**sections) -> Path:
        content = copy.deepcopy(SMALLEST)
        for name, fields in sections.items():
            if isinstance(fields, dict):
                content.setdefault(name, {}).update(fields)
            else:
                content[name] = fields
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return made


@pytest.fixture
def mistakes(write):
    """The lines of the error that a file with these sections is refused with; the first line is checked here."""

    def lines(**sections) -> list[str]:
        path = write(**sections)
        with pytest.raises(UserError) as refused:
            params.load(path)
        first, *rest = str(refused.value).splitlines()
        count = f"{len(rest)} error{'s' if len(rest) > 1 else ''}"
        assert first == f"{path}: {count}; nothing was run. See docs/params.md."
        assert all(line.startswith("  ") for line in rest)
        return [line[2:] for line in rest]

    return lines


@pytest.fixture
def refused_text(tmp_path):
    """The message that a file of this text is refused with, without its path."""

    def run(content: str | bytes) -> str:
        path = tmp_path / "params.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as refused:
            params.load(path)
        message = str(refused.value)
        assert message.startswith(f"{path}: ")
        return message.removeprefix(f"{path}: ")

    return run
