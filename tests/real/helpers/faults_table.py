"""Write the figures of a fault campaign into docs/reliability.md: python tests/real/helpers/faults_table.py build/faults.jsonl"""

import json
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parents[3] / "docs" / "reliability.md"
ORDER = ("pull", "push", "publish", "fetch_model")  # pull meets every kind of fault, so its rows come first
BEGIN, END = "<!-- figures of `make faults` -->\n", "<!-- end -->\n"


def table(lines: list[dict]) -> str:
    """Markdown: one row per fault, one column per operation, and the sums."""
    operations = [name for name in ORDER if any(line["operation"] == name for line in lines)]
    cells = {(line["fault"], line["operation"]): line for line in lines}

    def cell(fault: str, operation: str) -> str:
        line = cells.get((fault, operation))
        if line is None:
            return ""
        return "finished when repeated" if line["stopped"] else "went through"

    rows = [
        f"| {fault} | " + " | ".join(cell(fault, operation) for operation in operations) + " |"
        for fault in dict.fromkeys(line["fault"] for line in lines)
    ]
    survived = sum(line["bytes_lost"] == line["bytes_wrong"] == 0 for line in lines)
    moved = sum(line["bytes"] for line in lines) / 1e6
    total = (
        f"{len(lines)} faults tried, {survived} survived; bytes lost: {sum(line['bytes_lost'] for line in lines)}, wrong bytes shown: "
        f"{sum(line['bytes_wrong'] for line in lines)}, of {moved:.0f} MB that were to be moved. {sum(line['hits'] for line in lines)} times "
        "the proxy cut a connection or answered with an error."
    )
    head = [f"| fault | {' | '.join(operations)} |", "|---" * (len(operations) + 1) + "|"]
    return "\n".join([total, "", *head, *rows]) + "\n"


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: ORDER.index(line["operation"]))  # stable: within an operation, faults as they were met
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table(lines) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
