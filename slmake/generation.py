"""Greedy generation with onnxruntime-genai: the one loop that quantize, evaluate and ask share."""

from collections.abc import Callable, Sequence
from pathlib import Path

from slmake.errors import UserError


def load(folder: Path):
    """The exported model in `folder` as an `onnxruntime_genai.Model`, and its tokenizer.

    Raises:
        UserError: ONNX Runtime refuses it; its reason is passed on.
    """
    import onnxruntime_genai as og

    try:
        model = og.Model(str(folder))
        return model, og.Tokenizer(model)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{folder}: ONNX Runtime cannot load this model: {reason[0] if reason else type(error).__name__}. "
            "Build it again: remove the folder and run snakemake."
        ) from error


def greedy(model, prompt: Sequence[int], new_tokens: int, look: Callable | None = None, room: int = 0) -> list[int]:
    """The most likely continuation of a prompt, token by token.

    Args:
        model: an `onnxruntime_genai.Model`.
        prompt: token ids.
        new_tokens: how many tokens to make at most; the model's end token ends the answer earlier.
        look: called with the `onnxruntime_genai.Generator` before each token is chosen, when the logits for it are there.
        room: more tokens than `new_tokens` that the generator must be able to hold afterwards.

    Returns:
        The new token ids; onnxruntime-genai leaves out an end token.
    """
    import numpy as np
    import onnxruntime_genai as og

    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt) + max(new_tokens, room), do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(np.asarray(prompt, dtype=np.int32))
    made = 0
    while made < new_tokens and not generator.is_done():
        if look:
            look(generator)
        generator.generate_next_token()
        made += 1
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
