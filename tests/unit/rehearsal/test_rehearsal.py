"""rehearse: the twin has the model's features, the chain runs on it, and what will not fit is refused."""

import json
import shutil

import numpy as np
import pytest
from tiny import make_model, write_params

from slmake import model_folder, params
from slmake.errors import UserError
from slmake.prompts import load_prompt
from slmake.rehearsal import chain, checks, estimate, twin
from slmake.rehearsal.estimate import Need
from slmake.scoring import onnx_runner


def config(kind: str, **fields):
    import transformers

    return getattr(transformers, kind)(**fields)


@pytest.mark.parametrize(
    ("layer_types", "length"),
    [(["a"], 1), (["a"] * 8, 1), (["a", "b"] * 4, 2), (["s"] * 5 + ["f"], 6), ((["s"] * 5 + ["f"]) * 3, 6)],
)
def test_the_period_of_layer_types(layer_types, length):
    assert twin.period(layer_types) == length


def test_a_twin_keeps_heads_vocabulary_and_windows():
    small = twin.shrink(
        config("Gemma3TextConfig", num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=4, head_dim=256)
    )
    assert small.num_hidden_layers == len(small.layer_types) == 6
    assert small.layer_types.count("full_attention") == 1
    assert (small.head_dim, small.vocab_size, small.sliding_window) == (256, 262208, 4096)
    assert (small.num_attention_heads, small.num_key_value_heads) == (2, 1)
    assert small.hidden_size == 512


@pytest.mark.parametrize(("context", "kept"), [(512, 512), (10_485_760, 2**17)])
def test_a_twin_has_no_tables_of_millions_of_positions(context, kept):
    assert twin.shrink(config("LlamaConfig", max_position_embeddings=context)).max_position_embeddings == kept


def test_the_twin_of_a_sharded_model_has_its_own_weights(tmp_path, base):
    """Models of several gigabytes come in shards, with an index that names them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "sharded")
    weights = load_file(tmp_path / "sharded" / "model.safetensors")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    names = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    save_file(weights, tmp_path / "sharded" / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    twin.make_model(tmp_path / "sharded", tmp_path / "twin", twin.shrink)
    files = model_folder.weight_files(tmp_path / "twin")
    assert [file.name for file in files] == ["model.safetensors"]


def test_a_twin_keeps_grouped_heads_and_a_few_experts():
    small = twin.shrink(config("Qwen3MoeConfig", num_attention_heads=32, num_key_value_heads=4, head_dim=128))
    assert small.num_attention_heads // small.num_key_value_heads == 8
    assert (small.num_experts, small.num_experts_per_tok, small.num_hidden_layers) == (4, 2, 2)


def test_patterns_with_layer_numbers_name_the_twins_layers(tmp_path):
    """Two layers stand for the first and the last of thirty."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    section = params.Quantize(
        algo_config="rtn",
        matmul_mixed_precision=None,
        int8_nodes=["*/attn/*", "/model/layers.[0-4]/*", "/model/layers.29/mlp/*", "/model/layers.7/*"],
        node_accuracy_levels={"/model/layers.29/*": 1, "/model/layers.3/*": 2},
    )
    small = chain.for_twin(section, tmp_path, 30)
    assert small.int8_nodes == ["*/attn/*", "/model/layers.0/*", "/model/layers.1/mlp/*"]
    assert small.node_accuracy_levels == {"/model/layers.1/*": 1}


def test_the_difference_is_a_share_of_the_spread():
    reference = [np.array([0.0, 2.0], dtype=np.float32)]  # a standard deviation of 1
    assert chain.difference(reference, [np.array([0.0, 2.25], dtype=np.float32)]) == pytest.approx(0.25)
    assert chain.difference(reference, [np.array([0.0, np.nan], dtype=np.float32)]) == float("inf")


def test_what_does_not_fit_is_refused_with_a_remedy():
    needs = {"finetune": Need(20e9, 60.0), "quantize": Need(6e9, 30.0, 2e9)}
    estimate.refuse_too_large(needs, 24e9, 3e9)
    with pytest.raises(
        UserError, match=r"finetune would need about 20.0 GB of memory; 16.0 GB are here. Change finetune.method: qlora"
    ):
        estimate.refuse_too_large(needs, 16e9, 3e9)
    with pytest.raises(UserError, match=r"about 2.0 GB on disk; 1.0 GB are free"):
        estimate.refuse_too_large(needs, 24e9, 1e9)
    shown = estimate.table(needs, 24e9, 3e9)
    assert "finetune       20.0 GB      60 s" in shown
    assert shown.splitlines()[-1].split() == ["here", "24.0", "GB", "3.0", "GB"]


def test_a_straight_line_through_two_probes():
    assert estimate._line([2, 4], [10.0, 14.0], 32) == 70.0
    assert estimate._line([2], [10.0], 2) == 10.0
    assert estimate._line([2, 4], [10.0, 9.0], 32) == 10.0  # noise never makes a larger model smaller


