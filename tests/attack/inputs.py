"""What others hand in: edited packages, sources with secrets, hostile models. Each is refused in words, or does no harm."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path

from kills import Failed, expect

MEMORY = 6 << 30  # bytes that a rule may use for a hostile model


# packages


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(folder: Path, rng: random.Random) -> None:
    path = rng.choice([path for path in files(folder) if path.stat().st_size])
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(folder: Path, rng: random.Random) -> None:
    path = rng.choice([path for path in files(folder) if path.stat().st_size])
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(folder: Path, rng: random.Random) -> None:
    rng.choice(files(folder)).unlink()


def add(folder: Path, rng: random.Random) -> None:
    names = ["extra.py", ".hidden", "onnxruntime_genai.py", "licenses/more", "numpy/__init__.py", ".snakemake_evil.so"]
    path = folder / rng.choice(names)
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit\n", encoding="utf-8")


def rename(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder))
    path.rename(path.with_name(f"{path.name}.old"))


def swap(folder: Path, rng: random.Random) -> None:
    first, second = rng.sample([path for path in files(folder) if path.stat().st_size], 2)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other), second.write_bytes(one)


def link(folder: Path, rng: random.Random) -> None:
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "__init__.py").write_text("raise SystemExit\n", encoding="utf-8")
    (folder / rng.choice(["onnxruntime_genai", "numpy", "licenses/more"])).symlink_to(outside)


def pipe(folder: Path, rng: random.Random) -> None:
    os.mkfifo(folder / rng.choice(["pipe", "licenses/pipe"]))


PACKAGE_EDITS: tuple[Callable, ...] = (flip, cut, delete, add, rename, swap, link, pipe)


def edit_package(whole: Path, work: Path, rng: random.Random) -> str:
    """Edit a package; `verify` must refuse it. Returns the kind of edit."""
    shutil.rmtree(work, ignore_errors=True)
    package = work / "package"
    shutil.copytree(whole / "build" / "package", package, ignore=shutil.ignore_patterns(".snakemake_timestamp"))
    edit = rng.choice(PACKAGE_EDITS)
    edit(package, rng)
    verify, said = importlib.import_module("tools.verify"), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            verify.main(["--package-only", str(package)])
        except SystemExit as stopped:
            expect(stopped.code == 1, f"{edit.__name__}: exit code {stopped.code}")
        else:
            raise Failed(f"verify passes a package after `{edit.__name__}`")
    expect("Traceback" not in said.getvalue(), f"{edit.__name__}: {said.getvalue()}")
    return edit.__name__


# sources

SECRET_NAMES = (
    *("sig", "token", "apikey", "api-key", "api_key", "private_token", "code", "auth", "secret", "pwd", "password"),
    *("subscription-key", "access_token", "X-Amz-Signature", "key", "SAS", "Authorization", "client_secret"),
)
SECRET_FORMS = (
    "https://host.example/x.json?{name}={secret}#sha256={sum}",
    "https://host.example/x.json?a=1&{name}={secret}#sha256={sum}",
    "https://host.example/x.json;{name}={secret}#sha256={sum}",
    "https://host.example/x.json#{name}={secret}",
    "https://user:{secret}@host.example/x.json#sha256={sum}",
    "abfs://container:{secret}@account.dfs.core.windows.net/x",
    "az://container/x?{name}={secret}",
    "azureml://datastores/name/paths/x?{name}={secret}",
    "hf:org/name@main?{name}={secret}",
)


def secret_source(rng: random.Random) -> str:
    """A source with a secret is refused in a message without it. Returns its form."""
    from slmake.sources.schemes import parse

    form, secret = rng.choice(SECRET_FORMS), "".join(rng.choices(string.ascii_letters + string.digits, k=24))
    name = rng.choice(SECRET_NAMES)
    name = rng.choice([name, name.upper(), name.title()])
    source = form.format(name=name, secret=secret, sum="0" * 64)
    try:
        parse(source)
    except ValueError as error:
        expect(secret not in str(error), f"the message repeats the secret: {source}")
    else:
        raise Failed(f"accepted, and so written into files that are shared: {source}")
    return form


# models


def hostile_json(folder: Path, rng: random.Random) -> None:
    """Replace a value of config.json or the tokenizer's configuration."""
    path = folder / rng.choice(["config.json", "tokenizer_config.json", "generation_config.json"])
    content = json.loads(path.read_text(encoding="utf-8"))
    key = rng.choice(list(content))
    content[key] = rng.choice(
        [None, -1, 0, 10**8, 2**31 - 1, 1e308, "", "x" * 10000, [], {}, [[]], True, "../../x", "{{x}}"]
    )
    path.write_text(json.dumps(content), encoding="utf-8")


