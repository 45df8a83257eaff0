"""PEFT's `merge_and_unload`, in the base's own data type, and `save_pretrained`."""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "adapter", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto", trust_remote_code=False)
    PeftModel.from_pretrained(model, args.adapter).merge_and_unload().save_pretrained(args.output)
    print(json.dumps({"merged": True}))


if __name__ == "__main__":
    main()
