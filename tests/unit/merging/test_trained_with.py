"""An adapter that brings another chat template or end token than the base's is refused; one of another model of the hub is warned of."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import write_params

from scripts import adapter as script
from slmake.errors import UserError
from slmake.merging.trained_with import other_base, refuse_other_prompts
from slmake.rehearsal.tokenizer import CHAT_TEMPLATE, END, START

OTHER = CHAT_TEMPLATE.replace("{{ m['role'] }}", "<<{{ m['role'] }}>>")


def written(folder: Path, files: dict[str, object]) -> SimpleNamespace:
    """What is read of an adapter, with files beside it: texts, or objects as JSON."""
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return SimpleNamespace(folder=folder)


SAME = {
    "nothing": {},
    "a file": {"chat_template.jinja": CHAT_TEMPLATE, "tokenizer_config.json": {"eos_token": END}},
    "a file with a last line end": {"chat_template.jinja": CHAT_TEMPLATE + "\r\n"},
    "in the configuration": {"tokenizer_config.json": {"chat_template": CHAT_TEMPLATE, "eos_token": {"content": END}}},
    "several": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "rag", "template": OTHER}, {"name": "default", "template": CHAT_TEMPLATE}]
        }
    },
    "a file before the configuration": {
        "chat_template.jinja": CHAT_TEMPLATE,
        "tokenizer_config.json": {"chat_template": OTHER, "eos_token": None},
    },
    "a map": {"special_tokens_map.json": {"eos_token": {"content": END}, "pad_token": START}},
}


@pytest.mark.parametrize("files", SAME.values(), ids=SAME.keys())
def test_the_bases_own_template_and_end_pass(tmp_path, base, files):
    refuse_other_prompts(written(tmp_path, files), base)


DIFFERENT = {
    "a file": ({"chat_template.jinja": OTHER}, "a chat template of its own, and {base} has another"),
    "in the configuration": ({"tokenizer_config.json": {"chat_template": OTHER}}, "fetch_model.chat_template"),
    "end": ({"tokenizer_config.json": {"eos_token": START}}, f"is '{START}', that of {{base}} is '{END}'"),
    "end in a map": ({"special_tokens_map.json": {"eos_token": {"content": START}}}, f"Set eos_token to '{START}'"),
    "a new end": ({"tokenizer_config.json": {"eos_token": "<|new|>"}}, "Merge it where it was trained"),
    "damaged": ({"tokenizer_config.json": "{"}, "tokenizer_config.json is damaged: not a JSON object."),
}


@pytest.mark.parametrize(("files", "message"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_another_template_or_end_is_refused(tmp_path, base, files, message):
    with pytest.raises(UserError) as caught:
        refuse_other_prompts(written(tmp_path, files), base)
    assert message.format(base=base) in str(caught.value)


def test_a_template_for_a_base_that_has_none_is_refused_until_the_base_has_it(tmp_path, base):
    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    (tmp_path / "adapter").mkdir()
    adapter = written(tmp_path / "adapter", {"chat_template.jinja": OTHER})
    with pytest.raises(UserError, match="has none: prompts would be others than in its training"):
        refuse_other_prompts(adapter, plain)
    (plain / "chat_template.jinja").write_text(OTHER + "\n", encoding="utf-8")
    refuse_other_prompts(adapter, plain)


HUB = "hf:org/Some-7B@v1"


@pytest.mark.parametrize(
    ("trained_on", "source"),
    [
        ("org/Some-7B", HUB),
        ("mirror/some-7b", HUB),
        ("unsloth/Some-7B-unsloth-bnb-4bit", HUB),
        ("/data/models/other", HUB),
        ("./other", HUB),
        ("a/local/other", HUB),
        ("other", HUB),
        ("build/base", HUB),
        (None, HUB),
        ("org/Other-7B", "data/base"),
        ("org/Other-7B", "pypi:other==1.0/model.gguf"),
    ],
)
def test_the_same_or_an_unknown_model_is_not_warned_of(trained_on, source):
    adapter = SimpleNamespace(config={"base_model_name_or_path": trained_on})
    assert other_base(adapter, Path("build/base"), source) is None


def test_another_model_of_the_hub_is_warned_of():
    adapter = SimpleNamespace(config={"base_model_name_or_path": "org/Some-7B-Instruct"})
    warning = other_base(adapter, Path("build/base"), HUB)
    assert "trained on org/Some-7B-Instruct, and the base model is org/Some-7B." in warning


def test_the_script_warns_and_refuses(tmp_path, capsys, base, adapter):
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    config = json.loads((own / "adapter_config.json").read_text(encoding="utf-8"))
    (own / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/Some-7B-Instruct"}))
    params = write_params(
        tmp_path / "params.yaml",
        all={"stages": ["merge", "quantize"]},
        fetch_model={"source": HUB, "sha256": None},
        adapter={"source": str(own)},
    )
    places = {"--params": params, "--base": base, "--output": tmp_path / "a", "--report": tmp_path / "a.json"}
    arguments = [str(part) for pair in places.items() for part in pair]
    script.main(arguments)
    assert "adapter: warning: the adapter was trained on org/Some-7B-Instruct" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a.json").unlink()
    (own / "chat_template.jinja").write_text(OTHER, encoding="utf-8")
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "adapter: error: " in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def as_mlx(folder: Path) -> None:
    """As MLX writes an adapter."""
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}')


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (as_mlx, "no adapter_model.safetensors there. The folder has adapter_config.json, adapters.safetensors; "),
        (
            lambda folder: (folder / "adapter_config.json").unlink(),
            "no adapter_config.json there. The folder has adapter_model",
        ),
        (cut, "Download or save it again."),
    ],
    ids=["mlx", "configuration", "damaged"],
)
def test_a_folder_of_the_users_is_not_to_be_built(tmp_path, capsys, base, adapter, change, expected):
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    change(own)
    params = write_params(tmp_path / "params.yaml", all={"stages": ["merge"]}, adapter={"source": str(own)})
    with pytest.raises(SystemExit):
        script.main(
            ["--params", str(params), "--base", str(base), "--output", str(tmp_path / "a"), "--report", f"{tmp_path}/r"]
        )
    message = capsys.readouterr().err
    assert expected in message
    assert "snakemake" not in message
