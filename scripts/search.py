"""Choose among quantization candidates: the smallest or fastest that passes the gates on the tuning rows.

    python -m scripts.search --params params.yaml --reference build/search/merged --candidates build/search/0 build/search/1 \\
        --output results/search.json

Reads the sections `quantize` and `gates` and the candidates' measurements. Writes every candidate's options and
figures, the Pareto front, and the winner, which `quantize` then copies.
"""

from pathlib import Path

from slmake import cli, outputs, params
from slmake.scoring.selection import choose, overview


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="the merged model's measurements")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="folders of the candidates, in order")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the choice")
    args = parser.parse_args(argv)
    with cli.job("search", args.log) as job:
        everything = params.load(args.params)
        with outputs.written(files=[args.output]) as (target,):
            reference, *candidates = (
                outputs.read_json(folder / "measured.json", output=folder)
                for folder in (args.reference, *args.candidates)
            )
            for candidate in candidates:
                del candidate["figures_before"]  # the others' own
            result = choose(everything, reference, candidates)
            outputs.write_json(target, result)
        job.say(
            f"candidate {result['winner']} of {len(candidates)} is the {'smallest' if result['objective'] == 'size' else 'fastest'} that passes\n"
            + overview(result, everything.quantize)
        )


if __name__ == "__main__":
    main()
