"""Configurations that people have and that are none: one message each, and nothing is written."""

import copy
import json
import random

import pytest
from test_forms import BUILDER, GPTQ, loaded, nodes, notes, read, small, tutorial

from slmake import params
from tools import import_olive

WHOLE = json.dumps(tutorial())
BOMB = "a: &a [1, 1]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def error_of(arguments: list[str]) -> int:
    """The importer's exit code."""
    try:
        import_olive.main(arguments)
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture
def check_refused(tmp_path, capsys, monkeypatch):
    """The importer's error, after an exit code of 1: it is the only one, without a traceback, and no other file is there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def check(code: int, name: str = "olive.json") -> str:
        assert code == 1
        assert [path.name for path in tmp_path.iterdir()] == [name]
        message = capsys.readouterr().err
        assert message.startswith("import_olive: error: ")
        assert message.count("error: ") == 1
        return message

    return check


@pytest.fixture
def refused(tmp_path, check_refused):
    """The error of an import."""

    def run(content: str | bytes, name: str = "olive.json", output: str = "imported") -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return check_refused(error_of([str(tmp_path / name), "--output", str(tmp_path / output)]), name)

    return run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("// Olive\n" + WHOLE, "JSON has no comments"),
        (WHOLE[:-1] + ",}", "no comma before a closing bracket"),
        (WHOLE[:-1] + ', "passes": {}}', "the field `passes` is given twice"),
        ("input_model: {}\n", "a YAML file's name ends in .yaml or .yml"),
        (WHOLE + WHOLE, "Extra data"),
        (WHOLE.encode("utf-16"), "cannot be read: 'utf-8' codec can't decode"),
        (b"\x00\xff\x00", "cannot be read"),
        ("", "cannot be read"),
        ("null", "found NoneType"),
        ("{}", "2 fields not understood: input_model, passes"),
        ("[" * 50_000 + "]" * 50_000, "cannot be read: maximum recursion depth"),
        ('{"input_model": ' + "9" * 5000 + "}", "cannot be read: Exceeds the limit"),
        ('{"input_model": 1e999, "passes": NaN}', "2 fields not understood: input_model, passes"),
    ],
    ids=[
        "comment",
        "comma",
        "twice",
        "yaml",
        "two",
        "utf-16",
        "binary",
        "empty",
        "null",
        "{}",
        "deep",
        "digits",
        "infinite",
    ],
)
def test_files_that_are_no_json(refused, content, message):
    assert message in refused(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("input_model: {}\ninput_model: {}\n", "`input_model` is given twice"),
        ("input_model:\n\t type: HfModel\n", "cannot start any token"),
        ("input_model: &a\n  config: *a\n", "recursive"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("[" * 2_000, "nested too deeply"),
        ("? [a]\n: 1\n", "cannot be a name"),
        ("", "found NoneType"),
        (BOMB + "input_model: *i\n", "fields not understood"),
        ("on: 1\n2: 3\n~: 4\n", "5 fields not understood"),
    ],
    ids=["twice", "tab", "recursive", "tag", "two", "deep", "name", "empty", "bomb", "keys"],
)
def test_files_that_are_no_configuration_in_yaml(refused, content, message):
    assert message in refused(content, "olive.yaml")


def test_folders_and_names_in_the_place_of_files(refused, tmp_path, capsys):
    assert "olive.json: File exists. Name another path." in refused(WHOLE, output="olive.json/imported")
    assert "File name too long. Name another path." in refused(WHOLE, output="x" * 300)
    with pytest.raises(SystemExit):
        import_olive.main([str(tmp_path), "--output", str(tmp_path / "imported")])
    assert capsys.readouterr().err == f"import_olive: error: {tmp_path}: Is a directory. Name another path.\n"


def test_passes_of_other_models_are_named_together(refused):
    passes = [
        {"type": name}
        for name in (
            "OrtTransformersOptimization",
            "OnnxStaticQuantization",
            "VitisAIQuantization",
            "MergeAdapterWeights",
        )
    ]
    message = refused(json.dumps(small(*passes)))
    assert "3 fields not understood: passes.p0.type, passes.p1.type, passes.p2.type. Nothing was written." in message


def test_nothing_to_do(refused):
    assert "1 field not understood: passes." in refused(json.dumps(small()))


@pytest.mark.parametrize("path", ["/mnt/models/phi", "C:\\\\models\\\\phi", "D:/phi", "~/phi"])
def test_paths_of_another_machine_are_to_be_filled_in(tmp_path, path):
    imported = read(small(BUILDER, input_model={"type": "HfModel", "model_path": path}))
    assert "nothing is at this path here" in notes(imported, "todo")["input_model.model_path"]
    assert loaded(imported, tmp_path).fetch_model.source == path


SECRETS = [
    "https://store.blob.core.windows.net/c/x.json?sv=1&sig=s3cr3tS3CR3T",
    "https://me:s3cr3tS3CR3T@host/x.json",
    "https://me:s3cr3tS3CR3T-that-is-longer-than-a-cell-of-the-table-is@host/x.json",
]


@pytest.mark.parametrize("address", [*SECRETS, [SECRETS[0], "b.json"], {"train": SECRETS[2], "test": "b.json"}])
@pytest.mark.parametrize("field", ["model_path", "adapter_path", "data_files", "data_dir", "token"])
def test_no_credential_is_printed(tmp_path, capsys, address, field):
    config = tutorial()
    block = (
        config["input_model"] if field.endswith("path") else config["data_configs"][0]["load_dataset_config"]["params"]
    )
    block[field] = address
    (tmp_path / "olive.json").write_text(json.dumps(config), encoding="utf-8")
    error_of([str(tmp_path / "olive.json"), "--output", str(tmp_path / "imported")])
    printed = "".join(capsys.readouterr())
    assert field in printed
    assert "s3cr3t" not in printed


def test_an_address_without_a_credential_is_printed_as_it_is():
    address = "https://host/x.json?download=true"
    imported = read(tutorial(data=address))
    assert (
        notes(imported, "renamed")["data_configs.0.load_dataset_config.params.data_files"]
        == f"prepare.source: {address}"
    )


VALUES = [None, True, 0, -1, 10**400, 1e308, float("nan"), "", "x", "<path>", "C:\\x", "a" * 5000, [], {}, [[]], [None], {"": ""}, "{0}", "train[:150%]",
          {"type": "azureml_datastore"}, "\ud800", "a\0b", ["cpu", 1]]  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_what_a_random_change_makes_is_a_valid_file_or_one_message(tmp_path, check_refused, seed):
    draw = random.Random(seed)
    forms = [tutorial(), tutorial(old=False), tutorial(spelling="kwargs", old=False), small(GPTQ, BUILDER)]
    content = copy.deepcopy(draw.choice(forms))
    for _ in range(draw.choice([1, 2, 3])):
        path = draw.choice([path for path in nodes(content) if path])
        inner = content
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = copy.deepcopy(draw.choice(VALUES))
    (tmp_path / "olive.json").write_text(json.dumps(content), encoding="utf-8")
    code = error_of([str(tmp_path / "olive.json"), "--output", str(tmp_path / "imported")])
    if code:
        check_refused(code)
    else:
        assert params.load(tmp_path / "imported" / "params.yaml").fetch_model.source
