"""The ONNX Runtime GenAI model builder: options, export, and accuracy levels of single nodes."""

import contextlib
import fnmatch
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from slmake import outputs, params
from slmake.errors import NotBuildable
from slmake.export import runtime_template
from slmake.export.builder_fixes import fixed
from slmake.export.builder_fixes import replaced as replaced_name
from slmake.export.streaming import streamed
from slmake.machine_errors import is_of_machine


def builder_options(section: params.Quantize) -> dict[str, str]:
    """The builder's extra options (onnxruntime-genai 0.18 names), as KEY=VALUE text values."""
    options: dict[str, object] = {"hf_token": "false", "prune_lm_head": str(section.prune_lm_head).lower()}
    if section.precision in ("int4", "int8"):
        options |= {
            "block_size": section.block_size,
            "is_symmetric": str(section.is_symmetric).lower(),
            "accuracy_level": section.accuracy_level,
        }
    if section.precision == "int4":
        options["algo_config"] = section.algo_config
        if section.matmul_mixed_precision:
            options["matmul_mixed_precision"] = section.matmul_mixed_precision.replace(" ", "")
    if section.op_types_to_quantize:
        options["op_types_to_quantize"] = "/".join(section.op_types_to_quantize)
    if section.nodes_to_exclude:
        options["nodes_to_exclude"] = ",".join(section.nodes_to_exclude)
    if section.execution_provider in ("cuda", "webgpu"):
        options["fuse_qk_norm_gqa"] = "false"  # the CPU, on which exports for other devices are checked, cannot run it
    if section.shared_embeddings is not None:
        options["shared_embeddings"] = str(section.shared_embeddings).lower()
    return {key: str(value) for key, value in options.items()}


# The builder's names of a decoder layer's products, and the alternatives where it fuses or splits them.
PARTS = ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
ALTERNATIVES = {
    "attn/qkv_proj": ("attn/q_proj", "attn/k_proj", "attn/v_proj"),
    "mlp/gate_proj": ("mlp/gate_up_proj", "mlp/fc1"),
    "mlp/down_proj": ("mlp/fc2",),
}


def int8_overrides(section: params.Quantize, model: Path, parts: tuple[str, ...]) -> list[dict]:
    """The builder's structured overrides for `int8_nodes` and `matmul_mixed_precision`; it accepts exact names only.

    Raises:
        NotBuildable: a pattern that matches no name.
    """
    depth = json.loads((model / "config.json").read_text(encoding="utf-8")).get("num_hidden_layers", 0)
    names = [f"/model/layers.{layer}/{part}/MatMul" for layer in range(depth) for part in parts] + ["/lm_head/MatMul"]
    for pattern in section.int8_nodes:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            examples = f"{names[0]} and {names[-1]}"
            raise NotBuildable(f"quantize.int8_nodes: `{pattern}` matches no node. Names look like {examples}.")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in section.int8_nodes)]
    presets = [part.strip().split(":") for part in (section.matmul_mixed_precision or "").split(",") if part.strip()]
    overrides = [{"match": {"name": name}, "exclude": True} for name in section.nodes_to_exclude]
    overrides += [{"match": {"preset": preset}, "type": kind} for preset, kind in presets]
    return overrides + [{"match": {"name": name}, "type": "int8"} for name in chosen]


