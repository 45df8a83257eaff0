"""Snakemake's events as lines for a person: starts with their reasons, and what ends a run that failed."""

import io
import json
import logging
from pathlib import Path

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

from slmake.code_inputs import code, digest
from slmake.plan import LOCKS
from slmake.platforms.screen import Screen, target, why

OLD, OTHER = "0" * 64, "1" * 64


@pytest.fixture
def screen(tmp_path, monkeypatch):
    """A screen in a folder where merge has run before."""
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    Path("logs/merge.log").touch()
    return Screen(io.StringIO())


def send(screen: Screen, event: LogEvent | None, message: str = "", level: int = logging.INFO, **facts: object) -> None:
    """One of Snakemake's events."""
    screen.emit(logging.makeLogRecord({"event": event, "msg": message, "levelno": level, **facts, **named(level)}))


def named(level: int) -> dict:
    return {"levelname": logging.getLevelName(level)}


def start(screen: Screen, rule: str, job: int, output: str, reason: str) -> None:
    send(screen, LogEvent.JOB_INFO, rule_name=rule, jobid=job, output=[output], log=[f"logs/{rule}.log"], reason=reason)


def params(before: dict, now: dict) -> str:
    """Snakemake's text for params that changed: Python literals in no order, then those of now."""
    old, new = (f"{json.dumps(value)!r},'{OLD}'" for value in (before, now))
    return f"Params have changed since last execution: Union of … output: before: {old} now: {new} "


def test_a_rule_that_starts_is_one_line_with_its_reason(screen):
    send(screen, LogEvent.RUN_INFO, stats={"merge": 1, "finetune": 1, "all": 1, "total": 3})
    start(screen, "finetune", 2, "build/adapter", "Missing output files: build/adapter")
    send(screen, LogEvent.SHELLCMD, "python -m scripts.finetune")
    send(screen, LogEvent.JOB_FINISHED, job_id=2)
    start(screen, "merge", 1, "build/merged", "Input files updated by another job: build/adapter")
    send(screen, LogEvent.JOB_INFO, rule_name="all", jobid=0, output=[], log=[], reason="")
    assert screen.stream.getvalue().splitlines() == [
        "[1/2] finetune → build/adapter (first build)",
        "[2/2] merge → build/merged (new build/adapter)",
    ]
    assert screen.running == {1}
    assert screen.ending() == []


