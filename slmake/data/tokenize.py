"""From prompts and answers to token ids in Parquet files."""

import bisect
import functools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slmake import params, prompts
from slmake.data.chat import Answer
from slmake.data.conversation import Conversation, special_tokens
from slmake.data.store import Row
from slmake.data.template import SHOWN, PromptTemplate
from slmake.errors import UserError
from slmake.text import one_line

IGNORED = -100  # the label that torch's cross entropy leaves out
BATCH = 2048  # rows in memory at a time
CHATS = 128  # conversations
LAST, EARLIER = slice(-1, None), slice(None, -1)  # of a conversation's answers
SPACE = "\u2581"  # stands for a space in the tokens of SentencePiece's tokenizers
DECOMPOSED = ("e\u0301", "\u00e9", "\ufb01")  # each Unicode normal form makes something else of these


def truncate(prompt: list[int], answer: list[int], limit: int, begin: int | None) -> list[int]:
    """Drop tokens at the prompt's start (after the begin token) until prompt and answer fit `limit` tokens."""
    over = len(prompt) + len(answer) - limit
    if over <= 0:
        return prompt
    kept = [prompt[0]] if begin is not None and prompt[0] == begin else []
    return kept + prompt[over + len(kept) :]


class Example(NamedTuple):
    """One sequence of a dataset."""

    row: int
    prompt: str  # before the last answer, as text
    answer: str  # the last answer
    ids: list[int]
    labels: list[int]
    turns: list[int]  # numbers of a conversation's trained turns
    dropped: int  # turns at the conversation's beginning that are left out
    cut: int  # tokens at the prompt's start that are left out
    tools: str | None = None  # of a conversation, as JSON


