"""The mean cross entropy per answer token of adapters on the same test rows, in float32.

python -m bench.loss --base build/base --dataset build/dataset --adapters build/adapter OTHER
"""

import argparse
import json
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=128, help="test rows (default: 128)")
    args = parser.parse_args()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from slmake.training.data import IGNORED, Data

    data = Data(args.dataset / "test.parquet")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses = []
    for adapter in args.adapters:
        model = AutoModelForCausalLM.from_pretrained(
            args.base, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        ).to(device)
        model = PeftModel.from_pretrained(model, adapter).to(device).eval()
        total, count = 0.0, 0
        with torch.inference_mode():
            for rows in np.array_split(np.arange(min(args.rows, len(data))), max(1, args.rows // 16)):
                batch = data.batch(rows, device)
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                wanted = batch["labels"][:, 1:]
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                total, count = total + float(loss), count + int((wanted != IGNORED).sum())
        losses.append(total / count)
    print(json.dumps({"losses": losses}), flush=True)


if __name__ == "__main__":
    main()
