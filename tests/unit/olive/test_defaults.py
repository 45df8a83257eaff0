"""What a configuration leaves out is what Olive does then, in the file and in the table."""

import pytest
from test_forms import BUILDER, LORA, TRAINING, loaded, notes, read, small, tutorial

from slmake.olive.reader import Reader


def left_out(imported: Reader) -> list[str]:
    return [row.note for row in imported.rows if row.kind == "default"]


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_an_adapter_without_options(tmp_path, method):
    content = tutorial(old=False)
    content["passes"]["lora"] = {"type": method, "train_data_config": "train"}
    del content["data_configs"][0]["pre_process_data_config"]["params"]["corpus_strategy"]
    imported = read(content)
    made = loaded(imported, tmp_path)
    tune = made.finetune
    assert (tune.lora_r, tune.lora_alpha, tune.lora_dropout, tune.learning_rate) == (64, 16, 0.05, 2e-4)
    assert (tune.lr_scheduler_type, tune.warmup_ratio, tune.num_train_epochs) == ("constant", 0.03, 3.0)
    assert (tune.per_device_train_batch_size, tune.group_by_length, tune.gradient_checkpointing) == (8, False, True)
    assert made.prepare.strategy == "join"
    rows = left_out(imported)
    assert {"finetune.lora_r: 64", "finetune.lr_scheduler_type: 'constant'", "prepare.strategy: 'join'"} <= set(rows)
    qlora = method == "QLoRA"
    assert tune.double_quant is not qlora
    assert ("finetune.double_quant: False" in rows) is qlora
    assert any("PEFT" in note for note in rows) is not qlora


def test_what_is_given_stays(tmp_path):
    imported = read(tutorial(old=False))
    made = loaded(imported, tmp_path)
    for name, value in {**LORA, **TRAINING}.items():
        assert getattr(made.finetune, name, value) == value
    assert (made.finetune.lr_scheduler_type, made.prepare.strategy) == ("constant", "join")
    assert not any(f".{name}:" in note for note in left_out(imported) for name in {**LORA, **TRAINING})
    content = tutorial(old=False)
    content["passes"]["lora"]["training_args"] = {"seed": 7}
    assert loaded(read(content), tmp_path).finetune.data_seed == 7


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ([{"type": "gptq"}], (128, True)),
        ([{"type": "rtn"}], (128, False)),
        ([{"type": "kquant"}], (32, False)),
        ([{"type": "rtn", "group_size": 64, "sym": True}], (64, True)),
        ([{"type": "gptq", "group_size": 32}, {"type": "rtn", "bits": 8}], (32, True)),
        ([], (32, True)),
    ],
)
def test_passes_over_weights(tmp_path, passes, expected):
    imported = read(small(*passes, BUILDER))
    made = loaded(imported, tmp_path).quantize
    assert (made.block_size, made.is_symmetric) == expected
    gptq = {"type": "gptq"} in passes
    assert ("zero points there; gptq rounds symmetrically here" in left_out(imported)) is (gptq or len(passes) == 2)
    assert notes(imported, "nearest") == {}
