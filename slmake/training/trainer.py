"""The training loop: steps, evaluation, early stopping, checkpoints, loss curves."""

import csv
import json
import math
import os
import time
from pathlib import Path

import numpy as np

from slmake import cli, memory, outputs, params
from slmake.errors import UserError
from slmake.training import distributed
from slmake.training.checkpoints import STATE, Checkpoints, fingerprint
from slmake.training.data import Data
from slmake.training.model import Head, load_model, loss_sum, pick_device, pick_dtype
from slmake.training.schedule import Schedule

# Kernels and buffers that oneDNN keeps, for shapes of batches that it has seen. Its own bounds, 1024 each, let a hundred different
# shapes take a gigabyte; these hold those of one training step.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


def room_to_pack(parameters: int) -> bool:
    """Whether bfloat16 weights and two packed copies fit into half of the memory that this process may use."""
    return 3 * 2 * parameters <= memory.available() / 2


class Trainer:
    """Model, optimizer and loss curves of a run.

    Args:
        parameters: number of parameters of the whole model, where `base` has a part of its layers.
    """

    def __init__(
        self,
        section: params.Finetune,
        base: Path,
        dataset: Path,
        checkpoints: Path,
        job: cli.Job,
        group: distributed.Group | None = None,
        parameters: int | None = None,
    ):
        for name, capacity in KERNEL_CACHES.items():
            os.environ.setdefault(name, capacity)
        import torch

        self.parameters = parameters
        self.section, self.job, self.group = section, job, group or distributed.Group()
        self.device = pick_device(self.group.local_rank)
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # without it, no matrix product on CUDA is deterministic
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory it did not write
        self.train, self.eval = Data(dataset / "train.parquet"), Data(dataset / "eval.parquet")
        for field, use, off in (("early_stopping_patience", "stop", "0"), ("keep_best", "choose", "false")):
            if getattr(section, field) and not len(self.eval):
                raise UserError(
                    f"finetune.{field}: the eval split is empty, so there is no loss to {use} by. Raise prepare.eval_fraction, or set "
                    f"{field} to {off}."
                )
        self.schedule = Schedule(section, self.train.sequence_lengths)
        # Of each process; 0 on a GPU, where they compute nothing.
        self.threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        self._load(base)
        key = None
        if self.group.is_main_process:
            dtype = pick_dtype(section.compute_dtype, self.device)
            key = fingerprint(section, base, dataset, dtype, self.group.world, self.threads, self.packed)
        self.checkpoints = Checkpoints(checkpoints, self.group.broadcast(key))
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

    def _load(self, base: Path) -> None:
        """The model on its device, or a shard of it, and the longest row that it can compute with a shared prefix."""
        import torch

        if self.section.sharding == "full" and self.group.world > 1:
            with self.group.in_turn():
                self._load_fused(base, load_on=torch.device("cpu"))
                trained = {value for value in self.peft.parameters() if value.requires_grad}
                local, total = self.group.shard(self.peft, self.device, trained)
                self.job.log(f"has {local} of {total} weights of the base")
        else:
            self._load_fused(base)
        self.max_shared_len = self._max_shared_len()

    def _load_fused(self, base: Path, load_on=None) -> None:
        """The model with its fused operations."""
        from slmake.training import fused_ops, gpu_ops, lora_linear, qat

        section = self.section
        self.peft = load_model(section, base, self.device, load_on)
        self.head = Head(self.peft.get_base_model())
        join = section.qat == "none"
        weights_fixed = join and section.sharding == "none"
        self.packed = weights_fixed and self._pack()
        replaced = {"lora": lora_linear.fuse(self.peft, join, weights_fixed, self.packed)}
        operations = fused_ops if self.device.type == "cpu" else gpu_ops
        replaced |= operations.fuse(self.peft.get_base_model())
        self.qat = None
        if section.qat != "none":
            targets, rate = section.qat_target_modules, section.qat_rate
            self.qat = qat.QuantizationAware(self.peft, section.qat_block_size, targets, rate, section.seed)
            names = {name.rsplit(".", 1)[-1] for name in self.qat.layers}
            unmatched = [] if isinstance(targets, str) else [name for name in targets if name not in names]
            if unmatched or not names:
                raise UserError(
                    f"finetune.qat_target_modules: {unmatched or targets} matches no layer that has an adapter."
                )
        self.job.log(f"fused: {replaced}, qat {section.qat}")

    def _pack(self) -> bool:
        """Whether to pack the base's weights for faster products; one log line says so."""
        from slmake.training import lora_linear

        layers = lora_linear.lora_layers(self.peft).values()
        if not layers or not all(lora_linear.packable(layer.get_base_layer().weight) for layer in layers):
            return False
        parameters = self.parameters or sum(value.numel() for value in self.peft.parameters())
        pack = room_to_pack(parameters)
        self.job.log(
            f"weights of {parameters / 1e9:.2f} billion parameters are {'' if pack else 'not '}packed: "
            f"two more copies, in {memory.available() / 1e9:.1f} GB of memory"
        )
        return pack

    def _max_shared_len(self) -> float:
        """Longest sequence that is computed with a shared prefix; 0 if the model cannot, or if its logits differ."""
        from slmake.training import shared_prefix

        limit = shared_prefix.share(self.peft.get_base_model())
        vocabulary = self.peft.get_input_embeddings().num_embeddings
        if limit and not shared_prefix.agrees(self.peft, vocabulary, self.device):
            limit = 0
        self.job.log(f"shared-prefix computation: {'on' if limit else 'off, this model does not support it'}")
        return limit

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        checkpoint = self.checkpoints.load(self.job.say) if self.group.is_main_process else None
        checkpoint = self.group.broadcast(checkpoint)
        if checkpoint is None:
            if self.group.is_main_process and self.checkpoints.others():
                self.job.say(
                    f"starts anew: the checkpoints in {self.checkpoints.all} are of other inputs, parameters or code, of another number "
                    "of processes or threads, or of weights that were packed otherwise, with another limit of memory"
                )
            return
        import torch

        tensors, state = checkpoint
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(tensors[f"adapter/{name}"])
                if f"exp_avg/{name}" in tensors:
                    self.optimizer.state[value] = {
                        "step": tensors[f"step/{name}"].to(self.device),  # where fused AdamW counts
                        "exp_avg": tensors[f"exp_avg/{name}"].to(self.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(self.device),
                    }
        best = {name.removeprefix("best/"): value for name, value in tensors.items() if name.startswith("best/")}
        self.best_tensors = best or None
        for name in ("step", *STATE):
            setattr(self, name, state[name])
        self.job.say(f"resumes from step {self.step} of {self.schedule.steps}")

    def _save(self) -> None:
        self.group.check_same(self.trained.values(), self.step)
        if not self.group.is_main_process:
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

    def _loss(self, data: Data, chosen: np.ndarray):
        one_pass = self.section.sharding != "none"
        return loss_sum(self.peft, self.head, data, chosen, self.device, self.max_shared_len, one_pass)

    # -- one step --------------------------------------------------------------------------------------------------

    def _optimizer_step(self) -> tuple[float, float, int]:
        """Forward, backward and update. Returns the mean loss, the learning rate and the number of real tokens."""
        import torch

        if self.qat:
            self.qat.refresh(self.step)
        rate = self.schedule.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self.schedule.batches(self.step)
        rows = self.train.rows_of(np.concatenate(batches))
        targets = int(self.train.answers[rows].sum())
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch, counts in self.group.share(batches):
            # Dropout depends on the step alone, so that a resumed run draws the same random numbers.
            torch.manual_seed((self.section.seed * 1_000_003 + self.step * 1009 + number) % 2**63)
            loss, _ = self._loss(self.train, batch)
            if not counts:
                loss = loss * 0
            (loss / targets).backward()
            total += loss.detach()
        self.group.all_reduce_gradients(self.trained.values())
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.section.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # The only values of a step that the host waits for, when the device has all of the step's work.
        total, norm = torch.stack([total, norm.double()]).tolist()
        (total,) = self.group.sums(total)
        if not math.isfinite(total):
            numbers = sorted(int(row) for row in self.train.rows[rows])
            raise UserError(
                f"the loss is {total} at step {self.step + 1} (rows {', '.join(map(str, numbers[:32]))} of the dataset). Lower "
                "finetune.learning_rate, set max_grad_norm, or look at these rows."
            )
        if not math.isfinite(norm):
            raise UserError(f"the gradient is not finite at step {self.step + 1}. Lower finetune.learning_rate.")
        self.window[0] += total
        self.window[1] += targets
        return total / targets, rate, int(self.train.real[rows].sum())

    def evaluate(self) -> float | None:
        """Mean cross entropy per answer token on the eval split; None if it is empty."""
        import torch

        if not len(self.eval):
            return None
        if self.qat:
            self.qat.refresh(None)
        self.peft.eval()
        total, count = 0.0, 0
        order = np.argsort(-self.eval.sequence_lengths, kind="stable")
        size = self.section.per_device_train_batch_size
        with torch.no_grad():
            for _, batch, counts in self.group.share([order[i : i + size] for i in range(0, len(order), size)]):
                loss, targets = self._loss(self.eval, batch)
                if counts:
                    total, count = total + loss.item(), count + targets
        total, count = self.group.sums(total, count)
        self.peft.train()
        return total / count

    def _evaluate_and_decide(self) -> None:
        """Add a point to the eval curve; with keep_best or early stopping, keep the best adapter and decide whether to stop."""
        loss = self.evaluate()
        if loss is None:
            return
        self.eval_curve.append([self.step, round(self.schedule.epoch(self.step), 4), round(loss, 6)])
        patience = self.section.early_stopping_patience
        if not (patience or self.section.keep_best):
            return
        if self.best is None or loss < self.best - self.section.early_stopping_threshold:
            self.best, self.bad_evaluations = loss, 0
            self.best_tensors = {name: value.detach().clone() for name, value in self.trained.items()}
        else:
            self.bad_evaluations += 1
            self.stopped = 0 < patience <= self.bad_evaluations

    def _add_train_point(self, rate: float) -> None:
        """Add the mean loss since the last point to the training curve."""
        mean = self.window[0] / self.window[1]
        self.train_curve.append(
            [self.step, round(self.schedule.epoch(self.step), 4), round(mean, 6), float(f"{rate:.6g}")]
        )
        self.window = [0.0, 0]

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """All remaining steps. Returns the number of steps, the tokens and seconds that they took, and whether it stopped early."""
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
                    self._add_train_point(rate)
                if last or (section.eval_steps and self.step % section.eval_steps == 0):
                    self._evaluate_and_decide()
                if self.step % section.save_steps == 0 and not last:
                    self._save()
                bar.update(1, loss=f"{loss:.3f}", **{"tokens/s": f"{tokens / (time.monotonic() - began):.0f}"})
        if self.window[1]:
            self._add_train_point(self.schedule.learning_rate(self.step - 1))
        if self.best_tensors is not None:
            import torch

            with torch.no_grad():
                for name, value in self.trained.items():
                    value.copy_(self.best_tensors[name])
        self.group.check_same(self.trained.values(), self.step)
        seconds = time.monotonic() - began
        return {"steps": self.step, "tokens": tokens, "seconds": seconds, "stopped": self.stopped}

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT does, without what differs between runs (the order of sets, the model card)."""
        # The weights of an adapted output head are the base's: they are frozen.
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
