"""Fine-tune the base model with LoRA or QLoRA; save a PEFT adapter.

    python scripts/finetune.py --params params.yaml --base build/base --dataset build/dataset --output build/adapter \\
        --train-loss results/train_loss.csv --eval-loss results/eval_loss.csv --checkpoints build/checkpoints

Reads the section `finetune`, the base model and the tokenized train and eval splits. Writes adapter_config.json and
adapter_model.safetensors as `PeftModel.from_pretrained` loads them, and the loss curves. Killed at any moment and
started again, it goes on from its last checkpoint; a checkpoint of other inputs or parameters is never used.
On several GPUs, one process for each trains its share of every step (scripts/devices.py); `torchrun` works, too.

The same inputs give the same bytes on one machine: batches, dropout and learning rate are functions of the step alone,
so a resumed run and an undisturbed one do the same arithmetic.
"""

import csv
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import devices
from batches import Data, Schedule
from common import cli, outputs, params
from common.errors import UserError

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA

# What a checkpoint keeps of a Trainer beside its tensors and its step.
STATE = ("bad_evaluations", "best", "stopped", "window", "train_curve", "eval_curve")


def pick_device(number: int = 0):
    """The GPU of that number if there is one, else the CPU."""
    import torch

    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device):
    """The data type of the frozen base: `auto` is bfloat16 where its products are the faster ones, else float32.

    By the kind of processor, not by a timing, so that one machine always chooses the same. Measured (docs/log.md): AMD's
    AVX-512 does bfloat16 products at four times the float32 rate, Intel's without AMX at two thirds of it.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        processor = ""
    amd = "AuthenticAMD" in processor and "avx512_bf16" in processor
    return torch.bfloat16 if amd or torch.cpu._is_amx_tile_supported() else torch.float32


def load_model(section: params.Finetune, base: Path, device, place=None):
    """The base model with fresh adapters, ready to train on `device`; it lies there, or in `place`.

    Raises:
        UserError: the folder is missing or damaged, or target modules match nothing.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not (base / "config.json").exists():
        raise UserError(f"{base}: no model here. Build it with `snakemake --cores all {base}`.")
    dtype = pick_dtype(section.compute_dtype, device)
    quantization = None
    if section.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=section.quant_type,
            bnb_4bit_use_double_quant=section.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": place or device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:
        if "SafetensorError" in type(error).__name__ or "safetensors" in str(error).lower():
            raise UserError(
                f"{base}: truncated or corrupt weights: {error}. Fetch the model again: remove {base} and run snakemake."
            ) from None
        raise
    model.requires_grad_(False)
    for module in model.modules():
        # bitsandbytes' inference kernel repacks 4-bit weights in eval() for good and has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if isinstance(section.target_modules, list):
        # PEFT only complains if none of the names matches.
        names = [f".{name}" for name, _ in model.named_modules()]
        lost = [target for target in section.target_modules if not any(name.endswith(f".{target}") for name in names)]
        if lost and len(lost) < len(section.target_modules):
            raise UserError(f"finetune.target_modules: {lost} matches no module of this model.")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    torch.manual_seed(section.seed)
    config = LoraConfig(
        r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        peft = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        )
        raise UserError(
            f"finetune.target_modules: {section.target_modules} matches no module of this model. Linear modules there: {', '.join(linear)}."
        ) from error
    adapted = [module.get_base_layer() for module in peft.modules() if hasattr(module, "get_base_layer")]
    if any(layer is embedding or (tied and layer is head) for layer in adapted):
        raise UserError(
            "finetune.target_modules: an adapter on the input embedding, or on an output head that shares its weights, cannot be "
            "merged. Leave it out."
        )
    if section.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # The adapters stay in float32 even over a bfloat16 base (peft's default); the loss head sees label positions only.
    return peft


