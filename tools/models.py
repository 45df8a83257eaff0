"""Try a small twin of every model that people name, and write the table docs/models.md.

    python -m tools.models --output docs/models.md

Reads tools/models.yaml (figures of the models' published configurations), params.yaml and the dataset that it names; nothing is
downloaded. A twin has its model's layer types, head size, norms, rotary style and window, few layers and heads, random weights, and a
vocabulary of 520. It is trained, merged and exported as params.yaml asks for, with the checks of `rehearse`, and exported for CUDA.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

from slmake import cli, outputs, params
from slmake.data.dataset import Preparation
from slmake.errors import UserError
from slmake.export.families import unsupported
from slmake.params.dataset_files import source_files
from slmake.rehearsal import chain, checks
from slmake.rehearsal.tokenizer import SIZE, make_tokenizer

MODELS = Path(__file__).with_suffix(".yaml")
# Eight rows of the embedding have no token: the vocabulary must not be as large as another layer of the twin.
SMALL_VOCABULARY = {"vocab_size": SIZE + 8, "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 0}
ROWS = 16  # for calibration
STAGES = ["finetune", "merge", "quantize"]


class Sizes(NamedTuple):
    """What a model's configuration says about its size."""

    parameters: int
    bfloat16: int  # bytes on disk
    int4: int  # bytes of an int4 export for the CPU; estimated


class Trial(NamedTuple):
    """What a model's twin did."""

    refused: str | None  # why, in one line
    parity: dict[str, float]  # largest difference of the fp32 export's logits, by tokens of the prompt
    fixes: list[str]  # faults of the model builder that were worked around
    cuda: float | None  # largest difference of the CUDA export's logits from the CPU's


def configuration(fields: dict):
    """The transformers configuration of an entry's `config` in tools/models.yaml."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[fields["model_type"]]
    return AutoConfig.for_model(**fields, architectures=[architecture])


def sizes(config) -> Sizes:
    """Parameters, and bytes on disk, of a transformers configuration.

    The int4 estimate: every matrix in 4 bits with a float32 scale for each block of 32; embeddings that are not tied to the output
    head, norms and the tables of rotary embeddings in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    matrices = {
        module.weight: module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    }
    total, quantized = model.num_parameters(), sum(matrices.values())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tables = int(config.max_position_embeddings * head_dim * (getattr(config, "partial_rotary_factor", None) or 1))
    return Sizes(total, 2 * total, int(quantized * (0.5 + 4 / 32) + 4 * (total - quantized + tables)))


def write_base(config, folder: Path, tokenizer: Path) -> None:
    """Write a model's configuration, with a small vocabulary and the small tokenizer, as the base that `rehearse` takes a twin of."""
    config.update(SMALL_VOCABULARY)
    config.save_pretrained(folder)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def trial(config, everything: params.Params, dataset: Path, tokenizer: Path, scratch: Path, job: cli.Job) -> Trial:
    """Try the chain on a twin of the configured model."""
    reason = unsupported(config.to_dict())
    if reason:
        return Trial(reason, {}, [], None)
    base, work = scratch / "base", scratch / "work"
    write_base(config, base, tokenizer)
    depth = config.num_hidden_layers
    try:
        exported = checks.rehearse(everything, base, dataset, work, job)["export"]
        merged = work / "merged"
        section = chain.for_twin(everything.quantize, merged, depth).model_copy(update={"execution_provider": "cuda"})
        chain.export(section, merged, dataset, work / "cuda", job)
        prompts = chain.prompts_of(dataset, checks.lengths(base))
        logits = [chain.exported_logits(work / name, prompts) for name in ("asked", "cuda")]
    except UserError as error:
        return Trial(" ".join(str(error).split()), {}, [], None)
    finally:
        outputs.remove(base)
        outputs.remove(work)
    fixes = exported["graph"].get("builder_fixes", [])
    return Trial(None, exported["fp32_difference_by_prompt_tokens"], fixes, chain.difference(*logits))


def prepare(everything: params.Params, folder: Path, job: cli.Job) -> tuple[Path, Path]:
    """Make a small tokenizer, and the dataset with its tokens, in `folder`. Returns both folders."""
    if everything.prepare is None:
        raise UserError("the twins are trained on rows of the dataset: params.yaml needs the section prepare.")
    tokenizer, dataset = folder / "tokenizer", folder / "dataset"
    rows = Path(source_files(everything.prepare)["train"]).read_text(encoding="utf-8")
    make_tokenizer(tokenizer, rows.splitlines())
    dataset.mkdir()
    Preparation(everything.prepare, tokenizer, dataset, job, scored=False).run(folder)
    return tokenizer, dataset