def test_a_verbose_screen_only_counts():
    screen = Screen(io.StringIO(), verbose=True)
    assert not screen.writes_to_stream  # Snakemake's own handler stays
    start(screen, "merge", 1, "build/merged", "Forced execution")
    assert (screen.started, screen.stream.getvalue()) == (1, "")
    assert Screen(io.StringIO()).writes_to_stream


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (
            "Missing output files: build/adapter, results/eval_loss.csv",
            "build/adapter, results/eval_loss.csv is missing",
        ),
        ("Updated input files: data/base", "data/base changed"),
        ("Input files updated by another job: d, c, b, a", "new a and 3 more"),
        ("Set of input files has changed since last execution", "other inputs"),
        ("Code has changed since last execution", "its rule in the Snakefile changed"),
        ("Forced execution", "forced"),
        ("Something that Snakemake may say one day", "out of date"),
        (params({"lora_r": 8, "seed": 1}, {"lora_r": 16, "seed": 1}), "lora_r changed"),
        (params({"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 2, "b": 2, "c": 2, "d": 2}), "a and 3 more changed"),
        (params({"template": "it's {text}\n"}, {"template": 'it\'s "{text}"\n'}), "template changed"),
        (params({"template": "x now: '{y}"}, {"template": "x now: '{z}"}), "template changed"),
        (f"Updated input files: x; {params({'seed': 1}, {'seed': 2})}", "seed changed, x changed"),
    ],
)
def test_reasons_are_a_few_words(reason, words):
    assert why("finetune", reason) == words


def test_code_and_source_files_are_told_apart():
    """By the digest of the rule's code as it is now; several digests may stand in one text."""
    own = digest([*code("finetune"), *LOCKS])
    text = "Params have changed since last execution: before: '{}' now: '{}'"
    assert why("finetune", text.format(OLD, own)) == "code changed"
    assert why("finetune", text.format(OLD, OTHER)) == "source files changed"
    assert why("finetune", text.format(OLD + OTHER, own + OTHER)) == "code changed"
    assert why("finetune", text.format(own + OLD, own + OTHER)) == "source files changed"
    assert why("finetune", text.format(OLD, "--dataset build/dataset")) == "its options changed"


def test_a_rule_is_shown_with_what_it_builds():
    assert target(["build/adapter", "results/train_loss.csv"]) == "build/adapter"
    assert target(["results/metrics.json", "results/benchmark.json"]) == "results/metrics.json"
    assert target(["build/report/overview.html", "build/report/loss.svg"]) == "build/report"
    assert target(["build/search/3"]) == "build/search/3"


def fail(screen: Screen, rule: str, job: int) -> list[str]:
    send(
        screen, LogEvent.JOB_ERROR, "Error in rule", logging.ERROR, rule_name=rule, jobid=job, log=[f"logs/{rule}.log"]
    )
    send(screen, None, "Exiting because a job execution failed.", logging.ERROR)
    return screen.ending()


def test_a_failure_ends_with_the_place_of_its_log(screen):
    """Its message is on the terminal already, as the last thing that was written."""
    start(screen, "merge", 1, "build/merged", "Forced execution")
    Path("logs/merge.log").write_text("loading\nerror: the adapter is damaged.\n")
    assert fail(screen, "merge", 1) == ["build: merge failed; its log: logs/merge.log"]


def test_a_message_is_repeated_where_another_rule_wrote_after_it(screen):
    start(screen, "report", 2, "build/report", "Forced execution")
    start(screen, "gates", 1, "results/gates.json", "Forced execution")
    Path("logs/gates.log").write_text("error: of an earlier line\nmore\nerror: 1 of 2 gates missed.\n  MISSED  f1\n")
    assert fail(screen, "gates", 1) == [
        "gates: error: 1 of 2 gates missed.\n  MISSED  f1",
        "build: gates failed; its log: logs/gates.log",
    ]


@pytest.mark.parametrize("text", [None, "", "loading\nan error: in the middle of a line\n"])
def test_a_rule_that_was_killed_leaves_no_message(screen, text):
    if text is not None:
        Path("logs/finetune.log").write_text(text)
    start(screen, "finetune", 1, "build/adapter", "Forced execution")
    assert fail(screen, "finetune", 1) == [
        "finetune: error: it ended without a message: the system may have killed it, most often for lack of memory.",
        "build: finetune failed; its log: logs/finetune.log",
    ]


def test_a_problem_before_any_rule_is_shown_without_snakemake_s_places(screen):
    message = 'WorkflowError in file "/p/rules/common.smk", line 46:\nparams.yaml: 1 error.\n  a.b: unknown name.\n'
    send(screen, LogEvent.ERROR, message + '  File "/p/rules/common.smk", line 46, in <module>', logging.ERROR)
    assert screen.ending() == ["build: error: params.yaml: 1 error.\n  a.b: unknown name."]


def test_a_lock_that_a_killed_build_left_can_be_removed(screen):
    message = "Error: Directory cannot be locked.\nIt can be removed with the --unlock argument."
    send(screen, LogEvent.ERROR, message, logging.ERROR)
    assert screen.ending() == [
        "build: error: Directory cannot be locked.\nIt can be removed with `.venv/bin/snakemake --unlock`."
    ]


def test_an_interrupted_run_names_the_way_on(screen):
    with pytest.raises(KeyboardInterrupt):
        screen.interrupt(2, None)
    assert screen.ending() == [
        "build: interrupted. Run the same command again: it resumes after the last finished rule."
    ]
