"""From prompts and answers to token ids in Parquet files."""

import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from slmake import params
from slmake.data.store import Row
from slmake.data.template import SHOWN
from slmake.errors import UserError

IGNORED = -100  # the label that torch's cross entropy leaves out
BATCH = 2048  # rows in memory at a time
DECOMPOSED = ("e\u0301", "\u00e9", "\ufb01")  # each Unicode normal form makes something else of these


def truncate(prompt: list[int], answer: list[int], limit: int, begin: int | None) -> list[int]:
    """Drop tokens at the prompt's start (after the begin token) until prompt and answer fit `limit` tokens."""
    over = len(prompt) + len(answer) - limit
    if over <= 0:
        return prompt
    kept = [prompt[0]] if begin is not None and prompt[0] == begin else []
    return kept + prompt[over + len(kept) :]


class Tokenize:
    """Prompt and answer text to `input_ids` and `labels`, as training and inference share them."""

    def __init__(self, section: params.Prepare, tokenizer, special_tokens: bool):
        self.section, self.tokenizer, self.special_tokens = section, tokenizer, special_tokens
        self.truncated = 0
        self.longest_answer = 0

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of one text that more follows; some tokenizers close every text, which is undone."""
        ids = self._encode([text], self.special_tokens)[0]
        return ids[:-1] if self.special_tokens and ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def __call__(self, batch: list[Row]) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer tokens of each row; the answer ends with the end-of-text token.

        Raises:
            UserError: an answer that does not fit into max_seq_len behind at least one prompt token.
        """
        end, limit = self.tokenizer.eos_token_id, self.section.max_seq_len
        heads = self._encode([row.prompt for row in batch], self.special_tokens)
        tails = self._encode([row.tail for row in batch], False)
        pairs, cut = [], []
        for row, head, tail in zip(batch, heads, tails, strict=True):
            if self.special_tokens and head and head[-1] == end:
                head = head[:-1]  # some tokenizers close every text; the answer follows here
            tail = tail if tail and tail[-1] == end else [*tail, end]
            if len(tail) + 1 > limit:
                cut.append(f"  {row.file}: row {row.line}: the answer has {len(tail)} tokens (with its end token)")
                continue
            kept = truncate(head, tail, limit, self.tokenizer.bos_token_id)
            self.truncated += len(kept) < len(head)
            self.longest_answer = max(self.longest_answer, len(tail))
            pairs.append((kept, tail))
        if cut:
            more = f"\n  and {len(cut) - SHOWN} more" if len(cut) > SHOWN else ""
            raise UserError(
                f"prepare.max_seq_len: {limit} tokens cut off an answer; raise it.\n" + "\n".join(cut[:SHOWN]) + more
            )
        return pairs

    def inference(self) -> dict:
        """What the runtime must do to a prompt to read the tokens of training, for prompt.json: only what this tokenizer does.

        `begin_token_ids` stand before every prompt; `normalization` is a Unicode form; a prompt keeps its last
        `max_prompt_tokens` and a first `kept_token_id`, so that the longest answer fits behind it, where training cut prompts.
        """
        rules: dict = {}
        ids, plain = self._encode(["a"], self.special_tokens)[0], self._encode(["a"], False)[0]
        if len(ids) > len(plain) and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        if len(ids) > len(plain):
            rules["begin_token_ids"] = ids[: len(ids) - len(plain)]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = backend.normalizer if backend else None
        normalized = [normalizer.normalize_str(text) for text in DECOMPOSED] if normalizer else list(DECOMPOSED)
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            expected = [unicodedata.normalize(form, text) for text in DECOMPOSED]
            if normalized == expected != list(DECOMPOSED):
                rules["normalization"] = form
        if self.truncated:
            rules["max_prompt_tokens"] = self.section.max_seq_len - self.longest_answer
            rules["kept_token_id"] = self.tokenizer.bos_token_id
        return rules


class Writer:
    """One split's Parquet file, written a batch at a time."""

    def __init__(self, path: Path, section: params.Prepare, pad_id: int, join: bool):
        import pyarrow
        import pyarrow.parquet

        self.arrow, self.section, self.pad_id, self.join = pyarrow, section, pad_id, join
        ids = pyarrow.list_(pyarrow.int32())
        fields = [
            ("row", pyarrow.int64()),
            ("prompt", pyarrow.string()),
            ("answer", pyarrow.string()),
            ("input_ids", ids),
            ("labels", ids),
        ]
        if section.use_attention_mask:
            fields.append(("attention_mask", pyarrow.list_(pyarrow.int8())))
        self.schema = pyarrow.schema(fields)
        self.file = pyarrow.parquet.ParquetWriter(path, self.schema)
        self.open: list = []  # the sequence being filled, with strategy join
        self.lengths: Counter = Counter()
        self.tokens = self.answer_tokens = 0

    def write(self, batch: list[Row], pairs: list[tuple[list[int], list[int]]]) -> None:
        examples = []
        for row, (head, tail) in zip(batch, pairs, strict=True):
            example = (row.line, row.prompt, row.answer, head + tail, [IGNORED] * len(head) + tail)
            if not self.join:
                examples.append(example)
            elif not self.open:
                self.open = [example]
            elif sum(len(ids) for *_, ids, _ in self.open) + len(example[3]) <= self.section.max_seq_len:
                self.open.append(example)
            else:
                examples.append(self._joined())
                self.open = [example]
        self._flush(examples)

    def _joined(self) -> tuple:
        first = self.open[0]
        return (
            first[0],
            "".join(prompt + answer for _, prompt, answer, *_ in self.open[:-1]) + self.open[-1][1],
            self.open[-1][2],
            [token for *_, ids, _ in self.open for token in ids],
            [label for *_, labels in self.open for label in labels],
        )

    def _flush(self, examples: list[tuple]) -> None:
        if not examples:
            return
        columns: dict[str, list] = {name: [] for name in self.schema.names}
        for number, prompt, answer, ids, labels in examples:
            self.lengths[len(ids)] += 1
            self.tokens += len(ids)
            self.answer_tokens += sum(label != IGNORED for label in labels)
            padding = self.section.max_seq_len - len(ids) if self.section.pad_to_max_len else 0
            values = [
                number,
                prompt,
                answer,
                ids + [self.pad_id] * padding,
                labels + [IGNORED] * padding,
                [1] * len(ids) + [0] * padding,
            ]
            for name, value in zip(self.schema.names, values, strict=False):
                columns[name].append(value)
        self.file.write_table(self.arrow.table(columns, schema=self.schema))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, error, *_) -> None:
        try:
            if self.open and error is None:
                self._flush([self._joined()])
            self.file.close()
        except OSError:
            if error is None:
                raise
        finally:
            self.file.is_open = False  # or it would try again, and fail aloud, when it is deleted


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
