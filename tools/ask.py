"""Ask the exported model, with the template it was trained on.

    python -m tools.ask "I never thought I'd see you again!"

Reads the ONNX model and the prompt.json beside it. Prints the answer and its latency; imports onnxruntime-genai only. A model of
chats takes what the user says, or a JSON list of messages.
"""

import signal
import time

from slmake import cli, exported_model
from slmake.errors import UserError
from slmake.generation import Exported, shown
from slmake.openai_api import field_texts


def ask(model: Exported, text: str, new_tokens: int | None) -> tuple[str, float]:
    """The answer to a text (for a template with several fields, a JSON object of them), and its latency in milliseconds.

    Raises:
        UserError: the text does not fit the model.
    """
    start = time.perf_counter()
    try:
        return model.answer(*field_texts(model.form, text), new_tokens=new_tokens), 1000 * (time.perf_counter() - start)
    except ValueError as error:
        raise UserError(str(error)) from None


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("text", help="the text to ask about; for a template with several fields, a JSON object of them")
    exported_model.add_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, help="generation length (default: the longest answer in the data)"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `head` may end first
    with cli.job("ask", args.log):
        if not args.text.strip():
            raise UserError('no text. Write: make ask TEXT="I never thought I\'d see you again!"')
        answer, milliseconds = ask(exported_model.load(args), args.text, args.max_new_tokens)
        print(f"{shown(answer)}  ({milliseconds:.0f} ms)")


if __name__ == "__main__":
    main()
