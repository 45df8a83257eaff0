"""`olive run` with the LoRA pass, and with --merge also Olive's merge and its ModelBuilder pass to int4: one configuration, its own cache.

Rows are padded to the longest of their batch, not (its default) to the longest allowed, which would slow it.
"""

import json
import shutil

import counting
import shared


def configuration(args) -> dict:
    """Olive's workflow configuration with the pipeline's hyper-parameters."""
    hyper = args.hyper
    training = shared.training_arguments(hyper, args.output)
    del training["output_dir"], training["save_strategy"], training["report_to"]
    passes = {
        "finetune": {
            "type": "LoRA",
            "train_data_config": "train_data",
            "r": hyper["r"],
            "alpha": hyper["alpha"],
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "torch_dtype": hyper["dtype"],
            "training_args": training,
        }
    }
    if args.merge:
        passes["merge"] = {"type": "MergeAdapterWeights"}
        passes["builder"] = {
            "type": "ModelBuilder",
            "precision": "int4",
            "int4_block_size": 32,
            "int4_accuracy_level": 4,
            "int4_algo_config": "rtn",
        }
    return {
        "input_model": {"type": "HfModel", "model_path": str(args.base), "task": "text-generation"},
        "systems": {
            "local": {
                "type": "LocalSystem",
                "accelerators": [
                    {"device": hyper["device"], "execution_providers": [f"{hyper['provider']}ExecutionProvider"]}
                ],
            }
        },
        "data_configs": [
            {
                "name": "train_data",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": str(args.rows), "split": "train"},
                "pre_process_data_config": {
                    "text_cols": ["text"],
                    "strategy": "line-by-line",
                    "max_seq_len": hyper["max_seq_len"],
                    "pad_to_max_len": False,
                },
            }
        ],
        "passes": passes,
        "host": "local",
        "target": "local",
        "evaluate_input_model": False,
        "cache_dir": str(args.output / "cache"),
        "output_dir": str(args.output / "model"),
    }


def main() -> None:
    args = shared.arguments(__doc__)
    import olive

    counting.install()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "olive.json").write_text(json.dumps(configuration(args), indent=1), encoding="utf-8")
    shutil.rmtree(args.output / "model", ignore_errors=True)
    olive.run(str(args.output / "olive.json"))
    written = sorted((args.output / "model").rglob("adapter_config.json" if not args.merge else "genai_config.json"))
    counting.report(folder=str(written[0].parent))


if __name__ == "__main__":
    main()
