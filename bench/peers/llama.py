"""llama.cpp answers prompts greedily, one by one: milliseconds of each."""

import argparse
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: a list of lists of token ids")
    parser.add_argument("--tokens", type=int, required=True, help="new tokens of each answer")
    args = parser.parse_args()
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    began = time.monotonic()
    model = llama_cpp.Llama(
        str(args.model), n_ctx=512, n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1, verbose=False
    )
    load = time.monotonic() - began
    prompts = json.loads(args.prompts.read_text(encoding="utf-8"))
    waits = []
    for number, prompt in enumerate(prompts[:3] + prompts):
        began = time.perf_counter()
        model.reset()
        model.eval(prompt)
        for step in range(args.tokens):
            token = model.sample(temp=0.0, top_k=1)
            if step < args.tokens - 1:
                model.eval([token])
        if number >= 3:  # the first three warm up
            waits.append(1000 * (time.perf_counter() - began))
    print(json.dumps({"milliseconds": waits, "load_s": load}), flush=True)


if __name__ == "__main__":
    main()
