"""Fine-tune the base model with LoRA or QLoRA; save a PEFT adapter.

    python -m scripts.finetune --params params.yaml --base build/base --dataset build/dataset --output build/adapter \\
        --train-loss results/train_loss.csv --eval-loss results/eval_loss.csv --checkpoints build/checkpoints

Reads the section `finetune`, the base model and the tokenized train and eval splits. Writes adapter_config.json and
adapter_model.safetensors as `PeftModel.from_pretrained` loads them, and the loss curves. Killed at any moment and
started again, it resumes from its last checkpoint; a checkpoint of other inputs or parameters is never used.
On several GPUs, one process per GPU computes its share of every step (slmake/training/distributed.py). `torchrun` works, too.

The same inputs give the same bytes on one machine with the same number of threads: batches, dropout and learning rate are
functions of the step alone, so a resumed run and an uninterrupted one do the same arithmetic. The curve names the number.
"""

import sys
from pathlib import Path

from slmake import cli, outputs, params
from slmake.training import distributed
from slmake.training.trainer import Trainer, write_curve


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
        help="training processes on each node (default, auto: one per GPU)",
    )
    args = parser.parse_args(argv)
    if distributed.launch(args.nproc_per_node, "scripts.finetune", sys.argv[1:] if argv is None else argv, args.log):
        return
    distributed.set_rank()
    with cli.job("finetune", distributed.redirect_worker_output(args.log)) as job, distributed.process_group() as group:
        section = params.section(args.params, "finetune")
        if not group.is_main_process:
            Trainer(section, args.base, args.dataset, args.checkpoints, job, group).run()
            return
        with outputs.written(args.output, [args.train_loss, args.eval_loss]) as (folder, train_loss, eval_loss):
            trainer = Trainer(section, args.base, args.dataset, args.checkpoints, job, group)
            job.log(
                f"{sum(v.numel() for v in trainer.trained.values()):,} trained parameters, on {trainer.device}, "
                f"{trainer.schedule.steps} steps, {group.world} processes, {trainer.threads} threads each"
            )
            since = f" since step {trainer.step}" * (trainer.step > 0)  # where it resumed
            done = trainer.run()
            trainer.save_adapter(folder)
            # Beside the curve, what decides the last digits and is in no input: the package's provenance reads it here.
            shared = [group.world, trainer.threads]
            header = ["step", "epoch", "loss", "learning_rate", "processes", "threads"]
            write_curve(train_loss, header, [[*line, *shared] for line in trainer.train_curve])
            write_curve(eval_loss, ["step", "epoch", "loss"], trainer.eval_curve)
        trainer.checkpoints.remove()
        kept = trainer.best if trainer.best is not None else trainer.eval_curve[-1][2] if trainer.eval_curve else None
        end = "" if kept is None else f", eval loss {kept:.3f}"
        early = " (stopped early)" if done["stopped"] else ""
        speed = done["tokens"] / done["seconds"] if done["seconds"] else 0
        job.say(
            f"{done['steps']} steps{early}, loss {trainer.train_curve[-1][2]:.3f}{end}, {speed:.0f} tokens/s, {job.seconds():.0f} s{since}: {args.output}"
        )


if __name__ == "__main__":
    main()
