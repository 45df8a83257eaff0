"""Snakemake's events as a few lines: which rule starts and why, what failed, and where its log is.

Snakemake hands its events to the handlers of logger plugins; `run` registers this one for the time of a call, so there is no package to
install. The rules' scripts write their progress bars and results to the terminal themselves.
"""

import ast
import contextlib
import io
import json
import logging
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from slmake.code_inputs import code, digest, rule_digest
from slmake.plan import LOCKS

NO_MESSAGE = "it ended without a message: the system may have killed it, most often for lack of memory."
# All of Snakemake's reasons to run a rule again, also where a user's own profile chooses fewer.
TRIGGERS = ["--rerun-triggers", "code", "input", "mtime", "params", "software-env"]
PARAMS = "Params have changed since last execution: "
CAUSES = {  # how Snakemake's other reasons begin: in a few words
    "Missing output files: ": "{} is missing",
    "Incomplete output files: ": "{} is incomplete",
    "Updated input files: ": "{} changed",
    "Input files updated by another job: ": "new {}",
    "Set of input files has changed": "other inputs",
    "Code has changed": "its rule in the Snakefile changed",
    "Forced execution": "forced",
}


class Screen(LogHandlerBase):
    """A handler of Snakemake's events that writes to `stream`; after a run it knows what ran and what failed."""

    writes_to_stream = has_filter = has_formatter = True
    writes_to_file = needs_rulegraph = False

    def __init__(self, stream: TextIO, verbose: bool = False):
        """`verbose`: Snakemake writes all of its events itself, and the screen only counts them."""
        super().__init__(None, None)
        self.stream, self.writes_to_stream = stream, not verbose
        self.built_before = set(Path("logs").glob("*.log"))
        self.total = self.started = 0
        self.running: set[int] = set()
        self.failures: list[tuple[str, Path, bool]] = []  # rule, log, whether other rules wrote after its message
        self.problems: list[str] = []  # what ended the run outside of any rule
        self.interrupted = False

    def emit(self, record) -> None:
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self.total = record.stats["total"] - record.stats.get("all", 0)
        elif event == LogEvent.JOB_INFO and record.rule_name != "all":
            self.started += 1
            self.running.add(record.jobid)
            first = not self.built_before.intersection(map(Path, record.log))
            cause = "first build" if first else why(record.rule_name, record.reason)
            if self.writes_to_stream:
                self.write(f"[{self.started}/{self.total}] {record.rule_name} → {target(record.output)} ({cause})")
        elif event == LogEvent.JOB_FINISHED:
            self.running.discard(record.job_id)
        elif event == LogEvent.JOB_ERROR:
            self.running.discard(record.jobid)
            self.failures.append((record.rule_name, Path(record.log[0]), bool(self.running)))
        elif event in (None, LogEvent.ERROR) and record.levelname == "ERROR":
            self.problems.append(without_location(record.getMessage()))

    def write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def interrupt(self, signum, frame) -> None:
        """Handle SIGINT: Snakemake ends its jobs on a KeyboardInterrupt."""
        self.interrupted = True
        raise KeyboardInterrupt

    def ending(self) -> list[str]:
        """The last lines of a run that failed: messages first, then where the logs are."""
        if self.interrupted:
            return ["build: interrupted. Run the same command again: it resumes after the last finished rule."]
        if not self.failures:
            return [f"build: error: {problem}" for problem in self.problems]
        lines = []
        for rule, log, repeat in self.failures:
            message = error_in(log)
            if repeat or not message:
                lines.append(f"{rule}: error: {message or NO_MESSAGE}")
        return [*lines, *(f"build: {rule} failed; its log: {log}" for rule, log, _ in self.failures)]


