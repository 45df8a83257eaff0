"""The model builder asks for the tokenizer three times; it is loaded once."""

from slmake import params
from slmake.export import builder


def test_the_tokenizer_is_loaded_once_for_an_export(tmp_path, base, monkeypatch):
    import transformers
    from onnxruntime_genai.models import builder as upstream

    load, loaded = transformers.AutoTokenizer.from_pretrained, []

    def count(folder, **options):
        loaded.append(folder)
        return load(folder, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", count)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        section = params.Quantize(precision="fp32", algo_config="rtn", matmul_mixed_precision=None)
        builder.export(section, base, tmp_path / name, tmp_path / "cache")
    assert loaded == [str(base)] * 2, "one for each export; if there is none, the builder loads it otherwise now"
    assert upstream.AutoTokenizer is transformers.AutoTokenizer
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "genai_config.json", "model.onnx"} <= files
