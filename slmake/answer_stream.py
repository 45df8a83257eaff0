"""An answer while it is generated, for the server and `make chat`. `package` copies this file for serve.py."""

from collections.abc import Iterator, Sequence

from slmake.generation import Exported, Sampling

INCOMPLETE = "\ufffd"  # what the runtime shows for the first bytes of a character


class Stream:
    """An answer while it is generated: iterate for its text, piece by piece.

    Every step makes one token, and gives the text that it adds: none where that is not certain yet, because a character or a stop string
    may go on. All pieces together are `text`, which is what `Exported.decode` makes of the tokens.

    Args:
        prompt: token ids that fit the model.
        stop: texts that end the answer; they are no part of it.
        strip: leave out outer white space, as `Exported.decode` does.

    Attributes:
        text, tokens: the answer so far, and its token ids.
        finish: why it ended, `stop` (an end token or a stop string) or `length`; None before.

    Raises:
        ValueError: the runtime cannot make the guidance of its text.
    """

    def __init__(
        self,
        model: Exported,
        prompt: Sequence[int],
        new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        strip: bool = True,
    ):
        self.model, self.prompt, self.new_tokens, self.stop, self.strip = model, prompt, new_tokens, stop, strip
        sampling = sampling or model.sampling
        self.generator, self.held = model.generator(prompt, new_tokens, sampling), bool(sampling.guidance)
        self.text, self.finish, self.tokens = "", None, []

    def __iter__(self) -> Iterator[str]:
        for token in self.model.steps(self.generator, self.new_tokens, held=self.held):
            self.tokens.append(token)
            yield self._advance()
            if self.finish:
                break
        else:
            self.finish = "length" if len(self.tokens) == self.new_tokens else "stop"
            yield self._advance()
        del self.generator  # with its cache

    def _advance(self) -> str:
        """What is certain now of the text so far, behind what was given before."""
        whole = self.model.text(self.tokens)
        whole = whole.lstrip() if self.strip else whole
        stopped = [whole.index(text) for text in self.stop if text in whole]
        if stopped:
            self.finish, whole = "stop", whole[: min(stopped)]
        elif not self.finish:
            whole = whole.rstrip(INCOMPLETE)
            longest = len(whole) + 1
            begun = [n for text in self.stop for n in range(1, min(len(text), longest)) if whole.endswith(text[:n])]
            whole = whole[: len(whole) - max(begun, default=0)]
        whole = whole.rstrip() if self.strip else whole
        if not whole.startswith(self.text):  # shorter than before: more was held back
            return ""
        piece, self.text = whole[len(self.text) :], whole
        return piece
