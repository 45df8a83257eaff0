"""An exported model answers prompts greedily with onnxruntime-genai, loaded as run.py loads it, one by one: milliseconds of each.

python -m bench.latency_runner --model build/onnx-int4 --prompts prompts.json --tokens 4
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of an exported model")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: a list of lists of token ids")
    parser.add_argument("--tokens", type=int, required=True, help="new tokens of each answer")
    args = parser.parse_args()
    import onnxruntime_genai as og

    from slmake.generation import Exported

    began = time.monotonic()
    model = Exported(args.model).model
    load = time.monotonic() - began
    prompts = json.loads(args.prompts.read_text(encoding="utf-8"))
    waits = []
    for number, prompt in enumerate(prompts[:3] + prompts):
        began = time.perf_counter()
        settings = og.GeneratorParams(model)
        length = len(prompt) + args.tokens
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)  # no early end
        generator = og.Generator(model, settings)
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
        for _ in range(args.tokens):
            generator.generate_next_token()
        if number >= 3:  # the first three warm up
            waits.append(1000 * (time.perf_counter() - began))
    print(json.dumps({"milliseconds": waits, "load_s": load}), flush=True)


if __name__ == "__main__":
    main()