def rehearse(tmp_path, base, dataset, **sections):
    """The script in this process; its two results."""
    from scripts import rehearse as script

    quantize = {"calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None} | sections.pop("quantize", {})
    file = write_params(tmp_path / "params.yaml", quantize=quantize, **sections)
    output, needs = tmp_path / "results" / "rehearsal.json", tmp_path / "results" / "estimate.json"
    arguments = ["--params", file, "--base", base, "--dataset", dataset, "--output", output, "--estimate", needs]
    script.main([str(argument) for argument in arguments])
    return json.loads(output.read_text()), json.loads(needs.read_text())


def test_the_chain_runs_on_the_twin(tmp_path, base, dataset, capsys):
    passed, needs = rehearse(tmp_path, base, dataset, gates={"max_accuracy_drop": 0.1})
    checks = needs["checks"]
    assert passed == {"passed": ["finetune", "merge", "export", "evaluate"]}
    assert checks["evaluate"] == {"models": ["base", "adapter", "merged", "int4"]}
    differences = checks["export"]["fp32_difference_by_prompt_tokens"]
    assert set(differences) == {"8", "40"}
    assert max(differences.values()) < 1e-4
    assert checks["finetune"] == {"steps": 2}
    assert list(needs["stages"]) == ["finetune", "merge", "quantize", "package", "evaluate"]
    assert needs["stages"]["finetune"]["memory"] > 100e6
    assert not list((tmp_path / "results").glob(".*"))
    assert "every stage works on the twin" in capsys.readouterr().err


def test_a_model_with_convolutions_is_scored_before_it_is_trained(tmp_path, dataset, monkeypatch, capsys):
    base = make_model(tmp_path / "base", "lfm2", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    stages = {"stages": ["rehearse", "quantize", "evaluate"]}
    with monkeypatch.context() as patch:
        patch.setattr(onnx_runner, "rewound", lambda generator, tokens, again: generator.rewind_to(tokens))
        with pytest.raises(SystemExit):
            rehearse(tmp_path, base, dataset, all=stages)
    assert "RewindTo is currently not supported" in capsys.readouterr().err
    assert not list((tmp_path / "results").iterdir())
    passed, needs = rehearse(tmp_path, base, dataset, all=stages)
    assert passed == {"passed": ["export", "evaluate"]}
    assert needs["checks"]["evaluate"] == {"models": ["base", "int4"]}


def test_prompts_of_the_whole_context_are_compared(tmp_path, dataset):
    base = make_model(tmp_path / "base", "mistral", sliding_window=480)
    _, needs = rehearse(tmp_path, base, dataset, all={"stages": ["rehearse", "quantize"]})
    assert set(needs["checks"]["export"]["fp32_difference_by_prompt_tokens"]) == {"8", "40", "488", "512"}


def test_answers_beyond_what_the_model_reads_are_refused(tmp_path, base, dataset, capsys):
    stages = {"stages": ["rehearse", "quantize", "evaluate"]}
    with pytest.raises(SystemExit):
        rehearse(tmp_path, base, dataset, all=stages, evaluate={"max_new_tokens": 500})
    assert "evaluate.max_new_tokens: 500 tokens behind the longest prompt, of " in (shown := capsys.readouterr().err)
    assert "are more than the model reads: 512. Set it to " in shown


def test_a_build_that_does_not_fit_stops_before_training(tmp_path, base, dataset, capsys):
    with pytest.raises(SystemExit):
        rehearse(tmp_path, base, dataset, all={"stages": ["rehearse", "finetune"]}, rehearse={"memory_gb": 0.01})
    message = capsys.readouterr().err
    assert "finetune would need about" in message
    assert "set rehearse.refuse to false" in message
    assert not list((tmp_path / "results").iterdir())


def test_an_export_that_computes_something_else_is_refused(tmp_path, dataset, capsys, monkeypatch):
    base = make_model(tmp_path / "base")
    monkeypatch.setattr(chain, "exported_logits", lambda folder, prompts: [np.zeros(512, np.float32) for _ in prompts])
    with pytest.raises(SystemExit):
        rehearse(tmp_path, base, dataset, all={"stages": ["rehearse", "quantize"]})
    assert "computes other logits than transformers: at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (
            {"json_schema": "schema.json"},
            "evaluate.metrics: schema.json: not a JSON Schema: 5 is not valid under any of",
        ),
        ("mine.py:missing", "evaluate.metrics: mine.py:missing: there is no such function in the file."),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused_before_anything_runs(
    tmp_path, base, dataset, capsys, monkeypatch, metric, reason
):
    from scripts import rehearse as script

    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text('{"type": 5}', encoding="utf-8")
    (tmp_path / "mine.py").write_text("def other(prompt, expected, answer): return 1\n", encoding="utf-8")
    monkeypatch.setattr(script, "rehearse", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit):
        rehearse(tmp_path, base, dataset, evaluate={"metrics": [metric]})
    assert reason in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="it began"):  # a build that scores nothing does not ask for it
        rehearse(tmp_path, base, dataset, evaluate={"metrics": [metric]}, all={"stages": ["rehearse", "finetune"]})


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (
            {"numeric": 0.5},
            r"evaluate\.metrics: numeric on row \d+ \(answer '\w+'\): the expected answer holds no number",
        ),
        ("tool_name", "evaluate.metrics: tool_name has nothing to score in any row. Take it out."),
    ],
)
def test_a_metric_that_no_answer_could_meet_is_refused(tmp_path, dataset, metric, reason):
    """Metrics are tried on the rows that evaluate asks, and on those of quantize.search."""
    quantize = {"calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None}
    search = {"search": {"budget": 2, "rows": 8, "int8_nodes": [[], ["*/attn/*"]]}}
    evaluate = {"evaluate": {"metrics": ["contains", metric]}}

    def tried(stages: list[str], **sections: dict) -> None:
        file = write_params(tmp_path / "params.yaml", all={"stages": ["rehearse", *stages]}, **sections)
        checks.try_metrics(params.load(file), dataset)

    for stages, more in ((["evaluate"], {}), (["quantize"], search)):
        with pytest.raises(UserError, match=reason):
            tried(stages, quantize=quantize | more, **evaluate)
        tried(stages, quantize=quantize | more, evaluate={"metrics": ["contains", "json_valid", {"regex": "[a-z]+"}]})
    tried(["quantize"], quantize=quantize, **evaluate)  # nothing is scored


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return 1 / 0", "ZeroDivisionError: division by zero. Correct the function."),
        ("return {'joy': 1, 'fear': 1, 'sad': 1, 'surprise': 1}[answer]", "KeyError: "),  # of the twin's answer
        ("return None", None),  # nothing to say of four rows
    ],
)
def test_a_function_of_ones_own_is_tried_on_a_few_rows(tmp_path, base, dataset, capsys, body, reason):
    (tmp_path / "mine.py").write_text(f"def own(prompt, expected, answer): {body}\n", encoding="utf-8")
    asked = {"evaluate": {"metrics": [f"{tmp_path}/mine.py:own"]}, "all": {"stages": ["rehearse", "evaluate"]}}
    if reason is None:
        assert rehearse(tmp_path, base, dataset, **asked)[0] == {"passed": ["evaluate"]}
        return
    with pytest.raises(SystemExit):
        rehearse(tmp_path, base, dataset, **asked)
    assert "evaluate.metrics: own on row " in (shown := capsys.readouterr().err)
    assert reason in shown