def run(screen: Screen, targets: Iterable[str]) -> bool:
    """Run `snakemake --cores all` on targets, its events handed to `screen`; whether all of them are built."""
    # Snakemake opens its own files with smart_open, which imports Azure's whole SDK for that: a third of a start with nothing to do.
    sys.modules.setdefault("smart_open.azure", None)
    logging.raiseExceptions = False  # where Snakemake's own log is on a full disk, what failed is said in words
    from snakemake.cli import args_to_api, parse_args
    from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry
    from snakemake_interface_logger_plugins.registry.plugin import Plugin

    LoggerPluginRegistry().plugins["screen"] = Plugin(
        _name="screen", log_handler=lambda *settings: screen, _logger_settings_cls=None
    )
    with contextlib.redirect_stderr(io.StringIO()):  # it names the profile that it reads
        parser, arguments = parse_args(["--cores", "all", "--logger", "screen", *TRIGGERS, "--", *targets])
    previous = signal.signal(signal.SIGINT, screen.interrupt)
    try:
        return args_to_api(arguments, parser)
    except KeyboardInterrupt:
        return False
    finally:
        signal.signal(signal.SIGINT, previous)


def target(outputs: list[str]) -> str:
    """What a rule builds, by its first output; of the report's many files, their folder."""
    folder = Path(outputs[0]).parent
    return str(folder) if len(outputs) > 1 and folder.name not in ("build", "results") else outputs[0]


def why(rule: str, reason: str) -> str:
    """Snakemake's reason for running a rule again, in a few words."""
    reason, _, changed = reason.partition(PARAMS)
    causes = changes(rule, changed) if changed else []
    for part in reason.split("; "):
        for start, words in CAUSES.items():
            if part.startswith(start):
                causes.append(words.format(listed(sorted(part.removeprefix(start).split(", ")))))
    return ", ".join(dict.fromkeys(causes)) or "out of date"


def changes(rule: str, changed: str) -> list[str]:
    """What changed among a rule's params: fields of params.yaml, its code, or the content of source files.

    Args:
        changed: Snakemake's text, the values of before and those of now as Python literals.
    """
    tokens = re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"| now: ", changed)
    border = tokens.index(" now: ")
    old, new = (list(map(ast.literal_eval, literals)) for literals in (tokens[:border], tokens[border + 1 :]))
    causes = []
    was, now_is = fields(old), fields(new)
    if was != now_is:
        names = [name for name in now_is if was.get(name, ...) != now_is[name]]
        causes.append(f"{listed(names) or 'params.yaml'} changed")
    digests = sha256s(new) - sha256s(old)
    known = {rule_digest(rule): "its rule in the Snakefile changed", digest([*code(rule), *LOCKS]): "code changed"}
    causes += [words for own, words in known.items() if own in digests]
    if digests - known.keys():
        causes.append("source files changed")
    return causes or ["its options changed"]


def sha256s(texts: list[str]) -> set[str]:
    """The SHA-256 digests among texts; a text may be several, one behind the other."""
    return {each for text in texts if re.fullmatch(r"[0-9a-f]+", text) for each in re.findall(r"[0-9a-f]{64}", text)}


def fields(texts: list[str]) -> dict[str, object]:
    """The fields of sections of params.yaml, which are JSON objects, one or several in a text."""
    decoder, merged = json.JSONDecoder(), {}
    for text in (text for text in texts if text.startswith("{")):
        end = 0
        while end < len(text):
            section, end = decoder.raw_decode(text, end)
            merged |= section if isinstance(section, dict) else {}
    return merged


def listed(names: list[str]) -> str:
    """Up to three names in full."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def error_in(log: Path) -> str:
    """The message with which a script ended, from its log; empty if it wrote none."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    _, start, message = f"\n{text}".rpartition("\nerror: ")
    return message.strip() if start else ""


def without_location(message: str) -> str:
    """An exception's message without the lines about Snakemake's own files, for a person who called `make`."""
    lines = [line for line in message.strip().splitlines() if not re.match(r'  File ".*", line \d+', line)]
    text = "\n".join(lines[1:] if len(lines) > 1 and re.match(r"\w+( in .*)?:$", lines[0]) else lines)
    return text.removeprefix("Error: ").replace("the --unlock argument", "`.venv/bin/snakemake --unlock`")
