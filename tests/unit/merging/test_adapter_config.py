"""adapter_config.json: every value that the merge uses is checked before, and a pattern never takes long."""

import math

import pytest
import torch
from merge_script import edited, make_adapter, refused, run

WRONG = {
    "r": (None, 0, -4, 4.0, "4", True, [4]),
    "lora_alpha": (None, "8", math.inf, math.nan, 10**400, [8], True),
    "rank_pattern": (["q_proj"], {"q_proj": "4"}, {"q_proj": 0}, {"q_proj": 2.5}, "q_proj"),
    "alpha_pattern": (["q_proj"], {"q_proj": "16"}, {"q_proj": math.nan}),
    "modules_to_save": ("lm_head", 5, [5]),
    "target_modules": (5, {"q_proj": 1}, ["q_proj", 5]),
    "exclude_modules": (5, [5]),
    "layers_to_transform": ("0", -1, [0, "1"], True),
    "layers_pattern": (5, [5]),
    "trainable_token_indices": (3, ["a"], [-1], {"embed_tokens": 3}),
    "init_lora_weights": ({"a": 1}, 3),
    "base_model_name_or_path": (3, ["a"]),
    "fan_in_fan_out": ("false", 0, []),
    "use_dora": ("no", 1),
    "use_rslora": ("no", 1),
    "ensure_weight_tying": (0,),
    "lora_bias": ("none",),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_value_of_another_type_or_range_is_refused_by_name(tmp_path, capsys, base, adapter, key, value):
    wrong = edited(adapter, tmp_path / "wrong", **{key: value})
    message = refused(tmp_path, capsys, base, wrong)
    assert f"{wrong}/adapter_config.json: {key} is " in message
    assert "; it must be " in message


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    ["(", r"(?=q_proj)q_proj", r"(q)_proj\1", "a)|(b", "(?i)q_proj", "q{,3}", "[[a]", "[a[:alpha:]]", "(" * 9999, "*"],
)
def test_pattern_that_is_not_understood_is_refused(tmp_path, capsys, base, adapter, key, pattern):
    wrong = edited(adapter, tmp_path / "wrong", **{key: {pattern: 4}})
    message = refused(tmp_path, capsys, base, wrong)
    assert f"{wrong}/adapter_config.json: {key} has the pattern " in message
    assert "which cannot be used: " in message


@pytest.mark.parametrize("pattern", [r"((\w|\.)+)+!", "(a|a|o)*" * 50 + "!", ".*" * 400 + "!"])
@pytest.mark.timeout(20)
def test_pattern_that_pythons_search_never_ends_is_matched_at_once(tmp_path, base, adapter, pattern):
    run(tmp_path, base, edited(adapter, tmp_path / "slow", rank_pattern={pattern: 2}, alpha_pattern={pattern: 3}))


@pytest.mark.parametrize("shape", [(1, -1), (-1, 1)])
def test_magnitudes_of_another_shape_are_refused(tmp_path, capsys, base, shape):
    def turn(tensors):
        for name in tensors:
            if "magnitude" in name:
                tensors[name] = tensors[name].reshape(shape)

    made = make_adapter(base, tmp_path / "made", use_dora=True)
    message = refused(tmp_path, capsys, base, edited(made, tmp_path / "wrong", turn))
    assert "lora_magnitude_vector has the shape [" in message or ".weight has the shape [" in message


def test_trained_tokens_of_another_shape_are_refused(tmp_path, capsys, base):
    def flatten(tensors):
        for name in tensors:
            if "token_adapter" in name:
                tensors[name] = torch.zeros(64)

    made = make_adapter(base, tmp_path / "made", trainable_token_indices=[3])
    message = refused(tmp_path, capsys, base, edited(made, tmp_path / "wrong", flatten))
    assert "trainable_tokens_delta has the shape [64]" in message
