"""Compare the runtime's tokenizer with the one of training."""

from collections.abc import Sequence

from slmake.generation import Exported
from slmake.hard_texts import HARD_TEXTS
from slmake.scoring.questions import Questions

BEFORE, BEHIND = 3, 9  # tokens or characters shown before and from a difference on


def compare(model: Exported, tokenizer, questions: Questions) -> dict:
    """How often the runtime and training disagree, on the scored prompts and answers and on `HARD_TEXTS`.

    Args:
        tokenizer: of transformers, as training used it.

    Returns:
        Numbers of rows and of hard texts, and of how many of each are encoded or decoded differently; with the first
        scored row that differs, and what either makes of the part that does: tokens of a prompt, the text of an answer.
    """
    name = tokenizer.convert_ids_to_tokens
    prompts, answers, first = 0, 0, {}
    for i in range(questions.scored):
        trained, runtime = questions.prompts[i].tolist(), model.encode(questions.texts[i] or "")
        text, read = _texts(model, tokenizer, questions.answers[i])
        if questions.texts[i] is not None and trained != runtime:
            prompts += 1
            first = first or {"row": questions.rows[i], **_apart(name(trained), name(runtime))}
        if text != read:
            answers += 1
            first = first or {"row": questions.rows[i], **_apart(text, read)}
    special = questions.form["add_special_tokens"]
    encoded = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in HARD_TEXTS]
    encoded = [ids[:-1] if special and ids[-1:] == [tokenizer.eos_token_id] else ids for ids in encoded]
    hard = [model.encode(text) != ids for text, ids in zip(HARD_TEXTS, encoded, strict=True)]
    decoded = [_texts(model, tokenizer, ids) for ids in encoded]
    counts = {"rows": questions.scored, "encode_differ": prompts, "decode_differ": answers}
    counts |= {"hard_texts": len(HARD_TEXTS), "hard_encode_differ": sum(hard)}
    counts |= {"hard_decode_differ": sum(text != read for text, read in decoded)}
    return counts | ({"first": first} if first else {})


def _texts(model: Exported, tokenizer, ids: list[int]) -> tuple[str, str]:
    """What training's tokenizer and the runtime's read in an answer, without outer white space."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), model.decode(ids)


def _apart(training: Sequence, runtime: Sequence) -> dict:
    """Two different texts or lists of tokens from shortly before their first difference, short enough for a message."""
    pairs = enumerate(zip(training, runtime, strict=False))
    start = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(training), len(runtime)))
    part = slice(max(0, start - BEFORE), start + BEHIND)
    return {"training": training[part], "runtime": runtime[part]}
