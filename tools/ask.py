"""Ask the exported model, with the template it was trained on.

    python -m tools.ask "I never thought I'd see you again!"

Reads the ONNX model and prompt.json of the dataset. Prints the answer and its latency; imports onnxruntime-genai only.
"""

import json
import time
from pathlib import Path

from slmake import cli, generation, prompts
from slmake.errors import UserError
from slmake.outputs import read_json


def ask(model_folder: Path, form: dict, values: dict[str, str], new_tokens: int) -> tuple[str, float]:
    """The greedy answer to one row of fields, and its latency in milliseconds (after the model is loaded).

    Raises:
        UserError: no model there, ONNX Runtime cannot load it, or the text is too long for it.
    """
    if not (model_folder / "genai_config.json").exists():
        raise UserError(f"{model_folder}: no exported model. Build it with `make` or `snakemake --cores all`.")
    import numpy as np

    model, tokenizer = generation.load(model_folder)
    ids = tokenizer.encode(form["prompt"].format(**values))
    room = read_json(model_folder / "genai_config.json", "model", output=model_folder)["model"]["context_length"]
    if len(ids) + new_tokens > room:
        raise UserError(
            f"the text is too long: {len(ids)} tokens with the template, and {new_tokens} for the answer; the model reads {room}."
        )
    start = time.perf_counter()
    made = [token for token in generation.greedy(model, ids, new_tokens) if token != form["end_token_id"]]
    milliseconds = 1000 * (time.perf_counter() - start)
    return tokenizer.decode(np.array(made, dtype=np.int32)).strip(), milliseconds


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("text", help="the text to ask about; for a template with several fields, a JSON object of them")
    parser.add_argument("--model", type=Path, help="the exported model's folder (default: the one params.yaml builds)")
    parser.add_argument("--dataset", type=Path, default=Path("build/dataset"), help="folder with prompt.json")
    parser.add_argument(
        "--max-new-tokens", type=int, help="generation length (default: the longest answer in the data)"
    )
    args = parser.parse_args(argv)
    with cli.job("ask", args.log):
        if not args.text.strip():
            raise UserError('no text. Write: make ask TEXT="I never thought I\'d see you again!"')
        model = args.model
        if model is None:
            from slmake import params

            model = Path(f"build/onnx-{params.section(args.params, 'quantize').precision}")
        form = prompts.load_prompt(args.dataset)
        if form["prompt"] is None:
            raise UserError("this dataset is a column of whole chats, so there is no template to put the text into.")
        fields = form["fields"]
        if len(fields) == 1:
            values = {fields[0]: args.text}
        else:
            try:
                values = {name: json.loads(args.text)[name] for name in fields}
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"the template has the fields {', '.join(fields)}: give a JSON object with each."
                ) from None
        answer, milliseconds = ask(model, form, values, args.max_new_tokens or form["longest_answer_tokens"])
        print(f"{answer}  ({milliseconds:.0f} ms)")


if __name__ == "__main__":
    main()
