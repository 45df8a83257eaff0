"""The base model's chat template: from turns to the text of a prompt and of an answer, in bounded time and memory."""

import contextlib
import datetime
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from slmake.errors import UserError, first_line

SECONDS = 10  # of processor time for one conversation
MEMORY = 2**31  # bytes for one conversation
MARK = "\x00answer\x00"


class ChatTemplate:
    """A tokenizer's chat template with the options of params.yaml and a fixed date.

    Args:
        options: `prepare.chat_template_kwargs`.
        date: `prepare.chat_date`, what a template reads as today (`strftime_now`), so that the bytes are the same tomorrow.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not show the answer.
    """

    def __init__(self, tokenizer, options: dict, date: str):
        if not tokenizer.chat_template:
            raise UserError(
                "prepare.messages: the base model's tokenizer has no chat template. Use text_template instead."
            )
        self.tokenizer, self.options, self.date = tokenizer, options, datetime.date.fromisoformat(date)

    def split(self, turns: list[dict]) -> tuple[str, str]:
        """Prompt and answer text of a conversation that ends with the assistant's turn.

        What the template itself writes before an answer (an empty think block, white space) belongs to the prompt; what it writes
        behind it closes the answer, but for line ends.

        Raises:
            ValueError: the template does not take these turns.
            UserError: it changes earlier turns when the answer is added, does not show the answer, or does not end.
        """
        head, whole = self._render(turns[:-1], True), self._render(turns, False)
        if not whole.startswith(head):
            raise UserError(
                "prepare.messages: this chat template changes earlier turns when the answer is added. Use text_template."
            )
        answer = turns[-1]["content"]
        if not whole.startswith(answer, len(head)):
            before, shown, _ = self._render([*turns[:-1], {**turns[-1], "content": MARK}], False).partition(MARK)
            if not shown:
                raise UserError("prepare.messages: this chat template does not show the answer. Use text_template.")
            if whole.startswith(before) and before.startswith(head):
                head = before
        return head, whole[len(head) :].rstrip("\n")

    def answer_prefix(self) -> str:
        """What the template writes between its generation prompt and an answer, for one plain question."""
        question = [{"role": "user", "content": "?"}]
        head, _ = self.split([*question, {"role": "assistant", "content": MARK}])
        return head[len(self._render(question, True)) :]

    def settings(self) -> dict:
        """What inference needs to write the same prompts."""
        return {"template_kwargs": self.options, "date": self.date.isoformat()}

    def _render(self, turns: list[dict], generation: bool) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            with bounded():
                # Arguments reach a template as plain data only, so its clock is set in the environment that it is compiled in.
                compiled = _compile_jinja_template(self.tokenizer.get_chat_template())
                compiled.environment.globals["strftime_now"] = self.date.strftime
                return self.tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self.options,
                )
        except TimeoutError:
            raise UserError(
                f"prepare.messages: the base model's chat template does not end: stopped after {SECONDS} s. Use text_template, or another "
                "base model."
            ) from None
        except (MemoryError, OverflowError):
            raise UserError(
                f"prepare.messages: the base model's chat template needs more than {MEMORY / 1e9:.0f} GB of memory for one conversation. "
                "Use text_template, or another base model."
            ) from None
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the base model's chat template does not take it: {first_line(error)}") from None


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Bound a block's processor time and memory, in the main thread; TimeoutError or MemoryError beyond."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError

    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGVTALRM, stop)
    try:
        with contextlib.suppress(
            OSError, ValueError
        ):  # no /proc, or a limit that may not be changed: bounded in time only
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            allowed = used + memory
            if limits[0] == resource.RLIM_INFINITY or allowed < limits[0]:
                resource.setrlimit(resource.RLIMIT_AS, (allowed, limits[1]))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)
