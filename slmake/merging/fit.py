"""Whether an adapter fits a base model, and what becomes of an output head that shares the embedding's weights."""

import importlib.util
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from slmake.errors import UserError
from slmake.merging.adapter import Adapter, Change
from slmake.model_folder import meta_model
from slmake.sources.chat_template import NAME

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", NAME),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)


@dataclass
class Plan:
    """How the base's tensors change.

    Attributes:
        changes: by name of the tensor in the merged model.
        shapes: of every tensor of the merged model.
        copies: new tensors, by name: the base's tensor that they begin as (a head that shares its weights no longer).
        vocabulary: the number of rows of the embedding, if the adapter changes it.
    """

    changes: dict[str, Change]
    shapes: dict[str, list[int]]
    copies: dict[str, str] = field(default_factory=dict)
    vocabulary: int | None = None


def plan(adapter: Adapter, base: Path, shapes: dict[str, list[int]]) -> Plan:
    """Match the adapter's tensors with the base's.

    Args:
        shapes: of the base's tensors, by name.

    Raises:
        UserError: a tensor is missing or of another shape, or a vocabulary does not fit: naming both models.
    """
    planned = Plan(_turned(adapter, base), dict(shapes))
    for name in planned.changes.keys() & shapes.keys():
        replacement = planned.changes[name].replacement
        if replacement and len(adapter.shapes[replacement]) != len(shapes[name]):
            other = adapter.shapes[replacement]
            raise _other_base(adapter, base, f"the adapter's {name} has the shape {other}, the base's {shapes[name]}.")
    absent = planned.changes.keys() - shapes.keys()
    resized = {name for name in planned.changes.keys() & shapes.keys() if _new_shape(adapter, planned, name)}
    if absent or resized or any(_changes_rows(change) for change in planned.changes.values()):
        _plan_embeddings(adapter, base, planned)
    for name, change in planned.changes.items():
        if change.replacement and name in planned.shapes:
            planned.shapes[name] = adapter.shapes[change.replacement]
    missing = sorted(planned.changes.keys() - planned.shapes.keys())
    if missing and adapter.config.get("lora_bias") and all(name.endswith(".bias") for name in missing):
        raise UserError(
            f"{adapter.config_path}: the adapter changes {missing[0]}, and that layer has no bias, so it cannot be merged. Train it again "
            "without lora_bias."
        )
    if missing:
        raise _other_base(
            adapter,
            base,
            f"the base model has no tensor {missing[0]} ({len(missing)} of the adapter's {len(adapter.changes)} are missing): it is "
            "another base model.",
        )
    for name, change in planned.changes.items():
        _check_shapes(adapter, base, name, change, planned.shapes[name], shapes.get(name))
    return planned


def _turned(adapter: Adapter, base: Path) -> dict[str, Change]:
    """The adapter's changes; those of layers that hold their weight as [in, out] are transposed.

    As in PEFT, the base's layers decide, GPT-2's Conv1D against nn.Linear; `fan_in_fan_out` does not.
    """
    if not (any(change.a for change in adapter.changes.values()) and _may_hold_conv1d(base)):
        return dict(adapter.changes)
    from transformers.pytorch_utils import Conv1D

    modules = dict(meta_model(base).named_modules())
    return {
        name: replace(change, transposed=change.transposed or isinstance(modules.get(change.module), Conv1D))
        for name, change in adapter.changes.items()
    }