class Head:
    """Lets the output head compute logits at label positions only.

    The head is the largest matrix of a small model, and the loss is on a few tokens of each row: computing it for the
    rest is most of the waste of a plain forward pass. A hook picks the positions as one 2-D product; everything a model
    does to its logits afterwards stays as it is.
    """

    def __init__(self, model):
        self.positions = None
        head = model.get_output_embeddings()
        if head is None:
            raise UserError("finetune: this model has no output head: it is not a causal language model.")
        head.register_forward_pre_hook(self._pick)

    def _pick(self, _module, arguments):
        if self.positions is None:  # not asked yet: all of them
            return None
        hidden = arguments[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.positions], *arguments[1:])


def loss_sum(peft, head: Head, data: Data, chosen: np.ndarray, device, longest: float = 0):
    """Sum of the answer tokens' cross entropy over some sequences, float32 scalar tensor, and their number.

    Args:
        longest: sequences up to this length go through the model by `prefix.Layout` (0: as a plain padded batch).
    """
    import torch

    import prefix

    rows, places, targets = data.targets(chosen)
    wanted = torch.from_numpy(targets).to(device)
    if data.needed[chosen].max() <= longest:
        layout = prefix.Layout([data.row(one) for one in chosen], device)
        head.positions = layout.token[rows, places]
        logits = prefix.forward(peft, layout)
    else:
        batch = data.batch(chosen, device)
        time = batch["input_ids"].shape[1]
        head.positions = torch.from_numpy(rows * time + places).to(device)
        logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(len(wanted), -1).float(), wanted, reduction="sum")
    return loss, len(wanted)


