"""TRL's SFTTrainer, loss on the completion only, as its documentation shows it; no gradient checkpointing (its default), which would slow it."""

import counting
import shared


def main() -> None:
    args = shared.arguments(__doc__)
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    counting.install()
    rows = load_dataset("json", data_files=str(args.rows), split="train").select_columns(["prompt", "completion"])
    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
    config = SFTConfig(
        **shared.training_arguments(args.hyper, args.output),
        bf16=False,  # the weights themselves are in this type, which is faster than casting them at every product
        max_length=args.hyper["max_seq_len"],
        completion_only_loss=True,
        packing=False,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.base, dtype=args.hyper["dtype"], trust_remote_code=False),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=shared.lora(args.hyper),
    )
    trainer.train()
    shared.save(trainer.model, tokenizer, args.output, args.merge)
    counting.report()


if __name__ == "__main__":
    main()
