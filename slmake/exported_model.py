"""The exported model that a person asks, chats with or serves: the one that params.yaml builds, or another."""

import argparse
from pathlib import Path

from slmake import params, prompts
from slmake.constraints import constrained
from slmake.errors import UserError
from slmake.export.foreign import refuse_code
from slmake.generation import Exported
from slmake.scoring import onnx_runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="the exported model's folder (default: the one params.yaml builds)")
    parser.add_argument(
        "--dataset", type=Path, help="folder with prompt.json (default: the model's, else build/dataset)"
    )


def load(args: argparse.Namespace) -> Exported:
    """The model, with the constraint of `package.constrain` and the prompts that it was trained on.

    They lie beside it, because build/dataset may be of other parameters already: of `make preview`, or a build that was interrupted.

    Raises:
        UserError: it is not there, would run code, or ONNX Runtime cannot load it.
    """
    folder = args.model or Path(f"build/onnx-{params.section(args.params, 'quantize').precision}")
    for option, given, name in (("model", args.model, "genai_config.json"), ("dataset", args.dataset, "prompt.json")):
        if given and not (given / name).is_file():
            raise UserError(f"--{option} {given}: no {name} there. Correct the folder's name, or build it with `make`.")
    beside = folder if (folder / "prompt.json").is_file() else Path("build/dataset")
    form = prompts.load_prompt(args.dataset or beside)
    if args.model:
        refuse_code(folder)
    model = onnx_runner.load(folder, form)
    if Path(args.params).is_file():
        model.form = constrained(form, params.section(args.params, "package").constrain, lambda _: model)
    return model
