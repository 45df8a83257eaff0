"""A base model whose configuration names foreign code, or says other than its weights, is refused."""

import pytest
from fetch_script import change, fetch, refused


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["owner/kernels", {"": "sdpa", "text_config": "owner/kernels@main:flash"}])
def test_kernels_of_the_hub_are_refused(tmp_path, capsys, broken, key, value):
    change(broken, "config.json", text_config={key: value})
    assert f"{broken}/config.json: {key} names code on the hub (owner/kernels" in refused(tmp_path, capsys, broken)
    change(broken, "config.json", text_config=None, **{key: "eager"})
    (tmp_path / "again").mkdir()
    fetch(tmp_path / "again", broken)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_an_output_head_beside_a_tied_embedding_must_be_the_same(tmp_path, capsys, broken, tied, same):
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + (0 if same else 1)
    save_file(tensors | {"lm_head.weight": head}, broken / "model.safetensors", metadata={"format": "pt"})
    change(broken, "config.json", tie_word_embeddings=tied)
    if tied and not same:
        message = refused(tmp_path, capsys, broken)
        assert "lm_head.weight and model.embed_tokens.weight differ" in message
        assert "set tie_word_embeddings to false in config.json" in message
    else:
        fetch(tmp_path, broken)