def _may_hold_conv1d(base: Path) -> bool:
    """Whether the architecture's code in transformers names Conv1D: quicker than to make its modules, and most do not."""
    kind = str(json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type")).replace("-", "_")
    folder = Path(importlib.util.find_spec("transformers").origin).parent / "models" / kind
    files = list(folder.glob("modeling_*.py"))
    return not files or any("Conv1D" in file.read_text(encoding="utf-8") for file in files)


def _new_shape(adapter: Adapter, planned: Plan, name: str) -> bool:
    replacement = planned.changes[name].replacement
    return bool(replacement) and list(adapter.shapes[replacement]) != list(planned.shapes[name])


def _changes_rows(change: Change) -> bool:
    """Whether the change may be one of an embedding: by rows, transposed, or as a whole matrix."""
    return bool(change.rows or change.transposed or change.replacement)


def _other_base(adapter: Adapter, base: Path, problem: str) -> UserError:
    """The error that names both models."""
    try:
        kind = json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type", "unknown")
    except (OSError, ValueError):
        kind = "unknown"
    trained_on = adapter.config.get("base_model_name_or_path") or "an unnamed model"
    return UserError(
        f"{problem} The adapter {adapter.folder} was trained on {trained_on}; {base} is of the type {kind}. Fetch the base that it was "
        "trained on."
    )


def _check_shapes(adapter, base, name: str, change: Change, shape: list[int], before: list[int] | None) -> None:
    """The adapter's tensors against the merged tensor's shape."""
    got, shape = adapter.shapes, tuple(shape)
    if change.a:
        (rank, width), (out, columns) = got[change.a], got[change.b]
        size = (width, out) if change.transposed else (out, width)
        if size != shape:
            raise _other_base(
                adapter,
                base,
                f"the adapter's update of {name} is {size}, the weight is {shape}: it belongs to another base model.",
            )
        if not rank == columns == adapter.rank(change.module):
            raise UserError(
                f"{adapter.config_path}: the rank of {change.module} is {adapter.rank(change.module)}, but its matrices have {rank} "
                f"and {columns}. Build the adapter again."
            )
        if change.magnitude and math.prod(got[change.magnitude]) != out:
            raise _other_base(adapter, base, f"the adapter's magnitudes of {name} do not fit its shape {shape}.")
    if change.bias and tuple(got[change.bias]) != shape:
        raise _other_base(adapter, base, f"the adapter's bias of {name} is {got[change.bias]}, the bias is {shape}.")
    if change.rows:
        rows, width = got[change.rows]
        wrong = rows != len(change.indices) or width != shape[1]
        if wrong or not all(isinstance(index, int) and 0 <= index < shape[0] for index in change.indices):
            raise _other_base(
                adapter, base, f"the adapter's {rows} trained tokens do not fit {name} with the shape {shape}."
            )
    if change.replacement and before is not None and len(shape) == 2:
        before = (shape[0], before[1])  # rows may be added
    if change.replacement and before is not None and tuple(before) != shape:
        raise _other_base(adapter, base, f"the adapter's {name} has the shape {shape}, the base's {tuple(before)}.")


def embeddings(base: Path) -> tuple[str, str | None, bool]:
    """Names of the input embedding's and the output head's weight, and whether they are the same tensor."""
    model = meta_model(base)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return f"{names[id(embedding)]}.weight", head and f"{names[id(head)]}.weight", tied


def _plan_embeddings(adapter: Adapter, base: Path, planned: Plan) -> None:
    """Resize the vocabulary; give a tied head a tensor of its own where the adapter changes it in another way."""
    embedding, head, tied = embeddings(base)
    changes, shapes = planned.changes, planned.shapes
    if tied and head != embedding:
        changed, head_changed = changes.get(embedding), changes.get(head)
        follows = not head_changed and (not changed or changed.rows or adapter.config.get("ensure_weight_tying"))
        if follows or (head_changed and _same(adapter, changed, head_changed)):
            changes.pop(head, None)
            if head in shapes and changed:  # a second copy of the shared weights
                changes[head] = changed
        else:
            planned.copies[head] = embedding
            shapes[head] = shapes[embedding]
    for name, change in changes.items():
        if name not in (embedding, head) and name in shapes and _new_shape(adapter, planned, name):
            other = adapter.shapes[change.replacement]
            raise _other_base(adapter, base, f"the adapter's {name} has the shape {other}, the base's {shapes[name]}.")
    rows = {}
    for name in filter(None, (embedding, head)):
        if name in shapes:
            change = changes.get(name)
            rows[name] = adapter.shapes[change.replacement][0] if change and change.replacement else shapes[name][0]
    if len(set(rows.values())) > 1:
        raise _other_base(
            adapter, base, f"the vocabulary has other sizes in the embedding and in the output head: {rows}."
        )
    if rows.get(embedding) not in (None, shapes[embedding][0]):
        planned.vocabulary = rows[embedding]


def _same(adapter: Adapter, change: Change | None, other: Change) -> bool:
    """Whether the head's change is the embedding's: LoRA's B A of the one is the other's transposed."""
    import torch

    if change is None:
        return False
    pairs = [(change.replacement, other.replacement), (change.rows, other.rows), (change.magnitude, other.magnitude)]
    if any((first is None) != (second is None) for first, second in pairs) or change.indices != other.indices:
        return False
    if any(first and not torch.equal(adapter.tensor(first), adapter.tensor(second)) for first, second in pairs):
        return False
    if change.a is None or other.a is None:
        return change.a is other.a
    if adapter.scaling(change.module) != adapter.scaling(other.module):
        return False
    return torch.equal(adapter.tensor(change.a), adapter.tensor(other.b).T) and torch.equal(
        adapter.tensor(change.b), adapter.tensor(other.a).T
    )


def tokenizer_files(adapter: Adapter, base: Path, planned: Plan) -> list[Path]:
    """The adapter's own tokenizer, if the vocabulary is resized and it has one; else none: the base's stays.

    Raises:
        UserError: the base's stays, and lacks a token that the adapter was trained with.
    """
    if planned.vocabulary:
        files = [adapter.folder / name for name in TOKENIZER_FILES if (adapter.folder / name).is_file()]
        # The base's template may be of two, of which the adapter has one as a file.
        return [file for file in files if file.name != NAME or not (base / NAME).exists()]
    files = [folder / "tokenizer.json" for folder in (adapter.folder, base)]
    if all(file.exists() for file in files):
        own, theirs = map(_added_tokens, files)
        for token in theirs.keys() | {_padding(adapter.folder)}:  # padding stands in no text
            own.pop(token, None)
        if own:
            token, number = max(own.items(), key=lambda item: item[1])
            _refuse_new_token(adapter, base, token, number, planned.shapes[embeddings(base)[0]][0])
    return []


def _refuse_new_token(adapter: Adapter, base: Path, token: str, number: int, rows: int) -> None:
    new = f"the adapter's tokenizer has the token {token!r} with the number {number}, "
    if number >= rows:
        raise _other_base(
            adapter,
            base,
            f"{new}but there is no embedding for it: the base's has {rows} rows, and none is in the adapter. Save the adapter with "
            "save_embedding_layers=True.",
        )
    raise UserError(
        f"{adapter.folder}: {new}which the tokenizer of {base} lacks: the merged model would read it in pieces. Copy the adapter's "
        "tokenizer.json and tokenizer_config.json into a local copy of the base model, and name that copy in fetch_model.source."
    )


def _padding(folder: Path) -> str | None:
    """The padding token that tokenizer_config.json names."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("pad_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(path: Path) -> dict[str, int]:
    try:
        return {token["content"]: token["id"] for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]}
    except (ValueError, KeyError, TypeError):
        return {}