def hostile_header(folder: Path, rng: random.Random) -> None:
    """Let the weights' header lie: its length, a tensor's shape, type or place."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    match rng.randrange(4):
        case 0:
            path.write_bytes(rng.choice([0, 1, 2**40, 2**63]).to_bytes(8, "little") + data[8:])
            return
        case 1:
            header[name]["shape"] = rng.choice([[2**31, 2**31], [-1], [], [0], [1] * 100])
        case 2:
            header[name]["dtype"] = rng.choice(["F64", "I8", "NOPE", "F8_E4M3", ""])
        case 3:
            header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**40], [-1, 3], [5, 1]])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def hostile_cut(folder: Path, rng: random.Random) -> None:
    """Cut or drop a file of the model."""
    path = rng.choice(files(folder))
    path.unlink() if rng.random() < 0.3 else path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def hostile_code(folder: Path, rng: random.Random) -> None:
    """Ask for code of the model's own to be run."""
    (folder / "evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n",
        encoding="utf-8",
    )
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        content["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.C")
        if name == "config.json":
            content["model_type"] = rng.choice(["evil", "t5", "llama"])
        path.write_text(json.dumps(content), encoding="utf-8")


def hostile_link(folder: Path, rng: random.Random) -> None:
    """Point out of the folder: an index with other paths, or a file that is a link to a private one."""
    private = folder.parent / "private"
    private.mkdir(exist_ok=True)
    (private / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    if rng.random() < 0.5:
        name = rng.choice(["../private/secret.safetensors", str(private / "secret.safetensors")])
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as weights:
            index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "model.safetensors").unlink()
    else:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(private / "secret.safetensors")


def hostile_template(folder: Path, rng: random.Random) -> None:
    """A chat template that does not end, or reaches for Python."""
    path = folder / "chat_template.jinja"
    loops = "{% for a in range(99999) %}" * 5 + "{% endfor %}" * 5
    path.write_text(rng.choice([loops, "{{ ''.__class__.__mro__ }}", "{% if", "{{ 2 ** 9999999 }}"]), encoding="utf-8")


MODELS: tuple[Callable, ...] = (
    *(hostile_json, hostile_header, hostile_cut),
    *(hostile_code, hostile_link, hostile_template),
)


def _fetch(folder: Path, work: Path) -> None:
    """In a process of its own: fetch the model, as the rule does."""
    import resource

    import yaml

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = (work / "log").open("w", encoding="utf-8")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log  # pytest has put others in their place
    params = yaml.safe_load((work / "params.yaml").read_text(encoding="utf-8"))
    params["fetch_model"] |= {"source": str(folder), "sha256": None}
    (work / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    importlib.import_module("scripts.fetch_model").main(
        ["--params", str(work / "params.yaml"), "--output", str(work / "out"), "--report", str(work / "report.json")]
    )


def hostile_model(whole: Path, work: Path, rng: random.Random) -> str:
    """A hostile model is refused within a minute in one message, or is fetched and does no harm. Returns its kind."""
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "model"
    shutil.copytree(whole / "data" / "base", folder)
    shutil.copyfile(whole / "params.yaml", work / "params.yaml")
    attack = rng.choice(MODELS)
    attack(folder, rng)
    process = multiprocessing.get_context("fork").Process(target=_fetch, args=(folder, work))
    process.start()
    process.join(120)
    if hung := process.is_alive():
        process.kill()
    said = (work / "log").read_text(encoding="utf-8", errors="replace")
    expect(not hung, f"{attack.__name__}: not refused within two minutes")
    expect(not (folder / "ran").exists(), f"{attack.__name__}: the model's code was run")
    if process.exitcode:
        expect(process.exitcode == 1, f"{attack.__name__}: exit code {process.exitcode}: {said}")
        expect(said.count("fetch_model: error: ") == 1, f"{attack.__name__}: {said}")
        expect(not (work / "out").exists(), f"{attack.__name__}: refused, but an output is there")
    else:
        expect(attack is not hostile_link, "a file outside of the model's folder was used")
    return attack.__name__
