"""Fields of Olive's configuration that have one name here, or none."""

from typing import NamedTuple


class Drop(NamedTuple):
    """A field without meaning here; with `only`, for these values, any other being something that cannot be had."""

    why: str
    only: tuple | None = None


CACHE = Drop("Snakemake and DVC know what is up to date")
LOGS = Drop("logs are in logs/RULE.log")
SAVED = Drop("checkpoints are written every finetune.save_steps; the last one is kept until the end")
TRACED = Drop("Olive's exporter reads it to trace the model; the model builder knows inputs, outputs and cache")
WRITTEN = Drop("the builder decides how its files are written")
EVALUATION = Drop("finetune.eval_steps says when")
OPTIMIZER = Drop("the optimizer is AdamW with float32 state")
MASK = Drop("prompt and answer are always closed by the tokenizer's end token")
OFF = (None, False, 0, [], {}, "")

TOP = {
    "$schema": Drop("the schema of params.yaml is docs/params.schema.json"),
    "verbose": LOGS,
    "workflow_id": Drop("a run is named by its folder"),
    "auto_optimizer_config": Drop("passes are chosen by hand", OFF),
    "workflow_host": Drop("set where rules run in azureml/settings.yaml", OFF),
}
ENGINE = {
    "evaluator": Drop("`evaluate` measures by itself"),
    "evaluate_input_model": Drop("evaluate.models says what is scored: the base model is among them"),
    "cache_dir": CACHE,
    "cache_config": CACHE,
    "clean_cache": CACHE,
    "clean_evaluation_cache": CACHE,
    "clean_run_cache": CACHE,
    "enable_shared_cache": CACHE,
    "output_dir": Drop("results are in build/ and results/"),
    "output_name": Drop("results are in build/ and results/"),
    "packaging_config": Drop("`package` makes a package: add it and gates to all.stages"),
    "log_severity_level": LOGS,
    "ort_log_severity_level": LOGS,
    "ort_py_log_severity_level": LOGS,
    "log_to_file": LOGS,
    "plot_pareto_frontier": Drop("the report shows candidates"),
    "no_artifacts": Drop("results are in build/ and results/"),
}
LORA = {
    "r": "finetune.lora_r",
    "lora_r": "finetune.lora_r",
    "alpha": "finetune.lora_alpha",
    "lora_alpha": "finetune.lora_alpha",
    "lora_dropout": "finetune.lora_dropout",
    "quant_type": "finetune.quant_type",
    "double_quant": "finetune.double_quant",
    "bias": Drop("biases are not trained", (*OFF, "none")),
    "init_weights": Drop("B is zero, A is drawn from finetune.seed", (*OFF, True)),
    "init_lora_weights": Drop("B is zero, A is drawn from finetune.seed", (*OFF, True)),
    "use_dora": Drop("LoRA without a magnitude", OFF),
    "use_rslora": Drop("the update is scaled by lora_alpha / lora_r", OFF),
    "modules_to_save": Drop("only LoRA matrices are trained", OFF),
    "task_type": Drop("causal language models only", (*OFF, "CAUSAL_LM")),
    "device_map": Drop("the device is detected"),
    "allow_tf32": Drop("results must not depend on the card"),
    "ephemeral_gpu_offload": Drop("the device is detected", OFF),
    "save_quant_config": Drop("merge.onto says onto which weights the adapter is merged"),
    "use_ort_trainer": Drop("one training loop, in PyTorch", OFF),
    "ortmodule_onnx_opset_version": Drop("one training loop, in PyTorch"),
    "eval_data_collator": Drop("batches are padded on the right", OFF),
}
TRAINING = {
    name: f"finetune.{name}"
    for name in (
        *("learning_rate", "lr_scheduler_type", "warmup_ratio", "num_train_epochs", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "gradient_checkpointing", "group_by_length", "max_grad_norm", "adam_beta1"),
        *("adam_beta2", "weight_decay", "eval_steps", "logging_steps", "save_steps", "seed", "data_seed"),
    )
} | {
    "per_device_eval_batch_size": Drop("evaluation uses the training batch size"),
    "evaluation_strategy": EVALUATION,
    "eval_strategy": EVALUATION,
    "optim": OPTIMIZER,
    "adam_epsilon": OPTIMIZER,
    "save_strategy": SAVED,
    "save_total_limit": SAVED,
    "output_dir": Drop("results are in build/ and results/"),
    "overwrite_output_dir": Drop("nothing is overwritten"),
    "resume_from_checkpoint": Drop("an interrupted run always resumes from its last checkpoint"),
    "report_to": Drop("curves are in results/*.csv and in the report"),
    "logging_dir": LOGS,
    "logging_strategy": Drop("finetune.logging_steps says when"),
    "log_level": LOGS,
    "disable_tqdm": LOGS,
    "remove_unused_columns": Drop("rows are reduced to what the template names"),
    "dataloader_num_workers": Drop("batches are made beforehand"),
    "bf16": Drop("finetune.compute_dtype says in which type"),
    "fp16": Drop("finetune.compute_dtype says in which type", OFF),
    "warmup_steps": Drop("give warmup_ratio", OFF),
    "deepspeed": Drop(
        "the GPUs of a machine train together without it; finetune.sharding spreads a model too large for one"
    ),
    "fsdp": Drop("finetune.sharding spreads a model too large for one GPU"),
    "fsdp_config": Drop("finetune.sharding spreads a model too large for one GPU"),
    "ddp_find_unused_parameters": Drop("every trained parameter is used"),
    "use_module_with_loss": Drop("one training loop, in PyTorch"),
    "metric_for_best_model": Drop("the best adapter has the lowest eval loss", (*OFF, "loss", "eval_loss")),
    "greater_is_better": Drop("the best adapter has the lowest eval loss", OFF),
    "neftune_noise_alpha": Drop("no noise on embeddings", OFF),
    "label_names": Drop("the template says what the answer is"),
    "include_inputs_for_metrics": Drop("`evaluate` measures by itself"),
    "save_safetensors": Drop("adapters are safetensors"),
    "tf32": Drop("results must not depend on the card"),
    "do_train": Drop("the stage finetune trains"),
    "do_eval": EVALUATION,
    "push_to_hub": Drop("`publish` uploads", OFF),
    "gradient_checkpointing_kwargs": Drop("checkpointing is without reentry", (*OFF, {"use_reentrant": False})),
}
MERGE = {"metadata_only": Drop("the whole model is merged", OFF)}
BUILDER = {
    "matmul_mixed_precision": "quantize.matmul_mixed_precision",
    "metadata_only": Drop("the whole model is exported", OFF),
    "search": Drop("generation options are set where the model is run: genai_config.json"),
    "save_as_external_data": WRITTEN,
    "all_tensors_to_one_file": WRITTEN,
    "external_data_name": WRITTEN,
    "filename": WRITTEN,
    "enable_GQA_on_CPU": Drop("the builder's own choice for the CPU"),
    "hf_token": Drop("the hub's token comes from HF_TOKEN"),
    "hf_remote": Drop("no code of a model repository is run"),
    "config_only": Drop("the whole model is exported", OFF),
    "num_hidden_layers": Drop("the whole model is exported", OFF),
    "adapter_path": Drop("the adapter is merged before the export", OFF),
    "include_prompt_templates": Drop("the tokenizer's chat template is shipped"),
    "use_qdq": Drop("weights stay in MatMulNBits", OFF),
    "use_8bits_moe": Drop("no mixture of experts", OFF),
    "use_webgpu_fp32": Drop("the builder's own type", OFF),
    "use_cuda_bf16": Drop("the builder's own type", OFF),
    "include_hidden_states": Drop("logits only", OFF),
    "exclude_embeds": Drop("the whole model is exported", OFF),
    "exclude_lm_head": Drop("the whole model is exported", OFF),
    "enable_cuda_graph": Drop("set where the model is run: genai_config.json"),
}
# Names of the algorithm that say which products keep 8 bits, too.
ALGORITHMS = {
    "default": ("default", None),
    "rtn": ("rtn", None),
    "rtn_last": ("rtn", "last_matmul:int8"),
    "k_quant": ("k_quant", None),
    "k_quant_last": ("k_quant", "last_matmul:int8"),
    "k_quant_mixed": ("k_quant", "last_matmul:int8,mixed_layers:int8"),
}
PREPARE = {
    "text_template": "prepare.text_template",
    "max_seq_len": "prepare.max_seq_len",
    "source_max_len": "prepare.max_seq_len",
    "pad_to_max_len": "prepare.pad_to_max_len",
    "use_attention_mask": "prepare.use_attention_mask",
    "max_samples": "prepare.max_samples",
    "message_col": "prepare.messages",
    "dataset_type": Drop("rows are examples of one text each", (*OFF, "corpus")),
    "add_special_tokens": MASK,
    "joiner": Drop("packed rows are parted by the end token"),
    "padding_side": Drop("padding is on the right", (*OFF, "right")),
    "drop_short_sequences": Drop("no row is dropped for being short", OFF),
    "processing_batch_size": Drop("rows are streamed"),
    "random_seed": "prepare.seed",
    "chat_template": Drop("the tokenizer's own template is applied", (*OFF, True)),
    "stride": Drop("whole rows are packed", OFF),
    "limit": Drop("prepare.max_samples says how many rows", OFF),
    "text_formatting_func": Drop("no code of a dataset is run", OFF),
    "user_script": Drop("no code of a dataset is run", OFF),
    "script_dir": Drop("no code of a dataset is run", OFF),
    "model_name": Drop("the tokenizer is the base model's"),
    "trust_remote_code": Drop("no code of a repository is run"),
}
LOAD = {
    "trust_remote_code": Drop("no code of a repository is run"),
    "batch_size": Drop("finetune.per_device_train_batch_size says how many"),
    "shuffle": Drop("rows are shuffled by finetune.data_seed"),
    "label_col": Drop("the answer's placeholder is prepare.answer", (*OFF, "label")),
    "label_cols": Drop("the answer's placeholder is prepare.answer", OFF),
    "token": Drop("the hub's token comes from HF_TOKEN"),
    "use_auth_token": Drop("the hub's token comes from HF_TOKEN"),
    "streaming": Drop("rows are streamed"),
    "cache_dir": CACHE,
}
# Options that passes over PyTorch weights share; `quantizers.py` takes over the rest of them.
WEIGHTS = {
    "device": Drop("the device is detected"),
    "dynamic": Drop("one setting for all layers; patterns of quantize.int8_nodes name others", OFF),
    "nsamples": Drop("quantize.calibration_rows says how many rows calibrate"),
    "desc_act": Drop("columns keep their order", OFF),
    "static_groups": Drop("columns keep their order"),
    "damp_percent": Drop("the damping is chosen by the export"),
    "true_sequential": Drop("layers are quantized one after the other", (*OFF, True)),
    "layers_block_name": Drop("layers are known from the model's type"),
    "outside_layer_modules": Drop("layers are known from the model's type"),
    "inside_layer_modules": Drop("layers are known from the model's type"),
    "layers_to_exclude": Drop("quantize.nodes_to_exclude names nodes of the graph", OFF),
    "seed": Drop("the result does not depend on a seed"),
}
