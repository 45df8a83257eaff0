"""Fine-tuning with an instruction in front of every row: what all rows of a batch begin with is computed once by us, for each row by the peers.

As `finetune`, with a prompt that first says what is asked, as most people's prompts do; fewer steps (--instruction-steps), because the
peers' are longer. Tokens are those of the rows, the instruction's counted in each of them, for everyone.
"""

import argparse
import json
import statistics

from bench import finetune, measure
from bench.measure import ROOT, SCRATCH
from bench.results import bar, ratios

INSTRUCTION = """### Instruction:
You read short texts that people wrote about their day. Say which one of four tones a text has: sadness if the writer has lost
or misses something, joy if something good has happened to them, fear if they expect something bad, and surprise if something
has happened that they had not expected at all. Choose the tone of the writer, not that of the events. Answer with one word.
"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instruction-steps", type=int, default=8, help="instruction: optimizer steps (default: 8)")


def bench(args: argparse.Namespace) -> dict:
    base = measure.need(ROOT / "build" / "base")
    work = measure.fresh(SCRATCH / "instruction")
    steps, room = args.instruction_steps, 256
    changes = {
        "prepare": {"text_template": INSTRUCTION + "### Text: {phrase}\n### The tone is:\n{tone}", "max_seq_len": room},
        "finetune": {"max_steps": steps, "eval_steps": 0, "save_steps": 10**6},
    }
    params = measure.params(work / "params.yaml", **changes)
    arguments = ["--params", params, "--base", base, "--output", work / "prepared", "--report", work / "report.json"]
    measure.script("prepare", *arguments)
    data = finetune.without_eval(work / "prepared", work / "dataset")
    finetune.write_rows(data, work / "rows.jsonl")
    hyper = finetune.hyper_parameters(steps, finetune.our_dtype()) | {"max_seq_len": room}
    (work / "hyper.json").write_text(json.dumps(hyper), encoding="utf-8")
    contenders = {"ours": lambda number: finetune.ours(params, base, data, work / f"ours-{number}")}
    for name in args.peers:
        contenders[name] = lambda number, name=name: finetune.theirs(
            name, base, work / "rows.jsonl", work / "hyper.json", work / f"{name}-{number}"
        )
    runs = measure.interleaved(args.rounds, **contenders)
    adapters = [runs[name][0]["adapter"] for name in runs]
    losses, _ = measure.runner("loss", "--base", base, "--dataset", work / "prepared", "--adapters", *adapters)
    speed = {name: [run["tokens_per_s"] for run in samples] for name, samples in runs.items()}
    bars = [
        bar(f"instruction: tokens/s over {finetune.SHOWN[name]}", ratios(speed["ours"], speed[name]))
        for name in args.peers
    ]
    table = [["", "tokens/s (median)", "peak memory, MB", "loss on test answers"]]
    for (name, values), loss in zip(speed.items(), losses["losses"], strict=True):
        peak = statistics.median(run["peak_bytes"] for run in runs[name])
        table.append([name, f"{statistics.median(values):.0f}", f"{peak / 1e6:.0f}", f"{loss:.3f}"])
    count = finetune.count_work(params, data)
    rows = len(count["lengths"])
    notes = [
        f"{steps} steps of {rows // steps} rows, {count['tokens'] / rows:.1f} tokens a row; {count['states'] / count['tokens']:.0%} of them are computed."
    ]
    return {"bars": bars, "tables": [table], "notes": notes, "runs": runs}
