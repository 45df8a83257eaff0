"""The section `prepare` of params.yaml."""

import datetime
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from slmake.errors import UserError
from slmake.params.base import Fraction, Section
from slmake.params.dataset_files import hub_split, source_files
from slmake.prompts import fields_of, split_at_answer
from slmake.sources.schemes import FORMS, parse

Role = Literal["system", "user", "assistant"]
Format = Literal["auto", "template", "messages", "sharegpt", "alpaca", "prompt_completion"]
# Arguments of transformers' apply_chat_template, which are no variables of a template.
RESERVED = {
    *(
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
    ),
    *(
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "tokenizer_kwargs",
        "strftime_now",
    ),
    *("return_assistant_tokens_mask", "load_audio_from_video", "processor_kwargs"),
}


def _key_text(value: object) -> object:
    """A number or truth value that YAML read as a key, as the text that rows are compared with."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


class Message(Section):
    """One turn of a chat; `content` is a template over the row's fields."""

    role: Role
    content: str = Field(min_length=1)


class Files(Section):
    """One file per split."""

    train: str = Field(min_length=1, description="Training rows.")
    eval: str | None = Field(
        None, description="Rows for the loss during training; cut from train by `eval_fraction` if absent."
    )
    test: str | None = Field(
        None, description="Held-out rows for evaluate; cut from train by `test_fraction` if absent."
    )


class Splits(Section):
    """Which rows of a dataset on the hub are for each split: one of its own splits, or a slice such as `train[:90%]`."""

    train: str = Field(min_length=1, description="Training rows.")
    eval: str | None = Field(None, min_length=1, description="Rows for the loss during training.")
    test: str | None = Field(None, min_length=1, description="Held-out rows for evaluate.")


