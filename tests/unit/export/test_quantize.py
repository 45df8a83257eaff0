"""quantize: the exported graph is what was asked for, it runs, and its numbers are the model's."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny import make_model, write_params

from scripts import quantize
from slmake import params
from slmake.errors import UserError
from slmake.export import builder, graph_checks

FILES = {
    "chat_template.jinja",
    "genai_config.json",
    "model.onnx",
    "model.onnx.data",
    "tokenizer.json",
    "tokenizer_config.json",
}
PLAIN = {
    "precision": "int4",
    "execution_provider": "cpu",
    "algo_config": "rtn",
    "calibration": "none",
    "block_size": 32,
    "is_symmetric": True,
    "accuracy_level": 4,
    "node_accuracy_levels": {},
    "matmul_mixed_precision": None,
    "int8_nodes": [],
    "op_types_to_quantize": None,
    "nodes_to_exclude": [],
    "shared_embeddings": None,
    "prune_lm_head": False,
}
IDS = np.arange(2, 22, dtype=np.int32)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A tiny Llama whose output head is a matrix of its own."""
    return make_model(tmp_path_factory.mktemp("untied") / "llama", tie_word_embeddings=False)


def run(folder: Path, model: Path, **changes: object) -> Path:
    """Run the script in this process; returns the exported folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_params(folder / "params.yaml", quantize={**PLAIN, **changes})
    target = folder / "build" / "onnx"
    quantize.main(["--params", str(file), "--model", str(model), "--output", str(target)])
    return target


def refused(folder: Path, capsys, model: Path, **changes: object) -> str:
    """The script's error; it exits with 1 and leaves nothing behind, no cache either."""
    with pytest.raises(SystemExit) as caught:
        run(folder, model, **changes)
    assert caught.value.code == 1
    assert not (folder / "build").exists() or list((folder / "build").iterdir()) == []
    message = capsys.readouterr().err
    return message[message.index("quantize: error: ") :]


def section(**changes: object) -> params.Quantize:
    return params.Quantize(**{**PLAIN, **changes})


def bits_of(folder: Path) -> dict[str, int]:
    """Bits of every quantized product, by the name it had before."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            (bits,) = [attribute.i for attribute in node.attribute if attribute.name == "bits"]
            found[node.name.removesuffix(f"_Q{bits}")] = bits
    return found


def onnx_logits(folder: Path) -> np.ndarray:
    """Logits behind the last of the fixed tokens, through onnxruntime-genai."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(IDS) + 1)
    generator = og.Generator(model, settings)
    generator.append_tokens(IDS)
    return np.array(generator.get_output("logits"))[0, -1].astype(np.float64)


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0, -1].double().numpy()


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """KL divergence of two softmax distributions, in nats."""
    one, other = (x - np.log(np.exp(x - x.max()).sum()) - x.max() for x in (one, other))
    return float((np.exp(one) * (one - other)).sum())


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


# -- products in 8 bits ------------------------------------------------------------------------------------------------


def test_mixed_layers_follow_the_builders_rule(tmp_path):
    """Sixteen layers: the first and last eighth, and every third between; value (or fused) and down projections."""
    model = make_model(tmp_path / "deep", num_hidden_layers=16)
    folder = run(tmp_path, model, matmul_mixed_precision="mixed_layers:int8")
    bits = bits_of(folder)
    chosen = {i for i in range(16) if i < 2 or i >= 14 or (i - 2) % 3 == 2}
    assert chosen == {0, 1, 4, 7, 10, 13, 14, 15}
    for name, value in bits.items():
        layer = int(name.split("/")[2].removeprefix("layers.")) if "layers" in name else -1
        eight = layer in chosen and name.split("/")[-2] in ("qkv_proj", "v_proj", "down_proj")
        assert value == (8 if eight else 4), name
    assert sum(value == 8 for value in bits.values()) == 16