class Tokenize:
    """Prompts and answers to `input_ids` and `labels`, as training and inference share them.

    Attributes:
        truncated: prompts that lost tokens at their start.
        shortened: conversations that lost turns at their beginning, and `dropped`, the number of these turns.
        apart: answers that became a sequence of their own, because the chat template changes what stands before them.
        unlike: answers asked for alone that the runtime would write in another way (see `_read_back`), and `first_unlike` of them.
        tools, systems: the different lists of tools of the conversations, and their different system turns, as JSON; no more than two.
    """

    def __init__(self, section: params.Prepare, tokenizer, template: PromptTemplate):
        self.section, self.tokenizer, self.template = section, tokenizer, template
        self.special_tokens = template.special_tokens
        self.truncated = self.shortened = self.dropped = self.apart = 0
        self.longest_answer = self.longest_prompt = self.unlike = 0
        self.first_unlike = ""
        self.checked: set[str] = set()  # labels
        self.closed: set[str] = set()  # labels with what closes them
        self.tools: set[str | None] = set()
        self.systems: set[str | None] = set()

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def check_labels(self, labels: list[str]) -> None:
        """Refuse labels that no answer of the runtime can be equal to, or that it cannot distinguish.

        Raises:
            UserError: a label has a NUL or a special token in it, is another text by its tokens, or the same tokens as another.
        """
        special = special_tokens(self.tokenizer)
        self.checked = set(labels)
        if alike := [label for label in labels if label in self.template.alike]:
            raise UserError(
                f"prepare: some rows have the label {alike[0]!r} with {' or '.join(self.template.alike[alike[0]])} at its end, and others have "
                "not: special tokens are no part of an answer there, so these are one label. Write them in other words, or all alike."
            )
        seen: dict[tuple[int, ...], str] = {}
        for label, ids in zip(labels, self._encode(labels, False) if labels else [], strict=True):
            left_out = [f"the special token {special[token]}" for token in ids if token in special]
            left_out += ["a NUL"] * ("\0" in label)
            if left_out:
                raise UserError(
                    f"prepare: the label {label!r} has {left_out[0]} in it, which the runtime leaves out of an answer: no answer of a model "
                    "would be equal to it. Rename the label."
                )
            other = seen.setdefault(tuple(ids), label)
            if other != label:
                raise UserError(
                    f"prepare: the labels {other!r} and {label!r} are the same tokens for this model, so no score can distinguish them. "
                    "Rename one of them."
                )
            expected, read = self._read_back(label, ids)
            if read != expected:
                raise UserError(
                    f"prepare: the label {label!r} is {read!r} when its tokens are read back, so no answer of a model would be equal to it. "
                    "Rename the label, or give its word in prepare.labels."
                )

    def _read_back(self, answer: str, ids: list[int]) -> tuple[str, str]:
        """An answer as scores expect it, and as the runtime writes its tokens: not the same where a tokenizer makes all text small."""
        kept = [token for token in ids if token != self.tokenizer.eos_token_id]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        expected = prompts.as_written(answer, self._writing)
        return expected.strip(), text.replace(self._writing.get("space", " "), " ").strip()

    def _check_closed(self, row: Row, answer: Answer, ids: list[int]) -> None:
        """Refuse a label that no answer can be equal to, because what closes it is learned as a part of its text.

        Raises:
            UserError: the chat template closes answers with a mark that is no special token of the model.
        """
        if answer.tail in self.closed:
            return
        expected, read = self._read_back(answer.answer, ids)
        if prompts.read_answer(read, self.checked) != expected:
            raise UserError(
                f"{row.file}: row {row.line}: the answer {expected!r} is {read!r} when its tokens are read back: the chat template closes it "
                "with what is no special token of this model, so answers would have it as text, and none would be equal to a label. Name a "
                "template with this model's own marks in fetch_model.chat_template, or a base model that has these."
            )
        self.closed.add(answer.tail)

    def _compare(self, row: Row, answer: Answer, ids: list[int]) -> None:
        """Count an answer that no answer of the runtime can be equal to."""
        expected, read = self._read_back(answer.answer, ids)
        if read == expected:
            return
        if not self.unlike:
            # From a little before the first difference on: long texts are cut, and two that look the same say nothing.
            pairs = enumerate(zip(expected, read, strict=False))
            same = next((number for number, (one, other) in pairs if one != other), min(len(expected), len(read)))
            start = same - 20 if same > 40 else 0
            shown = ["…" * bool(start) + text[start:] for text in (expected, read)]
            texts = f"{one_line(repr(shown[0]), 60)} is read back as {one_line(repr(shown[1]), 60)}"
            self.first_unlike = f"{row.file}: row {row.line}: {texts}"
        self.unlike += 1

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of one text that more follows; some tokenizers close every text, which is undone."""
        ids = self._encode([text], self.special_tokens)[0]
        return ids[:-1] if self.special_tokens and ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def __call__(self, batch: list[Row], one_answer: bool = False) -> list[Example]:
        """The sequences of some rows; every answer ends with the end-of-text token.

        Args:
            one_answer: a sequence for each answer, as it is asked for; otherwise the answers of a conversation share a sequence where
                each one's prompt begins with the tokens of the one before it.

        Raises:
            UserError: an answer that does not fit into max_seq_len behind at least one prompt token.
        """
        limit = self.section.max_seq_len
        examples, cut = [], []
        for row, group, tokens, dropped in self._chats(batch) if batch[0].chat else self._texts(batch):
            for _, tail in tokens:
                if len(tail) + 1 > limit:
                    cut.append(f"  {row.file}: row {row.line}: the answer has {len(tail)} tokens (with its end token)")
            if not cut:
                examples += self._sequences(row, group, tokens, dropped, one_answer)
        if cut:
            more = f"\n  and {len(cut) - SHOWN} more" if len(cut) > SHOWN else ""
            raise UserError(
                f"prepare.max_seq_len: {limit} tokens cut off an answer; raise it.\n" + "\n".join(cut[:SHOWN]) + more
            )
        return examples

    def _texts(self, batch: list[Row]) -> Iterator[tuple]:
        """Rows of one answer each, with it and its tokens, and no turns dropped."""
        answers = [self.template.answers(row) for row in batch]
        pairs = self._pairs([answer for group in answers for answer in group])
        for row, group, pair in zip(batch, answers, pairs, strict=True):
            yield row, group, [pair], 0

    def _chats(self, batch: list[Row]) -> Iterator[tuple]:
        """Conversations with their answers, the tokens of these, and the number of turns dropped.

        One at a time, and the other answers of one only when it is known which of its turns are left: the prompts of all answers grow with
        the square of a conversation's length.
        """
        for row in batch:
            start, dropped, last = self._shorten(row)
            earlier = self.template.answers(row, start, EARLIER) if row.answers > 1 else []
            pairs = self._pairs(earlier) if earlier else []
            yield row, [*earlier, last[0]], [*pairs, last[1]], dropped

    def _pairs(self, answers: list[Answer]) -> list[tuple[list[int], list[int]]]:
        """Tokens of each prompt and of each answer with its end token."""
        end, pairs = self.tokenizer.eos_token_id, []
        heads = self._encode([answer.prompt for answer in answers], self.special_tokens)
        tails = self._encode([answer.tail for answer in answers], False)
        for head, tail in zip(heads, tails, strict=True):
            if self.special_tokens and head and head[-1] == end:
                head = head[:-1]  # some tokenizers close every text; the answer follows here
            pairs.append((head, tail if tail and tail[-1] == end else [*tail, end]))
        return pairs

    def _shorten(self, row: Row) -> tuple[int, int, tuple[Answer, tuple]]:
        """Where a conversation begins without as many of its earliest turns as needed for the last answer to fit.

        Returns:
            Index of this turn, the number of turns dropped, and the last answer with its tokens.
        """

        @functools.cache
        def last(start: int) -> tuple[Answer, tuple]:
            (answer,) = self.template.answers(row, start, LAST)
            return answer, self._pairs([answer])[0]

        def fits(start: int) -> bool:
            return sum(map(len, last(start)[1])) <= self.section.max_seq_len

        if fits(0):
            return 0, 0, last(0)
        conversation = Conversation.parse(row.chat)
        starts = [start for start in conversation.starts if start <= conversation.trained[-1]]
        start = starts[min(bisect.bisect_left(starts, True, key=fits), len(starts) - 1)]
        system = start > 0 and conversation.turns[0]["role"] == "system"
        self.shortened += start > 0
        self.dropped += start - system
        return start, start - system, last(start)

    def _sequences(
        self, row: Row, answers: list[Answer], tokens: list, dropped: int, one_answer: bool
    ) -> list[Example]:
        """One row's sequences."""
        examples: list[Example] = []
        turns, tools, _ = Conversation.parse(row.chat) if row.chat else ([], None, [])
        tools = json.dumps(tools, ensure_ascii=False) if tools else None
        if len(self.tools) < 2:
            self.tools.add(tools)
        if len(self.systems) < 2:
            self.systems.add(json.dumps(turns[0]) if turns and turns[0]["role"] == "system" else None)
        for answer, (head, tail) in zip(answers, tokens, strict=True):
            kept = truncate(head, tail, self.section.max_seq_len, self.tokenizer.bos_token_id)
            self.truncated += len(kept) < len(head)
            self.longest_answer = max(self.longest_answer, len(tail))
            self.longest_prompt = max(self.longest_prompt, len(kept))
            labels, turns = [IGNORED] * len(kept) + tail, [answer.turn] if row.chat else []
            if answer.answer in self.checked:
                self._check_closed(row, answer, tail)
            elif one_answer:
                self._compare(row, answer, tail)
            if examples and not one_answer:
                before = examples[-1]
                if kept[: len(before.ids)] == before.ids:
                    labels[: len(before.labels)] = before.labels
                    turns = before.turns + turns
                    examples.pop()
                else:
                    self.apart += 1
            cut = len(head) - len(kept)
            ids = kept + tail
            examples.append(Example(row.number, answer.prompt, answer.answer, ids, labels, turns, dropped, cut, tools))
        return examples

    @functools.cached_property
    def _writing(self) -> dict:
        """`normalization` and `space` of `inference`."""
        rules = {}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = backend.normalizer if backend else None
        normalized = [normalizer.normalize_str(text) for text in DECOMPOSED] if normalizer else list(DECOMPOSED)
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            expected = [unicodedata.normalize(form, text) for text in DECOMPOSED]
            if normalized == expected != list(DECOMPOSED):
                rules["normalization"] = form
        if backend and backend.decoder and SPACE not in backend.decoder.decode([f"a{SPACE}a"]):
            rules["space"] = SPACE
        return rules

    def inference(self) -> dict:
        """What the runtime must do to read and write the tokens as training did, for prompt.json: only what this tokenizer does.

        `begin_token_ids` stand before every prompt; `normalization` is a Unicode form; `space` becomes a space in an answer, which the
        runtime does not do in added tokens such as Gemma's for several spaces; a prompt keeps its last
        `max_prompt_tokens` and a first `kept_token_id`, so that the longest answer fits behind it, where training cut prompts. Before that,
        a chat loses its earliest turns until it has `max_chat_tokens`, the longest prompt of training, where that dropped turns. `tools` are
        those that all conversations have; an empty list where they differ. `system` is the turn that all conversations begin with.
        """
        rules = dict(self._writing)
        if any(self.tools):
            rules["tools"] = json.loads(*self.tools) if len(self.tools) == 1 else []
        if len(self.systems) == 1 and any(self.systems):
            rules["system"] = json.loads(*self.systems)
        ids, plain = self._encode(["a"], self.special_tokens)[0], self._encode(["a"], False)[0]
        if len(ids) > len(plain) and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        if len(ids) > len(plain):
            rules["begin_token_ids"] = ids[: len(ids) - len(plain)]
        if self.shortened:
            rules["max_chat_tokens"] = self.longest_prompt
        if self.truncated:
            rules["max_prompt_tokens"] = self.section.max_seq_len - self.longest_answer
            rules["kept_token_id"] = self.tokenizer.bos_token_id
        return rules


def lengths_summary(lengths: Counter) -> dict:
    """Minimum, median, 95th percentile and maximum of sequence lengths in tokens, with the histogram."""
    if not lengths:
        return {"min": 0, "median": 0, "p95": 0, "max": 0, "histogram": {}}
    keys = sorted(lengths)
    counts = np.cumsum([lengths[key] for key in keys])

    def quantile(share: float) -> int:
        return keys[int(np.searchsorted(counts, share * counts[-1]))]

    histogram = {str(key): lengths[key] for key in keys}
    return {"min": keys[0], "median": quantile(0.5), "p95": quantile(0.95), "max": keys[-1], "histogram": histogram}


def load_tokenizer(base: Path):
    """The base model's tokenizer, from local files only."""
    if not base.is_dir():
        raise UserError(f"{base}: no such folder. Build it with `snakemake --cores all {base}`.")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