class Prepare(Section):
    """Rows in, tokenized train, eval and test splits out. Without a dataset, leave the whole section out or set it to null:
    the model is exported, and twenty fixed texts calibrate and measure it."""

    source: Annotated[str, Field(min_length=1)] | Files = Field(
        description="The dataset: one file (JSON array or an object that holds one, JSON Lines, CSV, TSV or Parquet; text files may end in "
        f".gz), split by the fractions below, or a mapping of train, eval and test to files. Each file as {FORMS}; a hub's is a dataset's. A "
        "local folder, or a pattern such as `data/train-*.parquet` (local or on a hub), names several files of one split, read in the order "
        "of their names. Without a file, hf:ORG/NAME@REVISION is all of a dataset, of which the next three fields choose rows."
    )
    config: str | None = Field(
        None, min_length=1, description="A hub's dataset: its configuration (subset), if it has several."
    )
    split: Annotated[str, Field(min_length=1)] | Splits | None = Field(
        None,
        description="A hub's dataset: which of its splits, or a slice such as `train[:70%]` or `train[-128:]`; `train` if absent. A mapping "
        "names one each for train, eval and test; what it leaves out is cut by the fractions below.",
    )
    where: dict[str, str | int | float | bool] = Field(
        {}, description="A hub's dataset: only rows whose columns have these values, such as `{language: en}`."
    )
    format: Format = Field(
        "auto",
        description="What the rows are: `template` (any fields; needs `text_template` or `messages`), `messages` (a list of role and content), "
        "`sharegpt` (`conversations` of from and value), `alpaca` (`instruction`, `input`, `output`, `history`), `prompt_completion` (`prompt`, "
        "`completion`). `auto`: by `text_template` or `messages` where one is given, else by the first rows, which is reported.",
    )
    text_template: str | None = Field(
        None,
        description="Text of one example over the row's fields, such as `### Text: {phrase}\\n### The tone is:\\n{tone}`; `{text.phrase}` is "
        "a field of the object `text`. Give this or `messages`. `{{` and `}}` are literal braces.",
    )
    messages: str | list[Message] | None = Field(
        None,
        description="Chat instead of text: a list of role and content templates, or the name of a column that holds such a list. "
        "The tokenizer's chat template is applied. The last turn of a list is the answer; in a column, see `train_on`. The rows' field `tools` "
        "and their `tool_calls` go to the chat template.",
    )
    train_on: Literal["all", "last"] = Field(
        "all",
        description="Conversations: the loss is on every assistant turn, or on the last. `train: false`, `training: false`, `loss: false` or `weight: 0` on a turn leaves it out. "
        "Each answer is learned behind what the model sees before it when it is asked; where a chat template changes earlier turns, as "
        "Qwen3's does, an answer becomes a sequence of its own.",
    )
    answer: str | None = Field(
        None,
        description="The field whose placeholder starts the answer in `text_template`; the last placeholder if absent.",
    )
    labels: dict[str, str] | None = Field(
        None,
        description="Words for the values of the answer's field, such as `{0: sadness, 1: joy}`; a value that is not named is an error. "
        "Up to 50 different answers are labels without it, more are open text.",
    )
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(
        {},
        description="Variables for the chat template, such as `{enable_thinking: false}`; recorded in prompt.json.",
    )
    chat_date: str = Field(
        "2024-01-01",
        description="The date that a chat template reads as today (`strftime_now`), so that the same data give the same bytes on every day.",
    )
    strategy: Literal["line-by-line", "packing", "join"] = Field(
        "line-by-line",
        description="`line-by-line`: one sequence per row. `packing`: whole rows behind each other in sequences of up to `max_seq_len`, without "
        "attention from one row to another: the same loss as line by line, without padding. `join`: the same, but rows read those before "
        "them in their sequence (Olive's meaning). For train and eval; test is always line by line.",
    )
    max_seq_len: int = Field(
        1024,
        ge=8,
        le=1_048_576,
        validation_alias=AliasChoices("max_seq_len", "source_max_len"),
        description="Longest sequence in tokens (`source_max_len` is accepted too). A longer prompt loses tokens at its start "
        "and is counted as truncated; a row whose answer alone does not fit is an error. A longer conversation loses whole turns, the "
        "earliest first, which are counted.",
    )
    pad_to_max_len: bool = Field(
        False, description="Pad every sequence to `max_seq_len` instead of to the longest of its batch."
    )
    use_attention_mask: bool = Field(
        True,
        description="Pass a padding mask to the model. Padding is on the right and attention is causal, so no real token sees "
        "padding either way.",
    )
    eval_fraction: Fraction = Field(0.05, description="Share of the rows for the eval split (0 to 0.5).")
    eval_samples: int | None = Field(
        None,
        ge=1,
        description="Rows for the eval split, in place of `eval_fraction`; with few different answers about so many, because each answer's "
        "share is kept.",
    )
    test_fraction: Fraction = Field(
        0.2,
        description="Share of the rows for the test split (0 to 0.5), stratified by answer when there are few different ones.",
    )
    duplicates: Literal["remove", "refuse"] = Field(
        "remove",
        description="What to do with training rows that are exact or near copies of an eval or test row: leave them out of "
        "train, or stop with an error that names them. Of test conversations, answers that training has behind the same turns are not scored.",
    )
    near_duplicate_threshold: float = Field(
        0.8,
        gt=0.5,
        le=1.0,
        description="Jaccard similarity of word 3-shingles of the prompt's fields from which two rows count as near duplicates (an operator or an "
        "emoji is a word); shingles that more than half of the rows have, as of an instruction, are left out. "
        "1.0 finds exact copies (after folding case and white space) only.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the split.")
    max_samples: int | None = Field(None, ge=1, description="Use a random sample of this many rows (before splitting).")

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data):
        if isinstance(data, dict) and {"max_seq_len", "source_max_len"} <= data.keys():
            raise ValueError("max_seq_len and source_max_len are two names of one field: give one of them")
        return data

    @field_validator("labels", mode="before")
    @classmethod
    def _text_keys(cls, value):
        return {_key_text(key): word for key, word in value.items()} if isinstance(value, dict) else value

    @field_validator("labels")
    @classmethod
    def _words(cls, value):
        if value is not None and (not value or not all(word.strip() == word and word for word in value.values())):
            raise ValueError("a mapping of values to words without white space around them is expected")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables(cls, value):
        for name in value:
            if name in RESERVED or not name.isidentifier():
                raise ValueError(f"`{name}` is no variable that a chat template can be given")
        return value

    @field_validator("chat_date")
    @classmethod
    def _date(cls, value):
        try:
            return datetime.date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError(f"`{value}` is no date of the form 2024-01-31") from None

    @model_validator(mode="after")
    def _sources(self):
        for name, file in source_files(self).items():
            source = parse(file)
            if source.kind == "hf" and not source.path:
                if not hub_split(self, name):
                    raise ValueError(
                        f"`{source.text}` is a whole dataset: say in split which of its rows are for {name}"
                    )
            elif self.config or self.split or self.where:
                raise ValueError(
                    f"config, split and where choose rows of hf:ORG/NAME@REVISION, not of the file `{source.full}`"
                )
            if source.models_only or source.member:
                raise ValueError(f"`{source.text}` is a source of models, not of rows")
        return self

    @property
    def templated(self) -> bool:
        """Whether rows become text by templates over their fields."""
        return self.text_template is not None or isinstance(self.messages, list)

    @model_validator(mode="after")
    def _one_form(self):
        if self.text_template is not None and self.messages is not None:
            raise ValueError("give either text_template or messages")
        templated = self.templated
        if self.format == "template" and not templated:
            raise ValueError("format template needs text_template, or messages as a list of templates")
        if self.format in ("messages", "sharegpt", "alpaca", "prompt_completion") and templated:
            raise ValueError(f"format {self.format} goes without templates: set text_template and messages to null")
        if self.format in ("sharegpt", "alpaca", "prompt_completion") and self.messages is not None:
            raise ValueError(f"format {self.format} goes without messages: set it to null")
        if self.labels is not None and not templated:
            raise ValueError(
                "labels goes with a template over fields: text_template, or messages as a list of templates"
            )
        if self.answer is not None and self.text_template is None and self.messages is None:
            raise ValueError("answer goes with text_template")
        if self.answer is not None and self.messages is not None:
            raise ValueError("answer goes with text_template; with messages the assistant's turns are the answers")
        if isinstance(self.messages, list) and (not self.messages or self.messages[-1].role != "assistant"):
            raise ValueError("the last of messages must be the assistant's turn: it is the answer")
        if self.strategy == "packing" and self.pad_to_max_len:
            raise ValueError("pad_to_max_len goes without strategy packing, whose sequences are not padded")
        if self.eval_fraction + self.test_fraction > 0.9:
            raise ValueError("eval_fraction and test_fraction leave less than a tenth of the rows for training")
        return self

    @model_validator(mode="after")
    def _templates(self):
        try:
            if self.text_template is not None:
                split_at_answer(self.text_template, self.answer)
            for turn in self.messages if isinstance(self.messages, list) else []:
                fields_of(turn.content, "prepare.messages")
        except UserError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        turns = [turn.content for turn in self.messages] if isinstance(self.messages, list) else []
        if any("\0" in text for text in [self.text_template or "", *turns]):
            raise ValueError("a NUL in a template ends a text for the runtime. Take it out")
        return self