ARCHITECTURES = {
    "llama": {"attn": ["qkv_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]},
    "qwen2": {"attn": ["qkv_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]},
    "phi3": {"attn": ["qkv_proj", "o_proj"], "mlp": ["gate_up_proj", "down_proj"]},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_of(request, tmp_path_factory) -> tuple[str, Path]:
    """A tiny model of each architecture."""
    folder = tmp_path_factory.mktemp("arch") / request.param
    return request.param, make_model(folder, request.param, tie_word_embeddings=False)


@pytest.mark.parametrize("mixed", [None, "last_matmul:int8"])
def test_int8_nodes_chooses_products_by_name(tmp_path, model_of, mixed):
    """All of attention and the down projections in 8 bits, the rest in 4; the output head as mixed precision says."""
    _, model = model_of
    folder = run(tmp_path, model, int8_nodes=["*/attn/*", "*/down_proj/*"], matmul_mixed_precision=mixed)
    bits = bits_of(folder)
    for name, value in bits.items():
        eight = "/attn/" in name or "down_proj" in name or (mixed and "lm_head" in name)
        assert value == (8 if eight else 4), name
    found = graph_checks.check_graph(section(int8_nodes=["*/attn/*"], matmul_mixed_precision=mixed), folder)
    assert found["plain_matmuls"] == 0
    assert divergence(torch_logits(load(model)), onnx_logits(folder)) < 0.02


def test_int8_nodes_can_name_one_layer_or_one_projection(tmp_path, base):
    bits = bits_of(run(tmp_path / "layer", base, int8_nodes=["/model/layers.1/*"]))
    assert {name.split("/")[2] for name, value in bits.items() if value == 8} == {"layers.1"}
    bits = bits_of(run(tmp_path / "value", base, int8_nodes=["*/v_proj/*"]))
    assert sorted(name for name, value in bits.items() if value == 8) == [
        "/model/layers.0/attn/v_proj/MatMul",
        "/model/layers.1/attn/v_proj/MatMul",
    ]


def test_accuracy_levels_of_groups_of_nodes(tmp_path, base):
    """The last pattern that matches counts; the weights are those of one level for all, and level 1 takes float32 activations."""
    groups = {"*/mlp/*": 1, "/model/layers.1/mlp/down_proj/*": 0}
    plain, grouped = run(tmp_path / "plain", base), run(tmp_path / "grouped", base, node_accuracy_levels=groups)
    graph = onnx.load(grouped / "model.onnx", load_external_data=False).graph
    nodes = {node.name: node for node in graph.node if node.op_type == "MatMulNBits"}
    for name, node in nodes.items():
        level = next(a.i for a in node.attribute if a.name == "accuracy_level")
        assert level == (0 if "layers.1/mlp/down_proj" in name else 1 if "/mlp/" in name else 4), name
    assert (grouped / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()
    graph_checks.check_graph(section(node_accuracy_levels=groups), grouped)
    with pytest.raises(UserError, match=r"accuracy_level 4 was asked for, the graph has \[0, 1\]"):
        graph_checks.check_graph(section(), grouped)
    assert not np.array_equal(onnx_logits(plain), onnx_logits(grouped))


def test_accuracy_levels_of_nodes_that_are_not_there(tmp_path, capsys, base):
    message = refused(tmp_path, capsys, base, node_accuracy_levels={"*/mpl/*": 1})
    assert "quantize.node_accuracy_levels: `*/mpl/*` matches no node. Names look like /model/layers.0/attn/" in message


def test_int8_nodes_that_match_nothing(tmp_path, capsys, base):
    message = refused(tmp_path, capsys, base, int8_nodes=["*/atn/*"])
    assert "quantize.int8_nodes: `*/atn/*` matches no node. Names look like /model/layers.0/attn/" in message


# -- nodes left alone --------------------------------------------------------------------------------------------------


def test_nodes_to_exclude_is_honoured(tmp_path, untied):
    names = ["/lm_head/MatMul", "/model/layers.0/mlp/up_proj/MatMul"]
    folder = run(tmp_path, untied, nodes_to_exclude=names)
    found = graph_checks.check_graph(section(nodes_to_exclude=names), folder)
    assert found == {
        "quantized_matmuls_by_bits": {"4": 9},
        "block_sizes": [32],
        "plain_matmuls": 2,
        "quantized_gathers": 0,
    }
    assert not set(names) & set(bits_of(folder))


def test_nodes_to_exclude_goes_with_int8_nodes(tmp_path, untied):
    names = ["/model/layers.0/mlp/up_proj/MatMul"]
    bits = bits_of(run(tmp_path, untied, nodes_to_exclude=names, int8_nodes=["*/down_proj/*"]))
    assert "/model/layers.0/mlp/up_proj/MatMul" not in bits
    assert sum(value == 8 for value in bits.values()) == 2
    assert len(bits) == 10


def test_unknown_node_to_exclude_is_named(tmp_path, capsys, untied):
    message = refused(tmp_path, capsys, untied, nodes_to_exclude=["/model/layers.7/mlp/up_proj/MatMul"])
    assert "nodes_to_exclude: no node /model/layers.7/mlp/up_proj/MatMul; names look like /" in message


# -- a graph that is not what was asked for ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, untied) -> dict[str, Path]:
    """Exports of the untied model with different settings."""
    wanted = {
        "int4": {},
        "int8": {"precision": "int8"},
        "fp32": {"precision": "fp32"},
        "head": {"matmul_mixed_precision": "last_matmul:int8"},
        "layers": {"matmul_mixed_precision": "mixed_layers:int8"},
        "zero points": {"is_symmetric": False},
        "level 1": {"accuracy_level": 1},
    }
    folder = tmp_path_factory.mktemp("graphs")
    return {name: run(folder / name, untied, **changes) for name, changes in wanted.items()}


WRONG = [
    ("int8", {}, "precision int4 was asked for, but no product has 4 bits"),
    ("fp32", {}, "precision int4 was asked for, but no product has 4 bits"),
    ("int4", {"precision": "int8"}, "precision int8 was asked for, but no product has 8 bits"),
    ("int4", {"precision": "fp32"}, "precision fp32 was asked for, but 11 products are quantized"),
    ("int4", {"block_size": 64}, "block_size 64 was asked for, the graph has [32]"),
    ("level 1", {}, "accuracy_level 4 was asked for, the graph has [1]"),
    ("int4", {"accuracy_level": 0}, "accuracy_level 0 was asked for, the graph has [4]"),
    ("zero points", {}, "is_symmetric: true was asked for, but 11 products have zero points"),
    ("int4", {"is_symmetric": False}, "is_symmetric: false was asked for, but no product has zero points"),
    ("head", {}, "no mixed precision was asked for, but 1 products are in 8 bits"),
    ("layers", {}, "no mixed precision was asked for, but "),
    (
        "int4",
        {"matmul_mixed_precision": "last_matmul:int8"},
        "last_matmul:int8 was asked for, but the output head is not in 8 bits",
    ),
    (
        "head",
        {"matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"},
        "mixed_layers:int8 was asked for, but no layer is in 8 bits",
    ),
    (
        "layers",
        {"matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"},
        "last_matmul:int8 was asked for, but the output head is not in 8 bits",
    ),
    ("head", {"int8_nodes": ["*/attn/*"]}, "int8_nodes `*/attn/*` was asked for, but /model/layers.0/attn/"),
    (
        "int4",
        {"op_types_to_quantize": ["MatMul", "Gather"]},
        "Gather was asked to be quantized, but no GatherBlockQuantized node is there",
    ),
    (
        "int4",
        {"nodes_to_exclude": ["/lm_head/MatMul"]},
        "nodes_to_exclude: /lm_head/MatMul is quantized all the same",
    ),
    ("int4", {"prune_lm_head": True}, "prune_lm_head: true was asked for, the graph gives logits of every position"),
]


@pytest.mark.parametrize(("built", "asked", "text"), WRONG, ids=[f"{one[0]}-{one[1]}" for one in WRONG])
def test_graph_that_is_not_what_was_asked_for(graphs, built, asked, text):
    with pytest.raises(UserError) as caught:
        graph_checks.check_graph(section(**asked), graphs[built])
    message = str(caught.value)
    assert message.startswith("the model builder did not do what the section quantize asks for:\n")
    assert text in message
    assert message.count("\n  ") == (
        2 if "was asked for, but no product has 4 bits" in text and built == "int8" else 1
    ) or (built in ("int8", "fp32"))


def test_all_differences_are_told_at_once(graphs):
    with pytest.raises(UserError) as caught:
        graph_checks.check_graph(section(block_size=64, is_symmetric=False, accuracy_level=0), graphs["int4"])
    assert str(caught.value).count("was asked for") == 3


# -- a model that does not run -----------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path, graphs) -> Path:
    """A copy of an int4 export that a test may damage."""
    return Path(shutil.copytree(graphs["int4"], tmp_path / "damaged"))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_weights_are_found(damaged, share):
    path = damaged / "model.onnx.data"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="ONNX Runtime cannot run the exported model: "):
        graph_checks.check_generates(damaged)


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "text", "half"])
def test_damaged_graph_is_found(damaged, content):
    path = damaged / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(UserError, match="ONNX Runtime cannot run the exported model: "):
        graph_checks.check_generates(damaged)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"])
def test_missing_file_is_found(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(UserError, match="ONNX Runtime cannot run the exported model: "):
        graph_checks.check_generates(damaged)


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


# -- options -----------------------------------------------------------------------------------------------------------


def test_builder_options_have_the_names_of_today():
    """The builder ignores unknown names in silence; what it does with these is checked on the graphs above."""
    asked = section(
        matmul_mixed_precision="last_matmul:int8, mixed_layers:int8",
        op_types_to_quantize=["MatMul", "Gather"],
        nodes_to_exclude=["/a/MatMul", "/b/MatMul"],
        shared_embeddings=False,
    )
    options = builder.builder_options(asked)
    assert options == {
        "hf_token": "false",
        "prune_lm_head": "false",
        "block_size": "32",
        "is_symmetric": "true",
        "accuracy_level": "4",
        "algo_config": "rtn",
        "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8",
        "op_types_to_quantize": "MatMul/Gather",
        "nodes_to_exclude": "/a/MatMul,/b/MatMul",
        "shared_embeddings": "false",
    }


def test_builder_options_of_other_precisions():
    assert builder.builder_options(section(precision="fp32")) == {"hf_token": "false", "prune_lm_head": "false"}
    assert builder.builder_options(section(precision="int8", matmul_mixed_precision=None)) == {
        "hf_token": "false",
        "prune_lm_head": "false",
        "block_size": "32",
        "is_symmetric": "true",
        "accuracy_level": "4",
    }
