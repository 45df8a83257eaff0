"""The model families that can be exported: those whose export was compared with transformers, logit by logit."""

# tests/unit/export/test_families.py exports a small model of each and compares it.
PROVEN = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM"),
    *("Ernie4_5ForCausalLM", "HunYuanDenseV1ForCausalLM", "Lfm2ForCausalLM"),
)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # their number in config.json


def mixture_of_experts(config: dict) -> str | None:
    """Why a mixture of experts cannot be built, in one line; None for a dense model.

    Args:
        config: the content of its config.json.
    """
    if not any((config.get(name) or 0) > 1 for name in EXPERTS):
        return None
    return f"{_architecture(config)} is a mixture of experts, which cannot be fine-tuned and exported here. Use a dense model."


def unsupported(config: dict) -> str | None:
    """Why a model cannot be exported, in one line; None where it can.

    Args:
        config: the content of its config.json.
    """
    architecture = _architecture(config)
    reason = mixture_of_experts(config)
    if reason:
        return reason
    if architecture not in PROVEN:
        return f"the architecture {architecture} was not proven to export right. Proven: {', '.join(PROVEN)}."
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if isinstance(kind, str) and kind not in ("default", "linear", "dynamic", "llama3", "longrope", "yarn"):
        return f"rope_type {kind} cannot be exported. Use a model with another one."
    return None


def _architecture(config: dict) -> str:
    return (config.get("architectures") or ["none"])[0]