def shares_embeddings(section: params.Quantize, model: Path) -> bool:
    """Whether embedding and output head become one quantized matrix."""
    tied = json.loads((model / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)
    return bool(tied if section.shared_embeddings is None else section.shared_embeddings)


@contextlib.contextmanager
def no_git() -> Iterator[None]:
    """Hide Git from the model builder: it writes its Git revision into the graph, but reads that of the repository around .venv."""
    before = os.environ.get("GIT_DIR")
    os.environ["GIT_DIR"] = os.devnull
    try:
        yield
    finally:
        os.environ.pop("GIT_DIR")
        if before is not None:
            os.environ["GIT_DIR"] = before


@contextlib.contextmanager
def one_tokenizer(builder) -> Iterator[None]:
    """Load the tokenizer once: the builder asks for it three times, and one with a large vocabulary takes a second or more."""
    once = SimpleNamespace(from_pretrained=functools.cache(builder.AutoTokenizer.from_pretrained))
    with (
        replaced_name(builder, "AutoTokenizer", once),
        replaced_name(sys.modules[builder.Model.__module__], "AutoTokenizer", once),
    ):
        yield


def export(
    section: params.Quantize,
    model: Path,
    target: Path,
    scratch: Path,
    weights: Mapping[str, Callable[[], np.ndarray]] | None = None,
) -> list[str]:
    """Run the model builder in this process; its output goes to the log.

    Args:
        weights: by a product's name, what gives its weight, float32 [out, in], where that is not the model's own.

    Returns:
        Names of the builder's faults (`builder_fixes.FIXES`) that were worked around for this model.

    Raises:
        NotBuildable: the builder refuses the model or the options; the message has its reason.
    """
    from onnxruntime_genai.models import builder

    extra = [f"{key}={value}" for key, value in builder_options(section).items()]
    arguments = ("", str(model), str(target), section.precision, section.execution_provider, str(scratch))
    parts = PARTS
    if any(name in pattern for pattern in section.int8_nodes for name in ("q_proj", "k_proj", "/v_proj")):
        parts = replaced(parts, {"attn/qkv_proj"})
    while True:
        structured = structured_options(section, model, parts)
        try:
            with no_git(), one_tokenizer(builder), streamed(builder, weights or {}), fixed(builder) as needed:
                builder.create_model(*arguments, **builder.parse_extra_options(*arguments, extra, **structured))
            runtime_template.rewrite(target)
            return sorted(needed)
        except (ValueError, NotImplementedError, KeyError, AssertionError, AttributeError, OSError) as error:
            if is_of_machine(error) or getattr(error, "errno", None):
                raise
            unknown = {
                part for part in parts if "did not match an emitted node" in str(error) and f"/{part}/" in str(error)
            }
            if not unknown:
                raise NotBuildable(
                    f"the model builder refused {model}: {type(error).__name__}: {error}. "
                    "Check the section quantize, or the model's architecture."
                ) from error
            # This architecture has other nodes instead: try again with their names.
            parts = replaced(parts, unknown)
            for path in target.iterdir():
                outputs.remove(path)


def replaced(parts: tuple[str, ...], unknown: set[str]) -> tuple[str, ...]:
    """The names of a layer's products, with the alternatives of the unknown ones in their place."""
    return tuple(name for part in parts for name in (ALTERNATIVES.get(part, ()) if part in unknown else (part,)))


def structured_options(section: params.Quantize, model: Path, parts: tuple[str, ...]) -> dict:
    """The builder's structured configuration, which `int8_nodes` needs; empty without."""
    if not section.int8_nodes:
        return {}
    weights: dict = {"overrides": int8_overrides(section, model, parts)}
    if shares_embeddings(section, model):  # the builder adds this by itself only to its flat options
        weights["op_types"] = ["MatMul", "Gather"]
    return {"builder_config_version": 2, "target_options": {"quant_config": {"weights": weights}}}


def level_of(section: params.Quantize, node: str) -> int:
    """The accuracy level asked for, for a quantized product's name in the graph."""
    name = node.removesuffix("_Q4").removesuffix("_Q8")
    matching = [level for pattern, level in section.node_accuracy_levels.items() if fnmatch.fnmatchcase(name, pattern)]
    return matching[-1] if matching else section.accuracy_level


def set_accuracy_levels(section: params.Quantize, folder: Path) -> None:
    """Write `node_accuracy_levels` into the exported graph; the file of weights stays as it is.

    Raises:
        NotBuildable: a pattern that matches no quantized product.
    """
    import onnx

    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    names = [node.name.removesuffix("_Q4").removesuffix("_Q8") for node in nodes]
    for pattern in section.node_accuracy_levels:
        if not fnmatch.filter(names, pattern):
            raise NotBuildable(
                f"quantize.node_accuracy_levels: `{pattern}` matches no node. Names look like {names[0]} and {names[-1]}."
            )
    for node in nodes:
        others = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*others, onnx.helper.make_attribute("accuracy_level", level_of(section, node.name))])
    path.write_bytes(model.SerializeToString(deterministic=True))
