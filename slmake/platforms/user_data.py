"""Data that users keep with DVC: what their `.dvc` files name, and what their own stages of dvc.yaml write. No rule can build it again."""

from pathlib import Path

from slmake.errors import UserError
from slmake.platforms.dvc import cached, changed, md5, objects, status, tracked
from slmake.platforms.dvc_yaml import is_ours
from slmake.platforms.origins import compared


def kept_by() -> dict[str, str]:
    """What keeps each path of such data, as in `status`: a `.dvc` file, or a stage.

    Raises:
        StatusError: DVC cannot read one of them.
    """
    return {out["path"]: out["stage"] for out in tracked() if not is_ours(out["stage"], out)}


def edited(found: dict[str, list[str | dict]]) -> list[tuple[str, str]]:
    """Paths of data that differs from what was recorded, each with what keeps it, according to `status`."""
    kept = kept_by()
    outs = [(path, how, name) for name in found for path, how in changed(found[name], "outs").items()]
    differ = [out for out in outs if kept.get(out[0]) == out[2]]
    return [(path, name) for path, _, name in compared(differ) if Path(path).exists()]


def unkept(found: dict[str, list[str | dict]]) -> list[tuple[str, str]]:
    """Those of `edited` whose present content is not in DVC's cache: overwriting them would destroy it."""
    return [
        (path, name)
        for path, name in edited(found)
        if not all(cached(md5(file)).is_file() for file in [Path(path), *Path(path).rglob("*")] if file.is_file())
    ]


def refuse_unshared() -> None:
    """Raise UserError for what `push: false` keeps from every remote, where DVC's cache here lacks it: nothing brings it."""
    for out in (out for out in tracked() if out["only_here"] and out["md5"] and not is_ours(out["stage"], out)):
        if not in_cache(out):
            first = "bring it here as it was recorded, then " if out["stage"].endswith(".dvc") else ""
            raise UserError(
                f"{out['path']}: DVC's cache here lacks it, and `push: false` keeps it from every remote. To have it, {first}"
                f"`{recording(out['path'], out['stage'])}`; then the same command again."
            )


def in_cache(out: dict) -> bool:
    """Whether DVC's cache on this disk has all of an output, of those that `tracked` gives with their `md5`."""
    return all(cached(name).is_file() for name in objects(out["md5"]))


def kept_again(out: dict) -> str:
    """What puts an output into DVC's cache again, of those that `tracked` gives: a sentence without its full stop, with the command."""
    name = out["stage"]
    if is_ours(name, out):
        return "`make` puts it into the cache again"
    if any(path == out["path"] for path, _ in edited(status(*(() if ":" in name else (name,))))):
        return f"What is here is another version, which `{recording(out['path'], name)}` would record in its place"
    return f"`{recording(out['path'], name)}` puts it into the cache again"


def recording(path: str, name: str) -> str:
    """The command that records a path as it is, by what keeps it; where a stage's output is gone, the one that makes it again."""
    if name.endswith(".dvc"):
        return f".venv/bin/dvc add {path}"
    return f".venv/bin/dvc {'commit --force' if Path(path).exists() else 'repro'} {name}"