INTRODUCTION = """# Models

<!-- written by `make models`; do not edit -->

What slmake does with the models that people name. Each was tried by a twin. A twin has the layer types, head size,
norms, rotary style and window of the real configuration (`tools/models.yaml`). It has few layers and heads, random
weights and a vocabulary of {vocabulary}. Quality and speed of the real model are not in this table.
`make rehearse` tries your own base model, with its own tokenizer, and estimates memory, time and disk.

- **parameters**, **bfloat16**: computed from the configuration; size on disk.
- **int4**: estimated size of the export: every matrix in 4 bits, in blocks of 32. params.yaml may keep some in 8 bits.
- **fp32 parity**: how far the fp32 export's logits are from those of transformers. The figure is the largest
  difference as a share of the logits' spread; {tolerance:g} is allowed.
- **prompts**: tokens of the prompts compared. Where the model has a sliding window, or changes its rotary factors at a
  length, one prompt is longer, up to {longest:,} tokens.
- **CPU**: the {precision} export of params.yaml has what was asked for, loads and generates.
  GPTQ ran on {rows} rows.
- **CUDA**: the same for `execution_provider: cuda`. No GPU was used: the export ran on the CPU provider. The figure is
  the largest difference of its logits from the CPU export's, as a share of their spread; it computes in 16 bits.
- **workaround**: the model builder's fault that slmake works around (slmake/export/builder_fixes.py).
"""


def page(everything: params.Params, models: dict, measured: dict[str, tuple[Sizes, Trial]]) -> str:
    """The page as Markdown."""
    section = everything.quantize
    text = INTRODUCTION.format(
        vocabulary=SMALL_VOCABULARY["vocab_size"],
        tolerance=everything.rehearse.logits_tolerance,
        longest=checks.LONGEST,
        precision=section.precision,
        rows=ROWS,
    )
    works = [
        "model",
        "tokenizer",
        "parameters",
        "bfloat16",
        "int4",
        "train",
        "merge",
        "fp32 parity",
        "prompts",
        "CPU",
        "CUDA",
        "workaround",
    ]
    rows, refused = (
        [works, ["---"] * len(works)],
        [["model", "tokenizer", "parameters", "bfloat16", "reason"], ["---"] * 5],
    )
    for name, (size, result) in measured.items():
        start = [name, models[name]["tokenizer"], count(size.parameters), gigabytes(size.bfloat16)]
        if result.refused:
            refused.append([*start, result.refused])
            continue
        parity, prompts = (
            f"{max(result.parity.values()):.1e}",
            ", ".join(f"{int(tokens):,}" for tokens in result.parity),
        )
        fixes = ", ".join(f"`{fix}`" for fix in result.fixes)
        rows.append([*start, gigabytes(size.int4), "yes", "yes", parity, prompts, "yes", f"{result.cuda:.1e}", fixes])
    text += f"\n## Models that work ({len(rows) - 2})\n\n{table(rows)}"
    return text + f"\n## Models that are refused before training ({len(refused) - 2})\n\n{table(refused)}"


def table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def count(parameters: int) -> str:
    """A number of parameters as people name it."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--models", type=Path, default=MODELS, help=f"configurations (default: {MODELS.name} beside this)"
    )
    parser.add_argument("--output", type=Path, required=True, help="page to write, such as docs/models.md")
    args = parser.parse_args(argv)
    with cli.job("models", args.log) as job:
        models = yaml.safe_load(args.models.read_text(encoding="utf-8"))
        everything = params.load(args.params)
        few_rows = everything.quantize.model_copy(update={"calibration_rows": ROWS})
        stages = everything.all.model_copy(update={"stages": STAGES})
        everything = everything.model_copy(update={"all": stages, "quantize": few_rows})
        measured = {}
        with tempfile.TemporaryDirectory() as folder:
            tokenizer, dataset = prepare(everything, Path(folder), job)
            for name, entry in models.items():
                size = sizes(configuration(entry["config"]))
                result = trial(configuration(entry["config"]), everything, dataset, tokenizer, Path(folder, name), job)
                measured[name] = (size, result)
                job.say(f"{name}: {result.refused or 'works'} ({job.seconds():.0f} s)")
        args.output.write_text(page(everything, models, measured), encoding="utf-8")


if __name__ == "__main__":
    main()
