"""Which files, and which splits of a dataset on the hub, the section `prepare` of params.yaml names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the section's own checks ask here
    from slmake.params.prepare import Prepare


def source_files(section: Prepare) -> dict[str, str]:
    """The source of each split that has one."""
    given = {"train": section.source} if isinstance(section.source, str) else section.source.model_dump()
    if isinstance(section.source, str) and _names_splits(section):
        given = {name: section.source for name, part in section.split if part}
    return {name: file for name, file in given.items() if file}


def hub_split(section: Prepare, name: str) -> str | None:
    """Which rows of a dataset on the hub are for train, eval or test."""
    if _names_splits(section):
        return getattr(section.split, name)
    return (section.split or "train") if name == "train" else None


def _names_splits(section: Prepare) -> bool:
    return not isinstance(section.split, str | None)
