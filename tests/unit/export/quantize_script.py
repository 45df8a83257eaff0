"""What the tests of the script quantize share: its call, its parameters, and what an exported graph computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_params

from scripts import quantize
from slmake import params

PLAIN = {
    "precision": "int4",
    "execution_provider": "cpu",
    "algo_config": "rtn",
    "calibration": "none",
    "block_size": 32,
    "is_symmetric": True,
    "accuracy_level": 4,
    "node_accuracy_levels": {},
    "matmul_mixed_precision": None,
    "int8_nodes": [],
    "op_types_to_quantize": None,
    "nodes_to_exclude": [],
    "shared_embeddings": None,
    "prune_lm_head": False,
}
IDS = np.arange(2, 22, dtype=np.int32)


def run(folder: Path, model: Path, **changes: object) -> Path:
    """Run the script in this process; returns the exported folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_params(folder / "params.yaml", quantize={**PLAIN, **changes})
    target = folder / "build" / "onnx"
    quantize.main(["--params", str(file), "--model", str(model), "--output", str(target)])
    return target


def refused(folder: Path, capsys, model: Path, **changes: object) -> str:
    """The script's error; it exits with 1 and leaves nothing behind, no cache either."""
    with pytest.raises(SystemExit) as caught:
        run(folder, model, **changes)
    assert caught.value.code == 1
    assert not (folder / "build").exists() or list((folder / "build").iterdir()) == []
    message = capsys.readouterr().err
    return message[message.index("quantize: error: ") :]


def section(**changes: object) -> params.Quantize:
    return params.Quantize(**{**PLAIN, **changes})


def onnx_logits(folder: Path) -> np.ndarray:
    """Logits behind the last of the fixed tokens, through onnxruntime-genai."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(IDS) + 1)
    generator = og.Generator(model, settings)
    generator.append_tokens(IDS)
    return np.array(generator.get_output("logits"))[0, -1].astype(np.float64)


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0, -1].double().numpy()


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """KL divergence of two softmax distributions, in nats."""
    one, other = (x - np.log(np.exp(x - x.max()).sum()) - x.max() for x in (one, other))
    return float((np.exp(one) * (one - other)).sum())
