"""Show a row of the dataset as the model sees it: what is trained, special tokens, counts, and what was cut.

    python -m tools.preview --row 3            row 3 of the source file, every sequence that it became
    python -m tools.preview --row 3 --tokens   the same as a table of token ids

Reads the prepared dataset and the base model's tokenizer. Trained text is green, special tokens are inverted; where colours are not
shown (a pipe, NO_COLOR), trained text stands between ⟦ and ⟧.
"""

import os
import sys
from itertools import groupby
from pathlib import Path

from slmake import cli
from slmake.data.preview import Piece, Sequence, pieces, sequences
from slmake.data.tokenize import load_tokenizer
from slmake.errors import UserError
from slmake.text import printable

TRAINED, SPECIAL, QUIET, RESET = "\033[32m", "\033[7m", "\033[2m", "\033[0m"


def shown(parts: list[Piece], colours: bool) -> str:
    """The text of some pieces."""
    lines = []
    for trained, group in groupby(parts, lambda piece: piece.trained):
        text = ""
        for special, inner in groupby(group, lambda piece: piece.special):
            part = printable("".join(piece.text for piece in inner))
            text += f"{SPECIAL}{part}{RESET}{TRAINED if trained else ''}" if special and colours else part
        lines.append((f"{TRAINED}{text}{RESET}" if colours else f"⟦{text}⟧") if trained else text)
    return "".join(lines)


def table(parts: list[Piece], colours: bool) -> str:
    """A line for each piece: position, ids, text."""
    lines, position = [], 0
    for piece in parts:
        line = f"{position:6}  {' '.join(map(str, piece.ids)):>8}  {'trained' if piece.trained else '       '}  {piece.text!r}"
        lines.append(f"{TRAINED}{line}{RESET}" if piece.trained and colours else line)
        position += len(piece.ids)
    return "\n".join(lines)


def write(sequence: Sequence, tokenizer, tokens: bool, colours: bool) -> None:
    parts = list(pieces(tokenizer, sequence.ids, sequence.labels))
    title = sequence.summary()
    print(f"{QUIET}{title}{RESET}" if colours else title)
    print((table if tokens else shown)(parts, colours) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--row", type=int, help="number of a row in its source file, from 1 (default: the first of train)"
    )
    parser.add_argument("--tokens", action="store_true", help="token ids beside the text")
    parser.add_argument("--dataset", type=Path, default=Path("build/dataset"), help="the prepared dataset's folder")
    parser.add_argument("--base", type=Path, default=Path("build/base"), help="the base model's folder")
    args = parser.parse_args(argv)
    with cli.job("preview", args.log):
        tokenizer = load_tokenizer(args.base)
        if not args.dataset.is_dir():
            raise UserError(f"{args.dataset}: no dataset here. Build it with `snakemake --cores all {args.dataset}`.")
        colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        count = 0
        for sequence in sequences(args.dataset, tokenizer, args.row):
            write(sequence, tokenizer, args.tokens, colours)
            count += 1
            if args.row is None:
                break
        if not count:
            raise UserError(
                f"row {args.row} is in no split of {args.dataset}: it does not exist, repeats a held-out row, or was not sampled "
                "(prepare.max_samples)."
            )


if __name__ == "__main__":
    main()
