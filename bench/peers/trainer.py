"""transformers' Trainer over a PEFT model, as most people write it: tokenized rows, loss on the answer, batches padded to their longest row."""

import counting
import shared


def main() -> None:
    args = shared.arguments(__doc__)
    from datasets import load_dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    counting.install()
    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)

    def tokenize(row: dict) -> dict:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = (prompt + answer)[: args.hyper["max_seq_len"]]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": ([-100] * len(prompt) + answer)[: len(ids)],
        }

    rows = load_dataset("json", data_files=str(args.rows), split="train")
    rows = rows.map(tokenize, remove_columns=rows.column_names)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=args.hyper["dtype"], trust_remote_code=False)
    trainer = Trainer(
        model=get_peft_model(model, shared.lora(args.hyper)),
        args=TrainingArguments(**shared.training_arguments(args.hyper, args.output)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    shared.save(trainer.model, tokenizer, args.output, args.merge)
    counting.report()


if __name__ == "__main__":
    main()
