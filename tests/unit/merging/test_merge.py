"""merge: PEFT's own sums bit for bit, one tensor at a time."""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_script import load, logits, make_adapter, run, tensors_of
from safetensors.torch import load_file, save_file
from tiny import ROOT, make_model

from slmake.merging import merge as merge_module
from slmake.merging import shards


def with_adapter(base: Path, adapter: Path, dtype=torch.float32):
    """PEFT's model of base and adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base, dtype), adapter).eval()


MODELS = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """A base model of one architecture, and an adapter for it."""
    architecture, overrides = MODELS[request.param]
    folder = tmp_path_factory.mktemp("pair")
    base = make_model(folder / "base", architecture, **overrides)
    return base, make_adapter(base, folder / "adapter")


# -- the sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("piece", "threads"), [(merge_module.PIECE, 1), (1000, 1), (1000, 5)])
def test_float32_equals_merge_and_unload_bit_for_bit(tmp_path, monkeypatch, pair, piece, threads):
    """Every tensor, by name, whole or in pieces, by one thread or several; the adapter's products changed and nothing else did."""
    base, adapter = pair
    monkeypatch.setattr(merge_module, "PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    merged = tensors_of(run(tmp_path, base, adapter))
    before = tensors_of(base)
    assert merged.keys() == before.keys()
    expected = with_adapter(base, adapter).merge_and_unload().state_dict()
    for name, value in merged.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
        assert torch.equal(value, before[name]) != name.endswith("_proj.weight"), name


def test_merged_model_has_the_logits_of_base_with_adapter(tmp_path, pair):
    base, adapter = pair
    merged = logits(load(run(tmp_path, base, adapter)))
    torch.testing.assert_close(merged, logits(with_adapter(base, adapter)), rtol=0, atol=1e-4)
    assert (merged - logits(load(base))).abs().max() > 0.01


def test_everything_but_the_weights_is_copied(tmp_path, base, adapter):
    folder = run(tmp_path, base, adapter)
    names = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in set(names) - {"model.safetensors"}:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name


def test_two_runs_are_byte_identical(tmp_path, base, adapter):
    (tmp_path / "again").mkdir()
    first, second = run(tmp_path, base, adapter), run(tmp_path / "again", base, adapter)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_file_is_laid_out_as_safetensors_itself_would(tmp_path, base, adapter):
    """The same bytes as `save_file` of the same tensors: a header in its order, aligned, without gaps."""
    folder = run(tmp_path, base, adapter)
    save_file(tensors_of(folder), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])
    assert length % 8 == 0


def test_sharded_base_keeps_shard_names_and_index(tmp_path):
    base = make_model(tmp_path / "base", shards="150KB", tie_word_embeddings=False)
    adapter = make_adapter(base, tmp_path / "adapter")
    folder = run(tmp_path, base, adapter)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(path.name for path in folder.glob("*.safetensors")) == files
    for name in files:
        assert load_file(folder / name).keys() == load_file(base / name).keys()
    index = "model.safetensors.index.json"
    assert (folder / index).read_bytes() == (base / index).read_bytes()
    expected = with_adapter(base, adapter).merge_and_unload().state_dict()
    for name, value in tensors_of(folder).items():
        assert torch.equal(value, expected[name]), name
    torch.testing.assert_close(logits(load(folder)), logits(with_adapter(base, adapter)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "r": 8, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}},
        {"alpha_pattern": {"v_proj": 32, r"layers\.0\..*gate_proj": 1}},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 5}, "use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 8}},
        {"alpha_pattern": {"layers.0.mlp.up_proj": 2, "up_proj": 16}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["rslora", "ranks", "alphas", "all three", "overlapping ranks", "overlapping alphas", "two modules"],
)
def test_scaling_is_pefts(tmp_path, base, config):
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    merged = tensors_of(run(tmp_path, base, adapter))
    expected = with_adapter(base, adapter).merge_and_unload().state_dict()
    for name, value in merged.items():
        assert torch.equal(value, expected[name]), name


