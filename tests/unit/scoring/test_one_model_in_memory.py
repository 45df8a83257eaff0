"""evaluate has one model in memory at a time."""

import weakref
from pathlib import Path
from types import SimpleNamespace

from slmake import cli, params
from slmake.scoring import measure

ALIVE: dict[str, weakref.ref] = {}
SEEN: list[set[str]] = []  # models in memory when the next one was made


class Runner:
    """Stands for either runner."""

    def __init__(self, folder: Path, *arguments):
        SEEN.append({name for name, model in ALIVE.items() if model() is not None})
        self.model = SimpleNamespace(runs_on="cpu", provider="cuda")
        ALIVE[folder.name] = weakref.ref(self)

    def add_adapter(self, folder: Path, quantized) -> None:
        pass

    def ask(self, questions, new_tokens, job, name, rows=None):
        return SimpleNamespace(timings={})


def test_each_model_is_freed_before_the_next_is_loaded(monkeypatch):
    monkeypatch.setattr(measure, "OnnxRunner", Runner)
    monkeypatch.setattr(measure, "TransformersRunner", Runner)
    monkeypatch.setattr(measure.tokenizers, "compare", lambda *arguments: {"rows": 2})
    monkeypatch.setattr(measure, "_tokenizer", lambda *arguments: None)
    folders = {name: Path(name) for name in ("base", "merged", "int4")}
    job = cli.Job("evaluate", None, None)
    runs, facts = measure.ask_all(params.Evaluate(), folders, "int4", None, None, 4, job)
    assert list(runs) == ["base", "merged", "int4"]
    assert facts == {"tokenizer": {"rows": 2}, "provider": {"exported_for": "cuda", "scored_on": "cpu"}}
    assert len(SEEN) == 3
    assert not any(SEEN)


def test_an_adapter_is_never_put_on_another_base_than_its_own(monkeypatch):
    SEEN.clear()
    monkeypatch.setattr(measure, "TransformersRunner", Runner)
    job = cli.Job("evaluate", None, None)
    for own, loaded in (("base", 1), ("other", 2)):
        folders = {"base": Path("base"), "adapter": Path("adapter"), "adapter_base": Path(own)}
        measure.ask_all(params.Evaluate(), folders, "int4", None, None, 4, job)
        assert len(SEEN) == loaded
        assert not any(SEEN)
        SEEN.clear()
