"""quantize: the exported graph is what was asked for, it runs, and its numbers are the model's."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from quantize_script import IDS, divergence, load, onnx_logits, refused, run, section, torch_logits

from slmake.export import graph_checks

FILES = {
    "chat_template.jinja",
    "genai_config.json",
    "model.onnx",
    "model.onnx.data",
    "tokenizer.json",
    "tokenizer_config.json",
}


# -- what is written ---------------------------------------------------------------------------------------------------


KINDS = {
    "int4 rtn": ({"algo_config": "rtn"}, {"4": 11}),
    "int4 k_quant": ({"algo_config": "k_quant"}, {"4": 11}),
    "int4 default": ({"algo_config": "default"}, {"4": 11}),
    "int8": ({"precision": "int8"}, {"8": 11}),
    "fp32": ({"precision": "fp32"}, {}),
}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory, base) -> tuple[str, Path]:
    """One export of the tied model by the script; do not write into it."""
    return request.param, run(tmp_path_factory.mktemp("exported"), base, **KINDS[request.param][0])


def test_graph_has_the_bits_asked_for(exported):
    name, folder = exported
    changes, bits = KINDS[name]
    found = graph_checks.check_graph(section(**changes), folder)
    assert found["quantized_matmuls_by_bits"] == bits
    assert found["block_sizes"] == ([32] if bits else [])
    assert found["plain_matmuls"] == (0 if bits else 11)


def test_folder_is_complete_and_generates_the_same_tokens_twice(exported):
    _, folder = exported
    assert {path.name for path in folder.iterdir()} == FILES
    assert sorted(path.name for path in folder.parent.iterdir()) == ["onnx"]
    tokens, runs_on = graph_checks.check_generates(folder, tokens=8)
    assert runs_on == "cpu"
    assert 1 <= len(tokens) <= 8
    assert all(0 <= token < 512 for token in tokens)
    assert graph_checks.check_generates(folder, tokens=8).tokens == tokens
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["decoder"]["filename"] == "model.onnx"
    assert config["model"]["vocab_size"] == 512


def test_logits_are_near_the_models(exported, base):
    """Float32 to 1e-4; 8 bits and 4 bits by KL divergence."""
    name, folder = exported
    expected, found = torch_logits(load(base)), onnx_logits(folder)
    assert found.shape == (512,)
    if name == "fp32":
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    else:
        assert divergence(expected, found) < (1e-3 if name == "int8" else 0.02)
        assert np.corrcoef(expected, found)[0, 1] > (0.999 if name == "int8" else 0.9)


def test_two_runs_are_byte_identical(tmp_path, exported, base):
    name, folder = exported
    again = run(tmp_path, base, **KINDS[name][0])
    for file in FILES:
        assert (again / file).read_bytes() == (folder / file).read_bytes(), file


def test_message_counts_products_by_bits(tmp_path, base, capsys):
    run(tmp_path, base, matmul_mixed_precision="last_matmul:int8")
    message = capsys.readouterr().err
    assert f"{tmp_path}/build/onnx loads and generates (int4: 10 products in 4 bits, 1 products in 8 bits; " in message


@pytest.mark.parametrize("mixed", [False, True], ids=["4 bits", "8 bits in part"])
def test_rtn_graph_computes_with_the_weights_that_training_rounds_to(tmp_path, untied, mixed):
    """Logits of the export = logits of the model with `lora.round_to_nearest` weights, without activation rounding."""
    from slmake.training import qat

    nodes = ["*/attn/*", "*/down_proj/*"] if mixed else []
    folder = run(tmp_path, untied, accuracy_level=1, int8_nodes=nodes)
    model = load(untied)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            eight = mixed and ("self_attn" in name or "down_proj" in name)
            module.weight.data = qat.round_to_nearest(module.weight.data, 8 if eight else 4, 32)
    np.testing.assert_allclose(onnx_logits(folder), torch_logits(model), rtol=0, atol=1e-4)
    assert np.abs(onnx_logits(folder) - torch_logits(load(untied))).max() > 1e-2


@pytest.mark.parametrize(
    "changes", [{}, {"matmul_mixed_precision": "last_matmul:int8"}, {"precision": "fp32"}], ids=str
)
def test_pruned_head_gives_the_last_position_and_no_other_answer(tmp_path, base, changes):
    """The logits that generation reads are the same bits, and none but them are computed.

    Not the last bits of a head in 4 bits: without AVX-512, one row takes another kernel than several.
    """
    import onnxruntime_genai as og

    found = []
    for prune in (False, True):
        model = og.Model(str(run(tmp_path / str(prune), base, prune_lm_head=prune, **changes)))
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=len(IDS) + 6, do_sample=False)
        generator = og.Generator(model, settings)
        generator.append_tokens(IDS)
        rows = np.array(generator.get_output("logits")).shape[1]
        steps = []
        for _ in range(6):
            steps.append(np.array(generator.get_logits()).reshape(-1))
            generator.generate_next_token()
        found.append((rows, np.stack(steps), generator.get_sequence(0).tolist()))
    (every, whole, answer), (one, pruned, same) = found
    assert (every, one) == (len(IDS), 1)
    tolerance = 0 if changes else 1e-5
    np.testing.assert_allclose(pruned, whole, rtol=tolerance, atol=tolerance)
    assert same == answer


SWEEP = list(
    itertools.product(
        ("rtn", "k_quant", "default"), (True, False), (None, "last_matmul:int8", "last_matmul:int8,mixed_layers:int8")
    )
)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("algo", "symmetric", "mixed"), SWEEP)
def test_every_allowed_combination_works_or_is_refused_clearly(
    tmp_path, capsys, base, untied, algo, symmetric, mixed, tied
):
    """Never a folder that does not run, never a crash of another kind."""
    changes = {"algo_config": algo, "is_symmetric": symmetric, "matmul_mixed_precision": mixed}
    model, code = base if tied else untied, 0
    try:
        folder = run(tmp_path, model, **changes)
    except SystemExit as stop:
        code = stop.code
    if code == 0:
        assert divergence(torch_logits(load(model)), onnx_logits(folder)) < 0.02
        return
    message, build = capsys.readouterr().err, tmp_path / "build"
    known = ("did not do what the section quantize asks for", "cannot run the exported model", "algo_config `default`")
    assert code == 1
    assert any(text in message.split("error: ")[-1] for text in known)
    assert not build.exists() or list(build.iterdir()) == []
    assert algo == "default" or not symmetric  # what the shipped settings use works


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_block_size_is_honoured(tmp_path, untied, block):
    folder = run(tmp_path, untied, block_size=block)
    assert graph_checks.check_graph(section(block_size=block), folder)["block_sizes"] == [block]


# -- models that are refused -------------------------------------------------------------------------------------------


def test_unsupported_architecture(tmp_path, capsys, base):
    """GPT-2 is known to transformers and unknown to the builder: refused before anything is exported."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(model)
    for path in base.glob("token*"):
        shutil.copyfile(path, model / path.name)
    message = refused(tmp_path / "run", capsys, model)
    assert (
        f"{model}: the architecture GPT2LMHeadModel was not proven to export right. Proven: LlamaForCausalLM, "
        in message
    )


def test_missing_model_names_the_command_that_makes_it(tmp_path, capsys):
    message = refused(tmp_path / "run", capsys, tmp_path / "nowhere")
    assert f"{tmp_path}/nowhere" in message
    assert f"snakemake --cores all {tmp_path}/nowhere" in message


def test_model_without_weights(tmp_path, capsys, base):
    model = Path(shutil.copytree(base, tmp_path / "empty"))
    (model / "model.safetensors").unlink()
    assert f"{model}: no weights (model.safetensors" in refused(tmp_path / "run", capsys, model)


def test_truncated_weights_are_refused_before_the_export(tmp_path, capsys, base):
    model = Path(shutil.copytree(base, tmp_path / "cut"))
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-100])
    message = refused(tmp_path / "run", capsys, model)
    assert f"{model}/model.safetensors: truncated or corrupt safetensors" in message


def test_existing_output_is_refused(tmp_path, capsys, base):
    folder = run(tmp_path, base)
    before = (folder / "model.onnx").read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path, base)
    assert f"{folder} already exists" in capsys.readouterr().err
    assert (folder / "model.onnx").read_bytes() == before