# -- data types --------------------------------------------------------------------------------------------------------


def summed(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W + s B A in float32 from the files, with s = alpha / r = 2."""
    updates = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, value in tensors_of(base).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = updates.get(f"{key}A.weight"), updates.get(f"{key}B.weight")
        found[name] = value.float() if a is None else value.float() + (b @ a) * 2.0
    return found


def test_bfloat16_base_is_summed_in_float32_and_rounded_once(tmp_path, half, adapter):
    folder = run(tmp_path, half, adapter)
    merged = tensors_of(folder)
    for name, value in summed(half, adapter).items():
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], value.bfloat16()), name
    assert (folder / "config.json").read_bytes() == (half / "config.json").read_bytes()
    assert load(folder, "auto").dtype == torch.bfloat16


def test_float32_asked_for_over_a_bfloat16_base_keeps_the_float32_sums(tmp_path, half, adapter):
    folder = run(tmp_path, half, adapter, dtype="float32")
    merged = tensors_of(folder)
    for name, value in summed(half, adapter).items():
        assert merged[name].dtype == torch.float32
        assert torch.equal(merged[name], value), name
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_float32_base_is_rounded_to_the_type_asked_for(tmp_path, base, adapter, name):
    kind = getattr(torch, name)
    folder = run(tmp_path, base, adapter, dtype=name)
    merged = tensors_of(folder)
    for key, value in summed(base, adapter).items():
        assert torch.equal(merged[key], value.to(kind)), key
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == name
    assert load(folder, "auto").dtype == kind
    assert (folder / "model.safetensors").stat().st_size < 0.55 * (base / "model.safetensors").stat().st_size


def test_index_of_a_cast_model_has_its_size(tmp_path):
    base = make_model(tmp_path / "base", shards="150KB")
    folder = run(tmp_path, base, make_adapter(base, tmp_path / "adapter"), dtype="bfloat16")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(2 * value.numel() for value in tensors_of(folder).values())


def test_tensors_of_other_types_pass_through(tmp_path, base, adapter):
    """Integers and booleans keep their type and values, also when the floats are cast."""
    mixed = Path(shutil.copytree(base, tmp_path / "mixed"))
    extra = {
        "model.count": torch.tensor([1, 2**40]),
        "model.flags": torch.tensor([True, False, True]),
        "model.scalar": torch.tensor(0.5, dtype=torch.float64),
        "model.empty": torch.zeros(0, 4),
    }
    save_file({**tensors_of(base), **extra}, mixed / "model.safetensors", metadata={"format": "pt"})
    same = tensors_of(run(tmp_path, mixed, adapter))
    for name, value in extra.items():
        assert same[name].dtype == value.dtype
        assert torch.equal(same[name], value), name
    (tmp_path / "cast").mkdir()
    cast = tensors_of(run(tmp_path / "cast", mixed, adapter, dtype="bfloat16"))
    assert cast["model.count"].tolist() == [1, 2**40]
    assert cast["model.flags"].tolist() == [True, False, True]
    assert cast["model.scalar"].dtype == torch.bfloat16


# -- memory ------------------------------------------------------------------------------------------------------------


def test_peak_memory_is_far_below_the_models_size(tmp_path):
    """A base of 336 MB in one shard of 40 tensors: the process grows by less than 60 percent of that.

    A merge that holds the model, or keeps the whole shard mapped, needs at least 100 percent. One that has a few copies
    of one 8 MB tensor needs about 50 MB; the rest of the bound is the allocator's. The peak is the kernel's VmHWM:
    getrusage's ru_maxrss would begin with the peak of the process that started this one.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(40)]
    torch.manual_seed(0)
    save_file({f"{n}.weight": torch.randn(1024, 2048) for n in names}, base / "model.safetensors", {"format": "pt"})
    pairs = {f"base_model.model.{n}.lora_A.weight": torch.randn(4, 2048) for n in names}
    pairs |= {f"base_model.model.{n}.lora_B.weight": torch.randn(1024, 4) for n in names}
    save_file(pairs, adapter / "adapter_model.safetensors", {"format": "pt"})
    (base / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    code = """
import re, sys
import torch
from slmake import cli, params
from slmake.merging.merge import merge
from pathlib import Path
from safetensors import safe_open

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

base, adapter, target = map(Path, sys.argv[1:])
target.mkdir()
torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
with cli.job("merge") as job:
    merge(params.Merge(), params.Finetune(), base, adapter, target, job)
print(peak() - before)
"""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", code, base, adapter, tmp_path / "merged"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = (base / "model.safetensors").stat().st_size
    assert size > 300e6
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size == size
    share = int(done.stdout) / size
    assert share < 0.6, f"{share:.0%} of the model's size"
    with_update = load_file(tmp_path / "merged" / "model.safetensors")[f"{names[7]}.weight"]
    a, b = (pairs[f"base_model.model.{names[7]}.lora_{x}.weight"] for x in "AB")
    assert torch.equal(with_update, load_file(base / "model.safetensors")[f"{names[7]}.weight"] + (b @ a) * 2.0)


# -- QLoRA -------------------------------------------------------------------------------------------------------------


QLORA = {"method": "qlora", "quant_type": "nf4", "double_quant": True, "compute_dtype": "float32", "qat": "none"}


def four_bit(base: Path, adapter: Path, kind: str = "nf4", double: bool = True):
    """The 4-bit model with its adapter, as finetune runs it.

    In training mode (there is no dropout): in evaluation mode bitsandbytes repacks the weights for a CPU kernel that
    rounds activations and scales to bfloat16.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    return PeftModel.from_pretrained(model, adapter).train()


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_merge_onto_dequantized_weights_is_the_model_that_was_trained(tmp_path, base, adapter, kind, double):
    """Logits within 1e-5 of the 4-bit model with its adapter (float32 sums in another order); full precision is off."""
    trained = logits(four_bit(base, adapter, kind, double))
    finetune = {**QLORA, "quant_type": kind, "double_quant": double}
    merged = logits(load(run(tmp_path, base, adapter, finetune, onto="dequantized")))
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-5)
    (tmp_path / "full").mkdir()
    full = logits(load(run(tmp_path / "full", base, adapter, finetune)))
    assert (full - trained).abs().max() > 0.01


def test_dequantized_leaves_embeddings_and_norms_alone(tmp_path, base, adapter):
    merged, before = tensors_of(run(tmp_path, base, adapter, QLORA, onto="dequantized")), tensors_of(base)
    for name, value in before.items():
        assert torch.equal(merged[name], value) != name.endswith("_proj.weight"), name


def test_partial_adapter_onto_dequantized_weights_is_the_model_that_was_trained(tmp_path, base):
    """QLoRA keeps every linear layer in 4 bits, also those that have no adapter."""
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    merged = logits(load(run(tmp_path, base, adapter, QLORA, onto="dequantized")))
    torch.testing.assert_close(merged, logits(four_bit(base, adapter)), rtol=0, atol=1e-5)


def test_tensors_that_must_be_whole_share_one_set_of_buffers(tmp_path, monkeypatch, base, adapter):
    """The number of threads does not change it: one whole tensor is in memory at a time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(merge_module, "PIECE", 64)
    sets, get = {}, shards.Buffers.get

    def noting(self, role, shape, dtype):
        if math.prod(shape) > 32 * 128:  # more than the rows that are merged at least at a time
            sets[id(self.flat)] = self.flat
        return get(self, role, shape, dtype)

    monkeypatch.setattr(shards.Buffers, "get", noting)
    run(tmp_path, base, adapter, QLORA, onto="dequantized")
    assert len(sets) == 1


def test_dequantized_without_qlora_is_refused(tmp_path, capsys, base, adapter):
    with pytest.raises(SystemExit):
        run(tmp_path, base, adapter, {"method": "lora"}, onto="dequantized")
    assert "merge.onto: dequantized goes with finetune.method: qlora" in capsys.readouterr().err
    assert not (tmp_path / "build").exists()
