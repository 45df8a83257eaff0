"""Export a model folder to ONNX with the ONNX Runtime GenAI model builder, and prove that the export works.

    python -m scripts.quantize --params params.yaml --model build/merged --dataset build/dataset --output build/onnx-int4

Reads the section `quantize` and a model folder in Hugging Face layout. Writes what onnxruntime-genai loads: model.onnx,
model.onnx.data, genai_config.json and the tokenizer; and the dataset's prompt.json, by which the model is asked when the dataset
is another one already. The builder ignores options it does not know and can write graphs that do not load, both with exit code 0; so
the written graph is compared with what was asked for, and the model is loaded and made to generate before the output counts as built.
"""

import json
import shutil
from pathlib import Path

from slmake import cli, outputs, params
from slmake.errors import UserError
from slmake.export import proposals
from slmake.export.build import build
from slmake.export.graph_checks import check_generates, check_graph
from slmake.prompts import load_prompt


def copy_winner(search: Path, candidates: Path, folder: Path) -> dict:
    """Copy the winner of a search into an empty folder; returns its options."""
    result = outputs.read_json(search, "winner", "options")
    source = candidates / str(result["winner"]) / "model"
    if not source.is_dir():
        raise UserError(
            f"{source}: the winner of {search} is not there. Build it with `snakemake --cores all {search}`."
        )
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return result["options"]


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder in Hugging Face layout")
    parser.add_argument(
        "--dataset", type=Path, help="the tokenized dataset's folder (for calibration, and prompt.json)"
    )
    parser.add_argument("--search", type=Path, help="search.json: copy its winner instead of building")
    parser.add_argument("--candidates", type=Path, help="folder of the search's candidates")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the ONNX model to")
    args = parser.parse_args(argv)
    with cli.job("quantize", args.log) as job:
        section = params.section(args.params, "quantize")
        with outputs.written(args.output) as (folder,):
            if args.search:
                options = copy_winner(args.search, args.candidates, folder)
                section = proposals.applied(section, options)
                summary = check_graph(section, folder) | {"runs_on": check_generates(folder).runs_on}
            else:
                summary = build(section, args.model, args.dataset, folder, outputs.scratch(folder), job)
            if args.dataset:
                outputs.write_json(folder / "prompt.json", load_prompt(args.dataset))
            job.log(f"graph: {json.dumps(summary)}")
        products = [f"{count} products in {bits} bits" for bits, count in summary["quantized_matmuls_by_bits"].items()]
        size = f"{outputs.folder_size(args.output) / 1e6:.0f} MB"
        job.say(
            f"{args.output} loads and generates ({section.precision}: {', '.join(products) or 'not quantized'}; {size}, {job.seconds():.0f} s)"
        )
        if summary["runs_on"] != section.execution_provider:
            job.say(
                f"{section.execution_provider} is not available here: the export was checked on {summary['runs_on']}, not on its target"
            )


if __name__ == "__main__":
    main()
