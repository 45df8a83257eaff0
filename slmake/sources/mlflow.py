"""MLflow model folders (`PyTorch.MLflow`, transformers flavours): where the Hugging Face folder is in them.

MLflow's own flavour (https://mlflow.org/docs/latest/ml/transformers) keeps the model in `model/` and the tokenizer in
`components/tokenizer/`; Azure Machine Learning's registries (`hftransformersv2`) in `data/model/` and `data/tokenizer/`.
"""

from pathlib import Path

import yaml

from slmake.errors import UserError

FLAVOURS = ("transformers", "hftransformersv2", "hftransformers")


def description(folder: Path) -> Path | None:
    """The MLmodel file of an MLflow model folder, here or one level deeper; None if it is not one."""
    for path in (folder / "MLmodel", *sorted(folder.glob("*/MLmodel"))):
        if path.is_file():
            return path
    return None


def parts(folder: Path) -> list[Path]:
    """The folders that together make the Hugging Face folder: the model's, then the tokenizer's where that is another one.

    Raises:
        UserError: the MLmodel file is damaged, of a flavour without a Hugging Face model, or names what is not there.
    """
    mlmodel = description(folder)
    assert mlmodel is not None
    root = mlmodel.parent
    try:
        flavours = yaml.safe_load(mlmodel.read_text(encoding="utf-8"))["flavors"]
        named = next((flavours[name] for name in FLAVOURS if name in flavours), None)
        binary = None if named is None else named.get("model_binary")
        if not (isinstance(flavours, dict) and isinstance(binary, str | None)):
            raise TypeError
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{mlmodel}: damaged: no list of flavors in it. Download the folder again.") from None
    if named is None:
        raise UserError(
            f"{mlmodel}: the flavors are {', '.join(map(str, flavours))}; a language model is read from {' or '.join(FLAVOURS)}. "
            "Log it with mlflow.transformers.log_model."
        )
    model = _first(root, [binary, "model", "data/model"], "config.json") or _configured(root)
    if model is None:
        raise UserError(
            f"{mlmodel}: no folder with a config.json below it: the Hugging Face model is missing. Download the folder again."
        )
    folders = [model]
    if not (model / "tokenizer_config.json").exists():
        tokenizer = _first(root, ["components/tokenizer", "data/tokenizer"], "tokenizer_config.json")
        if tokenizer is None:
            raise UserError(
                f"{mlmodel}: no tokenizer (tokenizer_config.json) in {model.name}, components/tokenizer or data/tokenizer."
            )
        folders.append(tokenizer)
    return folders


def _first(root: Path, names: list[str | None], file: str) -> Path | None:
    for name in filter(None, names):
        folder = (root / name).resolve()
        if folder.is_relative_to(root.resolve()) and (folder / file).exists():
            return root / name
    return None


def _configured(root: Path) -> Path | None:
    """The only folder that holds a config.json together with weights."""
    folders = [path.parent for path in sorted(root.rglob("config.json")) if any(path.parent.glob("*.safetensors"))]
    return folders[0] if len(folders) == 1 else None