def fingerprint(section: params.Finetune, base: Path, dataset: Path, dtype, world: int = 1) -> str:
    """Digest of everything a checkpoint depends on: parameters, base, dataset, scripts, libraries' versions, number of processes."""
    import hashlib

    import peft
    import torch
    import transformers

    parts = {
        "params": params.as_json(section),
        "base": outputs.folder_digest(base),
        "dataset": outputs.folder_digest(dataset),
        "scripts": [
            outputs.sha256(Path(__file__).with_name(name))
            for name in ("finetune.py", "batches.py", "devices.py", "fused.py", "lora.py", "prefix.py")
        ],
        "dtype": str(dtype),
        "world": world,
        "versions": [torch.__version__, transformers.__version__, peft.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Checkpoints:
    """The last state of this very run, in `folder/<fingerprint>/`; replaced whole, removed at the end."""

    def __init__(self, folder: Path, key: str):
        self.all, self.folder = folder, folder / key

    def save(self, step: int, tensors: dict, state: dict) -> None:
        """Write adapter, optimizer moments and curves; the previous checkpoint goes only when this one is whole."""
        from safetensors.torch import save_file

        target = self.folder / f"step-{step:08d}"
        if target.exists():
            return
        with outputs.written(target) as (temporary,):
            save_file(tensors, temporary / "tensors.safetensors")
            outputs.write_json(temporary / "state.json", {"step": step, **state})
        for old in self._steps()[:-1]:
            outputs.remove(old)

    def _steps(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def load(self, say: Callable[[str], None]) -> tuple[dict, dict] | None:
        """Tensors and state of the last checkpoint that is whole, or None; `say` is told of damaged ones, which go."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for folder in reversed(self._steps()):
            try:
                state = outputs.read_json(folder / "state.json", "step", *STATE)
                return load_file(folder / "tensors.safetensors"), state
            except (SafetensorError, FileNotFoundError, UserError) as error:
                reason = str(error).removeprefix(f"{folder}/").partition(". ")[0]
                say(f"the checkpoint {folder} is damaged and is discarded: {reason}")
                outputs.remove(folder)
        return None

    def remove(self) -> None:
        """All of this run's checkpoints, once its outputs are in place."""
        outputs.remove(self.folder)
        if self.all.is_dir() and not any(self.all.iterdir()):
            self.all.rmdir()


class Trainer:
    """Model, optimizer and curves of one run."""

    def __init__(
        self,
        section: params.Finetune,
        base: Path,
        dataset: Path,
        checkpoints: Path,
        job: cli.Job,
        group: devices.Group | None = None,
    ):
        import torch

        self.section, self.job, self.group = section, job, group or devices.Group()
        self.device = pick_device(self.group.local_rank)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory it did not write
        self.train, self.eval = Data(dataset / "train.parquet"), Data(dataset / "eval.parquet")
        if section.early_stopping_patience and not len(self.eval):
            raise UserError(
                "finetune.early_stopping_patience: the eval split is empty, so nothing says when to stop. Raise "
                "prepare.eval_fraction, or set early_stopping_patience to 0."
            )
        self.schedule = Schedule(section, self.train.lengths)
        key = None
        if self.group.first:
            dtype = pick_dtype(section.compute_dtype, self.device)
            key = fingerprint(section, base, dataset, dtype, self.group.world)
        self.checkpoints = Checkpoints(checkpoints, self.group.agree(key))
        if section.sharding == "full" and self.group.world > 1:
            with self.group.turn():
                self._load(base, place=torch.device("cpu"))
                kept = {value for value in self.peft.parameters() if value.requires_grad}
                held, of = self.group.shard(self.peft, self.device, kept)
                self.job.log(f"holds {held} of {of} weights of the base")
        else:
            self._load(base)
        self.longest = self._longest()
        self.trained = {name: value for name, value in self.peft.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=section.learning_rate,
            betas=(section.adam_beta1, section.adam_beta2),
            weight_decay=section.weight_decay,
            fused=True,
        )
        self.step, self.bad_evaluations, self.best, self.stopped = 0, 0, None, False
        self.best_tensors: dict | None = None
        self.train_curve: list[list] = []
        self.eval_curve: list[list] = []
        self.window = [0.0, 0]  # loss sum and answer tokens since the last line of the curve
        self._resume()

    def _load(self, base: Path, place=None) -> None:
        """The model with its fused operations, on its device or first in `place`."""
        import fused
        import lora

        section = self.section
        self.peft = load_model(section, base, self.device, place)
        self.head = Head(self.peft.get_base_model())
        together = section.qat == "none"
        replaced = {"lora": lora.fuse(self.peft, together, settled=together and section.sharding == "none")}
        if self.device.type == "cpu":
            replaced |= fused.fuse(self.peft.get_base_model())
        self.qat = None
        if section.qat != "none":
            chosen, rate = section.qat_target_modules, section.qat_rate
            self.qat = lora.QuantizationAware(self.peft, section.qat_block_size, chosen, rate, section.seed)
            names = {name.rsplit(".", 1)[-1] for name in self.qat.layers}
            lost = [] if isinstance(chosen, str) else [name for name in chosen if name not in names]
            if lost or not names:
                raise UserError(f"finetune.qat_target_modules: {lost or chosen} matches no layer that has an adapter.")
        self.job.log(f"fused: {replaced}, qat {section.qat}")

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        found = self.group.agree(self.checkpoints.load(self.job.say) if self.group.first else None)
        if found is None:
            return
        import torch

        tensors, state = found
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(tensors[f"adapter/{name}"])
                if f"exp_avg/{name}" in tensors:
                    self.optimizer.state[value] = {
                        "step": tensors[f"step/{name}"],
                        "exp_avg": tensors[f"exp_avg/{name}"].to(self.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(self.device),
                    }
        best = {name.removeprefix("best/"): value for name, value in tensors.items() if name.startswith("best/")}
        self.best_tensors = best or None
        for name in ("step", *STATE):
            setattr(self, name, state[name])
        self.job.say(f"goes on from step {self.step} of {self.schedule.steps}")

    def _save(self) -> None:
        self.group.check_same(self.trained.values(), self.step)
        if not self.group.first:
            return
        tensors = {}
        for name, value in self.trained.items():
            moments = self.optimizer.state[value]
            tensors[f"adapter/{name}"] = value.detach().contiguous()
            tensors[f"step/{name}"] = moments["step"]
            tensors[f"exp_avg/{name}"], tensors[f"exp_avg_sq/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        for name, value in (self.best_tensors or {}).items():
            tensors[f"best/{name}"] = value
        self.checkpoints.save(self.step, tensors, {name: getattr(self, name) for name in STATE})

    def _longest(self) -> float:
        """Longest sequence that goes through the model by `prefix.Layout`; 0 where the model cannot, or gives another result."""
        import prefix

        longest = prefix.share(self.peft.get_base_model())
        vocabulary = self.peft.get_input_embeddings().num_embeddings
        if longest and not prefix.agrees(self.peft, vocabulary, self.device):
            longest = 0
        self.job.log(
            f"what all rows of a batch begin with is computed {'once' if longest else 'for each: not with this model'}"
        )
        return longest

    def _loss(self, data: Data, chosen: np.ndarray):
        return loss_sum(self.peft, self.head, data, chosen, self.device, self.longest)

    # -- one step --------------------------------------------------------------------------------------------------

    def _optimizer_step(self) -> tuple[float, float, int]:
        """Forward, backward and update; returns the mean loss, the learning rate and the number of real tokens."""
        import torch

        if self.qat:
            self.qat.refresh(self.step)
        rate = self.schedule.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        chosen = self.schedule.batches(self.step)
        rows = np.concatenate(chosen)
        wanted = int(self.train.answers[rows].sum())
        total = 0.0
        for number, one, counts in self.group.share(chosen):
            # Dropout depends on the step alone, so that a resumed run draws what an undisturbed one does.
            torch.manual_seed((self.section.seed * 1_000_003 + self.step * 1009 + number) % 2**63)
            loss, _ = self._loss(self.train, one)
            if not counts:
                loss = loss * 0
            (loss / wanted).backward()
            total += loss.item()
        (total,) = self.group.sums(total)
        self.group.add_gradients(self.trained.values())
        if not math.isfinite(total):
            named = sorted(int(row) for row in self.train.rows[rows])
            raise UserError(
                f"the loss is {total} at step {self.step + 1} (rows {', '.join(map(str, named[:32]))} of the dataset). Lower "
                "finetune.learning_rate, set max_grad_norm, or look at these rows."
            )
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.section.max_grad_norm or math.inf)
        if not math.isfinite(float(norm)):
            raise UserError(f"the gradient is not finite at step {self.step + 1}. Lower finetune.learning_rate.")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.window[0] += total
        self.window[1] += wanted
        return total / wanted, rate, int(self.train.real[rows].sum())

    def evaluate(self) -> float | None:
        """Mean cross entropy per answer token on the eval split; None if it is empty."""
        import torch

        if not len(self.eval):
            return None
        if self.qat:
            self.qat.refresh(None)
        self.peft.eval()
        total, count = 0.0, 0
        order = np.argsort(-self.eval.lengths, kind="stable")
        size = self.section.per_device_train_batch_size
        with torch.no_grad():
            for _, one, counts in self.group.share([order[i : i + size] for i in range(0, len(order), size)]):
                loss, wanted = self._loss(self.eval, one)
                if counts:
                    total, count = total + loss.item(), count + wanted
        total, count = self.group.sums(total, count)
        self.peft.train()
        return total / count

    def _note_evaluation(self) -> None:
        loss = self.evaluate()
        if loss is None:
            return
        self.eval_curve.append([self.step, round(self.schedule.epoch(self.step), 4), round(loss, 6)])
        if not self.section.early_stopping_patience:
            return
        if self.best is None or loss < self.best - self.section.early_stopping_threshold:
            self.best, self.bad_evaluations = loss, 0
            self.best_tensors = {name: value.detach().clone() for name, value in self.trained.items()}
        else:
            self.bad_evaluations += 1
            self.stopped = self.bad_evaluations >= self.section.early_stopping_patience

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """All remaining steps. Returns steps, tokens, seconds and the final losses."""
        section, total = self.section, self.schedule.steps
        self.peft.train()
        began, tokens, loss = time.monotonic(), 0, float("nan")
        with self.job.progress(total, "steps", initial=self.step) as bar:
            while self.step < total and not self.stopped:
                loss, rate, count = self._optimizer_step()
                self.step += 1
                tokens += count
                last = self.step == total
                if self.step % section.logging_steps == 0 or last:
                    mean = self.window[0] / self.window[1]
                    self.train_curve.append(
                        [self.step, round(self.schedule.epoch(self.step), 4), round(mean, 6), float(f"{rate:.6g}")]
                    )
                    self.window = [0.0, 0]
                if last or (section.eval_steps and self.step % section.eval_steps == 0):
                    self._note_evaluation()
                if self.step % section.save_steps == 0 and not last:
                    self._save()
                bar.update(1, loss=f"{loss:.3f}", **{"tokens/s": f"{tokens / (time.monotonic() - began):.0f}"})
        if self.window[1]:
            rate = self.schedule.learning_rate(self.step - 1)
            mean = self.window[0] / self.window[1]
            self.train_curve.append(
                [self.step, round(self.schedule.epoch(self.step), 4), round(mean, 6), float(f"{rate:.6g}")]
            )
        if self.best_tensors is not None:
            import torch

            with torch.no_grad():
                for name, value in self.trained.items():
                    value.copy_(self.best_tensors[name])
        self.group.check_same(self.trained.values(), self.step)
        seconds = time.monotonic() - began
        return {"steps": self.step, "tokens": tokens, "seconds": seconds, "stopped": self.stopped}

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT does, without what differs between runs (order of sets, its model card)."""
        # An adapted output head is frozen like the rest: its weights are the base's.
        self.peft.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, value in config.items():
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                config[key] = sorted(value)
        outputs.write_json(path, dict(sorted(config.items())))


def write_curve(path: Path, header: list[str], lines: list[list]) -> None:
    """A loss curve as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--dataset", type=Path, required=True, help="the tokenized dataset's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the adapter to")
    parser.add_argument("--train-loss", type=Path, required=True, help="CSV file for the training loss")
    parser.add_argument("--eval-loss", type=Path, required=True, help="CSV file for the loss on the eval split")
    parser.add_argument("--checkpoints", type=Path, default=Path("build/checkpoints"), help="folder for checkpoints")
    parser.add_argument(
        "--nproc-per-node",
        default="auto",
        help="processes that train together on each node (default, auto: one per GPU)",
    )
    args = parser.parse_args(argv)
    if devices.launch(args.nproc_per_node, Path(__file__), sys.argv[1:] if argv is None else argv, args.log):
        return
    with cli.job("finetune", devices.one_voice(args.log)) as job, devices.joined() as group:
        section = params.section(args.params, "finetune")
        if not group.first:
            Trainer(section, args.base, args.dataset, args.checkpoints, job, group).run()
            return
        with outputs.written(args.output, [args.train_loss, args.eval_loss]) as (folder, train_loss, eval_loss):
            trainer = Trainer(section, args.base, args.dataset, args.checkpoints, job, group)
            job.log(
                f"{sum(v.numel() for v in trainer.trained.values()):,} trained parameters, on {trainer.device}, "
                f"{trainer.schedule.steps} steps, {group.world} processes"
            )
            done = trainer.run()
            trainer.save_adapter(folder)
            write_curve(train_loss, ["step", "epoch", "loss", "learning_rate"], trainer.train_curve)
            write_curve(eval_loss, ["step", "epoch", "loss"], trainer.eval_curve)
        trainer.checkpoints.remove()
        end = f", eval loss {trainer.eval_curve[-1][2]:.3f}" if trainer.eval_curve else ""
        early = " (stopped early)" if done["stopped"] else ""
        speed = done["tokens"] / done["seconds"] if done["seconds"] else 0
        job.say(
            f"{done['steps']} steps{early}, loss {trainer.train_curve[-1][2]:.3f}{end}, {speed:.0f} tokens/s, {job.seconds():.0f} s: {args.output}"
        )


if __name__ == "__main__":
    main()