def test_a_function_of_ones_own_is_tried_for_a_search_too(tmp_path, dataset):
    (tmp_path / "mine.py").write_text("def own(prompt, expected, answer): return 1 / 0\n", encoding="utf-8")
    search = {"search": {"budget": 2, "rows": 8, "int8_nodes": [[], ["*/attn/*"]]}}
    quantize = {"calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None} | search
    evaluate = {"metrics": [f"{tmp_path}/mine.py:own"]}
    stages = {"stages": ["rehearse", "quantize"]}
    file = write_params(tmp_path / "params.yaml", all=stages, quantize=quantize, evaluate=evaluate)
    with pytest.raises(UserError, match=r"own on row \d+ .*ZeroDivisionError"):
        checks.try_metrics(params.load(file), dataset)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    chain.export(
        params.Quantize(precision="fp32", algo_config="rtn", matmul_mixed_precision=None), base, base, folder, None
    )
    return folder


def test_a_runtime_tokenizer_that_differs_is_found_before_training(tmp_path, base, dataset, exported):
    """That of this export has lost its merges, so that every byte is a token."""
    other = shutil.copytree(exported, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")

    def tried(folder, **sections: dict) -> None:
        quantize = {"calibration": "none", "int8_nodes": [], "matmul_mixed_precision": None}
        file = write_params(tmp_path / "params.yaml", quantize=quantize, **sections)
        checks.try_tokenizer(params.load(file), base, dataset, onnx_runner.load(folder, load_prompt(dataset)))

    tried(exported)
    told = r"differs from training's on 8 of the prompts and answers of the first 8 test rows; 7 may: row \d+ has \['.*gates\.max_tok"
    with pytest.raises(UserError, match=told):
        tried(other, evaluate={"max_samples": 8}, gates={"max_tokenizer_differences": 7})
    tried(other, evaluate={"max_samples": 8}, gates={"max_tokenizer_differences": 8})
    tried(other, gates={"max_tokenizer_differences": None})
    tried(other, all={"stages": ["rehearse", "quantize", "evaluate"]})
