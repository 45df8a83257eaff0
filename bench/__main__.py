"""Measure us and the peers in turn, and write docs/benchmarks.md.

    make bench                                        # everything: hours on a small machine
    make bench ONLY=merge                             # one benchmark; the others' results stay
    .venv/bin/python -m bench --only finetune --steps 12 --rounds 3
    .venv/bin/python -m bench --only                  # measure nothing: write the document from the results that are there

Results are kept as build/bench/NAME.json, one file per benchmark, and what the document shows of them in docs/benchmarks/results.json,
by machine: a long session can be done in pieces, and another machine adds its own. Every piece is a run side by side: only what ran
in the same rounds is compared. `python -m bench.cuda` measures a GPU by itself; the document shows its result, too.
"""

import argparse
import importlib
import sys
from pathlib import Path

from bench import document, measure, results

NAMES = (
    *("finetune", "packing", "instruction", "job", "noop", "merge", "quantize", "prepare", "inference", "serve"),
    "growth",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", choices=NAMES, default=list(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs (default: 3)")
    parser.add_argument(
        "--document",
        type=Path,
        default=measure.ROOT / "docs" / "benchmarks.md",
        help="file whose generated part is replaced (default: docs/benchmarks.md)",
    )
    modules = {name: importlib.import_module(f"bench.{name}") for name in NAMES}
    for module in modules.values():
        module.options(parser)
    args = parser.parse_args(argv)
    failed = []
    for name in args.only:
        measure.say(f"{name} begins")
        machine = measure.machine()
        try:
            result = modules[name].bench(args)
        except measure.BenchError as error:
            print(f"bench: {name}: error: {error}", file=sys.stderr)
            failed.append(name)
            continue
        result = {"bench": name, "machine": machine, "versions": measure.versions(), **result}
        results.save(measure.SCRATCH / f"{name}.json", result)
    print(document.write([*NAMES, "cuda"], measure.SCRATCH, args.document))
    if failed:
        print(f"bench: failed: {', '.join(failed)}. The messages are above.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
