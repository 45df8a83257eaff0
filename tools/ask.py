"""Ask the exported model, with the template it was trained on.

    python -m tools.ask "I never thought I'd see you again!"

Reads the ONNX model and prompt.json of the dataset. Prints the answer and its latency; imports onnxruntime-genai only. A model of
chats takes what the user says, or a JSON list of messages.
"""

import json
import time
from pathlib import Path

from slmake import cli, prompts
from slmake.errors import UserError
from slmake.scoring.onnx_runner import load


def ask(model_folder: Path, form: dict, texts: list[str], new_tokens: int | None) -> tuple[str, float]:
    """The greedy answer to one row of fields, and its latency in milliseconds (after the model is loaded).

    Raises:
        UserError: no model there, ONNX Runtime cannot load it, or the text does not fit it.
    """
    model = load(model_folder, form)
    start = time.perf_counter()
    try:
        return model.answer(*texts, new_tokens=new_tokens), 1000 * (time.perf_counter() - start)
    except ValueError as error:
        raise UserError(str(error)) from None


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
        fields = form["fields"]
        texts = [args.text]
        if form["prompt"] is not None and len(fields) > 1:
            try:
                texts = [json.loads(args.text)[name] for name in fields]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"the template has the fields {', '.join(fields)}: give a JSON object with each."
                ) from None
        answer, milliseconds = ask(model, form, texts, args.max_new_tokens)
        print(f"{answer}  ({milliseconds:.0f} ms)")


if __name__ == "__main__":
    main()
