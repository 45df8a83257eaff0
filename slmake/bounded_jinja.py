"""Chat templates of models, compiled and rendered in bounded time, memory and length: they come from wherever the model does."""

import contextlib
import functools
import json
import operator
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmake.errors import UserError, first_line

SECONDS = 10  # of processor time for one conversation
MEMORY = 2**31  # bytes for one conversation
LONGEST, LONGER = 100_000, 20  # characters of any conversation, and so many times what its messages and tools have
LARGEST = 10**5  # bits of a whole number: one operation on larger ones is one call that no signal interrupts
PRECISE = 1000  # digits that may be rounded to, for the same reason
OPERATORS = {"*": operator.mul, "**": operator.pow, "//": operator.floordiv, "%": operator.mod}
WHAT = "the base model's chat template"
OTHERWISE = "Use text_template, or another base model."


class Stopped(BaseException):
    """The time is over. No Exception, because jinja swallows those of the constants that it computes while it compiles."""


@functools.lru_cache
def compiled(template: str):
    """A chat template as transformers reads it, in an environment of its own whose numbers are bounded.

    Raises:
        jinja2.TemplateError, SyntaxError, RecursionError: it is none, or one that is nested too deeply.
    """
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    environment = _cached_compile_jinja_template("").environment
    environment.optimized = False
    environment.intercepted_binops = frozenset(OPERATORS)
    environment.call_binop = lambda context, name, left, right: _computed(name, left, right)
    rounded = environment.filters["round"]
    environment.filters["round"] = lambda value, precision=0, *more, **named: rounded(
        value, max(-PRECISE, min(PRECISE, precision)), *more, **named
    )
    return environment.from_string(template)


def _computed(name: str, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if name == "**" else left.bit_length() + right.bit_length()
        if bits > LARGEST:
            raise ArithmeticError(f"it computes with a whole number of more than {LARGEST} bits")
    return OPERATORS[name](left, right)


def render(template: str, turns: list, tools: list | None, generation: bool, variables: dict, clock: Any) -> tuple:
    """The text of a conversation, and start and end of each part that the template marks by `{% generation %}`.

    Args:
        clock: what the template calls as `strftime_now`.

    Raises:
        ValueError: the template does not take this conversation.
        UserError: it is written wrongly, or goes beyond a bound.
    """
    import jinja2
    from transformers.utils import chat_template_utils as utils

    with refusals("prepare.messages", WHAT, OTHERWISE):
        try:
            with bounded():
                form = compiled(template)
                form.environment.globals["strftime_now"] = clock  # in place of today's date
                chat, schemas, given = map(utils._plain_template_data, (turns, tools, variables))
                chat = utils._alias_reasoning_fields(chat)
                text, spans = utils._render_with_assistant_indices(form, chat, schemas, None, generation, **given)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, OverflowError):
                raise
            raise ValueError(f"{WHAT} does not take it: {first_line(error)}") from None
    if len(text) > LONGEST:
        most = LONGEST + LONGER * len(json.dumps([turns, tools], default=str))
        if len(text) > most:
            raise UserError(
                f"prepare.messages: {WHAT} makes a text of {len(text):,} characters of one conversation; at most {most:,} are read. "
                f"{OTHERWISE}"
            )
    return text, spans


@contextlib.contextmanager
def refusals(where: str, what: str, otherwise: str) -> Iterator[None]:
    """Say in one message which bound a template went beyond, or that Python cannot run it."""
    try:
        yield
    except TimeoutError:
        reason = f"does not end: stopped after {SECONDS} s"
    except (MemoryError, OverflowError):
        reason = f"needs more than {MEMORY / 1e9:.0f} GB of memory for one conversation"
    except RecursionError:
        reason = "calls itself without end, or is nested too deeply"
    except SyntaxError as error:  # of the Python code that jinja makes of it
        reason = f"cannot be compiled: {error.msg}"
    else:
        return
    raise UserError(f"{where}: {what} {reason}. {otherwise}") from None


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Bound a block's processor time and memory, in the main thread; TimeoutError or MemoryError beyond."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise Stopped

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
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again and again: a callback of C may lose one
        yield
    except Stopped:
        raise TimeoutError from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)
