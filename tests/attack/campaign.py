"""Attack a tiny project for some minutes, and write what was tried into docs/reliability.md.

    python tests/attack/campaign.py --seconds 600 --seed 7

Kills of the whole process tree at random moments of every rule and of the recording of receipts, edits during builds, edited
packages, sources with secrets, hostile models. After each: no wrong bytes, nothing lost, no secret repeated, no foreign code run,
and the first rerun works. The same seed tries the same things; the moments of kills differ with the machine's speed.
Exit code 1 if something does not hold; each failure is printed with the seed that repeats it: `--only kind --case NUMBER`.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = str(ROOT)

import inputs  # noqa: E402
import kills  # noqa: E402
import preloaded  # noqa: E402
from project import new_project, run, snakemake  # noqa: E402
from tiny import make_model  # noqa: E402

DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures of `make attack` -->\n", "<!-- end of `make attack` -->\n"
# Kind, share of the time, and what it is.
KINDS = {
    "kill a rule": 0.65,
    "kill the recording": 0.12,
    "edit during a build": 0.1,
    "hostile model": 0.1,
    "edited package": 0.03,
    "source with a secret": 0.0001,
}


class Campaign:
    """A tiny project that was built and recorded, the attacks on copies of it, and their figures."""

    def __init__(self, folder: Path, whole: Path, seed: int):
        self.work, self.whole, self.seed = folder / "work", whole, seed
        self.reference = kills.seen(whole)
        self.durations: dict[str, float] = {}  # of commands, learned on the way
        self.spent: collections.Counter = collections.Counter()  # seconds by kind
        self.cases: collections.Counter = collections.Counter()
        self.kills: collections.Counter = collections.Counter()
        self.rules: collections.Counter = collections.Counter()  # kills by rule
        self.failures: list[str] = []

    def attack(self, kind: str, case: int) -> None:
        """Try one thing; a failure is kept with what repeats it."""
        rng = random.Random(f"{self.seed} {kind} {case}")
        begun = time.monotonic()
        try:
            match kind:
                case "kill a rule":
                    rule = list(kills.OUTPUTS)[(case + self.seed) % len(kills.OUTPUTS)]
                    number = kills.kill_rule(rule, self.whole, self.reference, self.work, rng, self.durations)
                    self.kills[kind] += number
                    self.rules[rule] += number
                case "kill the recording":
                    self.kills[kind] += kills.kill_record(self.whole, self.work, rng, self.durations)
                case "edit during a build":
                    kills.edit_build(self.whole, self.work, rng)
                case "hostile model":
                    inputs.hostile_model(self.whole, self.work, rng)
                case "edited package":
                    inputs.edit_package(self.whole, self.work, rng)
                case "source with a secret":
                    inputs.secret_source(rng)
        except (kills.Failed, subprocess.SubprocessError) as failure:
            self.failures.append(f"{kind} (--seed {self.seed} --only '{kind}' --case {case}): {failure}")
            print(f"FAILED {self.failures[-1]}", flush=True)
        self.cases[kind] += 1
        self.spent[kind] += time.monotonic() - begun

    def run(self, seconds: float) -> None:
        """Try kinds in turn, each for its share of the time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            kind = min(KINDS, key=lambda kind: self.spent[kind] / KINDS[kind])
            self.attack(kind, self.cases[kind])

    def table(self) -> str:
        """Markdown: what was tried and what came of it."""
        failed = collections.Counter(failure.partition(" (")[0] for failure in self.failures)
        rows = [
            f"| {kind} | {self.cases[kind]} | {self.kills[kind] or ''} | {failed[kind]} |"
            for kind in KINDS
            if self.cases[kind]
        ]
        total = (
            f"Seed {self.seed}, {sum(self.spent.values()):.0f} s: {sum(self.cases.values())} cases with {sum(self.kills.values())} kills; "
            f"{len(self.failures)} failures (wrong bytes, something lost, a rerun that fails, a secret repeated, foreign code run)."
        )
        by_rule = f"Kills by rule: {', '.join(f'{rule} {count}' for rule, count in self.rules.items())}." * bool(
            self.rules
        )
        return (
            "\n".join(
                [
                    *textwrap.wrap(total, 116),
                    *textwrap.wrap(by_rule, 116),
                    "",
                    "| attack | cases | kills | failures |",
                    "|---|---|---|---|",
                    *rows,
                ]
            )
            + "\n"
        )


def built(folder: Path) -> Path:
    """A tiny project, built and recorded as `make` does."""
    base = make_model(folder / "base", tie_word_embeddings=True)
    project = new_project(folder / "whole", base)
    commands = ["git init -q", "dvc init -q", "dvc config core.analytics false", "dvc config core.autostage false"]
    commands.append("python -m slmake.platforms.dvc_yaml")
    for command in commands:
        done = run(project, *command.split())
        assert done.returncode == 0, done.stdout
    for done in (snakemake(project), run(project, sys.executable, "-m", "tools.record")):
        assert done.returncode == 0, done.stdout
    return project


def publish(table: str) -> None:
    """Put the figures into docs/reliability.md."""
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long to attack, without the first build")
    parser.add_argument("--seed", type=int, help="repeat a campaign (default: another each time)")
    parser.add_argument("--only", choices=KINDS, help="one kind of attack")
    parser.add_argument("--case", type=int, help="one case of it: repeats a failure")
    parser.add_argument("--project", type=Path, help="a built and recorded tiny project (default: builds one)")
    parser.add_argument("--document", action="store_true", help="write the figures into docs/reliability.md")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = random.randrange(10**6) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory(prefix="slmake-attack-") as folder:
        print(f"attack: seed {seed}", flush=True)
        preloaded.FOLDER = Path(folder) / "programs"
        campaign = Campaign(Path(folder), args.project or built(Path(folder)), seed)
        with contextlib.suppress(KeyboardInterrupt):
            if args.case is not None:
                campaign.attack(args.only, args.case)
            else:
                shares = {args.only: 1.0} if args.only else dict(KINDS)
                KINDS.clear()
                KINDS.update(shares)
                campaign.run(args.seconds)
    print(campaign.table())
    if args.document:
        publish(campaign.table())
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
