"""tools/remote.py in a tiny DVC repository, with a folder in the place of the blob store: what is missing, cut or edited."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slmake import cli
from slmake.errors import UserError
from slmake.platforms import atomic_dvc, dvc, dvc_yaml
from tools import remote

STAGES = """\
stages:
  merge:
    cmd: snakemake --allowed-rules merge
    deps: [data/rows.json, data/texts]
    outs: [build/merged, results/scores.csv, {results/metrics.json: {cache: false}}]
"""
# A user's own: one output that DVC keeps, and one that it does not.
ADDED = """\
  {name}:
    cmd: write
    outs: [data/made/{name}.json, {{data/made/{name}.count: {{cache: false}}}}]
"""
JOB = cli.Job("remote", sys.stderr, None)
PROVE = remote.prove
DATA, FOLDER, WEIGHTS = Path("data/rows.json"), Path("data/texts"), Path("build/merged/model.safetensors")


def write(path: Path | str, text: str) -> None:
    """Write a new file: the old one may be a hard link into DVC's cache."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def record(stage: str = "merge") -> None:
    with atomic_dvc.Repo() as repo:
        repo.commit(stage, force=True)


def add(path: Path) -> None:
    with atomic_dvc.Repo() as repo:
        repo.add(str(path))


def copy(names: list[str]) -> None:
    """Stands in for `upload`."""
    for name in names:
        shutil.copy(dvc.cached(name), Path("there", name))


def in_this_process(*arguments: str, capture: bool = False) -> SimpleNamespace:
    """Stands in for `dvc`."""
    return SimpleNamespace(returncode=atomic_dvc.main(list(arguments)), stderr="")


def objects(*paths: Path) -> list[Path]:
    """Where the cache keeps files of outputs, and lists of folders."""
    listed = {out["path"]: out["md5"] for out in dvc.tracked()}
    return [dvc.cached(listed.get(str(path)) or dvc.md5(path)) for path in paths]


def there(path: Path) -> Path:
    """Where the stand-in for the remote keeps an object of the cache."""
    return Path("there", path.parent.name + path.name)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A repository with a recorded stage, and with a file and a folder of data that DVC tracks; an empty remote in `there`."""
    folder = tmp_path_factory.mktemp("recorded") / "project"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        atomic_dvc.Repo.init(no_scm=True).close()
        for path in (DATA, FOLDER / "a.txt", FOLDER / "b.txt", WEIGHTS, "build/merged/config.json"):
            write(path, f"first {path}")
        shutil.copy(WEIGHTS, "build/merged/again.safetensors")  # its bytes are one object
        for path in ("results/scores.csv", "results/metrics.json", "dvc.yaml"):
            write(path, STAGES)
        add(DATA)
        add(FOLDER)
        record()
        Path("there").mkdir()
    return folder


@pytest.fixture(autouse=True)
def repository(recorded, tmp_path, monkeypatch):
    """A copy of it."""
    shutil.copytree(recorded, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    dvc.cache.cache_clear()
    monkeypatch.setattr(remote, "dvc", in_this_process)
    monkeypatch.setattr(remote, "stored", lambda: {path.name: path.stat().st_size for path in Path("there").iterdir()})
    monkeypatch.setattr(remote, "transfer", lambda verb, job: None)
    monkeypatch.setattr(remote, "upload", copy)
    monkeypatch.setattr(remote, "listed", lambda name: Path("there", name).read_bytes())
    monkeypatch.setattr(remote, "place", lambda: ("", "models", "tones"))
    monkeypatch.setattr(remote, "prove", lambda job: None)
    monkeypatch.setattr(dvc_yaml, "update", lambda: None)
    yield
    dvc.cache.cache_clear()


def push() -> None:
    remote.push(JOB)


def add_stage(name: str, folder: str = ".") -> Path:
    """A user's own stage, in the dvc.yaml of a folder, and its output, which DVC keeps; it is not recorded yet."""
    file = Path(folder, "dvc.yaml")
    write(file, (file.read_text(encoding="utf-8") if file.exists() else "stages:\n") + ADDED.format(name=name))
    for end in ("json", "count"):
        write(Path(folder, f"data/made/{name}.{end}"), f"first {name}")
    return Path(folder, f"data/made/{name}.json")


def kept(where: str) -> tuple[Path, str]:
    """Recorded data of a user, outside of data/ or of the top level, or of the user's own stage, and what keeps it."""
    if where == "corpora":
        path = Path("corpora/news/train.json")
        write(path, "first")
        add(path)
        return path, "corpora/news/train.json.dvc"
    name, folder = {"stage": ("rows", "."), "nested": ("rows", "corpora")}[where]
    path = add_stage(name, folder)
    named = name if folder == "." else f"{folder}/dvc.yaml:{name}"
    record(named)
    return path, named


def test_push_uploads_all_that_is_recorded_but_what_git_keeps():
    push()
    kept = {there(path).name for path in objects(DATA, FOLDER, Path("build/merged"), Path("results/scores.csv"))}
    kept |= {there(path).name for path in objects(*FOLDER.iterdir(), WEIGHTS, Path("build/merged/config.json"))}
    assert {path.name for path in Path("there").iterdir()} == kept


@pytest.mark.parametrize("path", [WEIGHTS, WEIGHTS.parent, Path("results/scores.csv"), DATA, FOLDER / "a.txt", None])
def test_push_refuses_what_is_in_neither_place(path):
    """None: the whole cache. `dvc push` passes over it, and a colleague's `dvc pull` would fail for good."""
    shutil.rmtree(".dvc/cache") if path is None else objects(path)[0].unlink()
    with pytest.raises(UserError, match="whole neither in DVC's cache here nor in the remote"):
        push()
    assert not list(Path("there").iterdir())


@pytest.mark.parametrize("path", [WEIGHTS, WEIGHTS.parent, DATA, None])
def test_push_needs_nothing_here_that_is_there(path):
    """As after `dvc pull` of some outputs."""
    push()
    before = remote.stored()
    shutil.rmtree(".dvc/cache") if path is None else objects(path)[0].unlink()
    push()
    assert remote.stored() == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"cut")])
def test_push_refuses_what_is_gone_or_cut_there_and_not_here(damage):
    push()
    [weights, folder] = objects(WEIGHTS, WEIGHTS.parent)
    weights.unlink()
    folder.unlink()  # then the list is that of the remote
    damage(there(weights))
    with pytest.raises(UserError, match="build/merged is whole neither"):
        push()


IMPORT = 'deps:\n- path: rows.json\n  repo: {{url: elsewhere, rev_lock: "1"}}\nfrozen: true\nouts:\n{outs}'


@pytest.mark.parametrize("form", ["outs:\n- push: false\n{outs}", "outs:\n- remote: private\n{outs}", IMPORT])
def test_push_leaves_alone_what_dvc_does_not_push_there(form):
    Path(".dvc/config").write_text("[core]\n    no_scm = True\n    remote = storage\n")
    receipt = Path(f"{DATA}.dvc")
    own = receipt.read_text().removeprefix("outs:\n")
    receipt.write_text(form.format(outs=own if form is IMPORT else own.replace("- ", "  ")))
    push()
    [content, weights] = objects(DATA, WEIGHTS)
    assert not there(content).exists()
    assert there(weights).exists()
    content.unlink()
    push()  # nor is it missed
    receipt.write_text("outs:\n- remote: storage\n" + own.replace("- ", "  "))  # the default one, by its name
    with pytest.raises(UserError, match=f"{DATA} is whole neither"):
        push()


@pytest.mark.parametrize("here", [True, False])
def test_pull_and_restore_say_what_no_remote_has(here):
    receipt = Path(f"{DATA}.dvc")
    receipt.write_text(receipt.read_text().replace("outs:\n- ", "outs:\n- push: false\n  "))
    Path("there/object").touch()  # `pull` refuses an empty remote
    for command in (remote.restore, remote.pull):
        command(JOB)
    objects(DATA)[0].unlink()
    if not here:
        DATA.unlink()
    for command in (remote.restore, remote.pull):
        with pytest.raises(
            UserError, match=f"{DATA}: DVC's cache here lacks it, and `push: false`.*`.venv/bin/dvc add {DATA}`"
        ):
            command(JOB)
    write(DATA, f"first {DATA}")
    add(DATA)  # as the message says
    remote.restore(JOB)


def test_push_mends_what_is_gone_there_and_is_here():
    push()
    before = remote.stored()
    there(objects(WEIGHTS)[0]).unlink()
    push()
    assert remote.stored() == before


def test_push_refuses_a_damaged_list_of_a_folder():
    [folder] = objects(WEIGHTS.parent)
    folder.chmod(0o644)
    folder.write_bytes(folder.read_bytes()[:20])
    with pytest.raises(UserError, match=r"\.dir is damaged: it is not what its name says"):
        push()


@pytest.mark.parametrize("path", [DATA, FOLDER / "a.txt", FOLDER / "new.txt"])
@pytest.mark.parametrize("built", [False, True], ids=["", "the outputs are of it"])
def test_edited_data_is_neither_overwritten_nor_taken_for_pushed(path, built):
    write(path, "edited")
    if built:
        record()
    shutil.rmtree("build")
    Path("there/object").touch()  # `pull` refuses an empty remote
    for command in (remote.restore, remote.pull, remote.push):
        with pytest.raises(UserError, match=rf"is not what data/{path.parts[1]}\.dvc recorded.* nothing was (over|up)"):
            command(JOB)
    assert path.read_text() == "edited"
    remote.outputs.remove(Path("data", path.parts[1]))  # as the message says
    remote.restore(JOB)
    assert (FOLDER / "a.txt").read_text() == f"first {FOLDER / 'a.txt'}"
    assert DATA.read_text() == f"first {DATA}"
    assert WEIGHTS.read_text() == f"first {WEIGHTS}"


def test_data_that_the_cache_has_is_replaced_by_that_of_another_commit():
    receipt = Path("data/rows.json.dvc").read_bytes()
    write(DATA, "second")
    add(DATA)
    Path("data/rows.json.dvc").write_bytes(receipt)  # as `git checkout` does
    remote.restore(JOB)
    assert DATA.read_text() == f"first {DATA}"


def keeps_outputs_of_other(path: Path) -> None:
    """An output that was made of the data's present content, which is not the recorded one, is not overwritten."""
    write(WEIGHTS, "of the second")
    with pytest.raises(UserError, match=rf"merge was recorded with other {re.escape(str(path))} than are here"):
        remote.restore(JOB)
    assert WEIGHTS.read_text() == "of the second"


def test_outputs_of_newly_added_data_are_not_overwritten():
    write(DATA, "second")
    add(DATA)
    keeps_outputs_of_other(DATA)


@pytest.mark.parametrize("where", ["corpora", "stage", "nested"])
def test_edited_data_is_kept_wherever_it_is_recorded(where):
    path, name = kept(where)
    first = path.read_text()
    write(path, "edited")
    Path("there/object").touch()  # `pull` refuses an empty remote
    for command in (remote.restore, remote.pull, remote.push):
        with pytest.raises(UserError, match=rf"{path} is not what {name} recorded.* nothing was (over|up)") as refused:
            command(JOB)
    assert path.read_text() == "edited"
    assert f"`.venv/bin/dvc {f'add {path}' if where == 'corpora' else f'commit --force {name}'}`" in str(refused.value)
    add(path) if where == "corpora" else record(name)  # as the message says
    push()
    assert there(dvc.cached(dvc.md5(path))).read_text() == "edited"
    write(path, first)  # the cache has it, as after a checkout of another commit
    remote.restore(JOB)
    assert path.read_text() == "edited"


def test_what_a_stage_that_never_ran_would_write_is_not_removed():
    """DVC removes what stands in the place of an output that was never recorded."""
    path = add_stage("rows")
    with pytest.raises(UserError, match=f"{path} is not what rows recorded"):
        remote.restore(JOB)
    assert path.read_text() == "first rows"


def test_what_dvc_does_not_keep_stops_nobody():
    path, _ = kept("stage")
    write(path.with_suffix(".count"), "edited")
    write(WEIGHTS, "edited")  # a rule can make it again
    push()
    remote.restore(JOB)
    assert path.with_suffix(".count").read_text() == "edited"
    assert WEIGHTS.read_text() == f"first {WEIGHTS}"


@pytest.mark.parametrize("where", ["corpora", "stage", "nested"])
@pytest.mark.parametrize("gone", [False, True])
def test_push_says_what_puts_lost_data_into_the_cache_again(where, gone):
    path, name = kept(where)
    [lost] = objects(path)
    lost.unlink()
    if gone:
        path.unlink()
    with pytest.raises(UserError, match=f"{path} is whole neither") as refused:
        push()
    command = f"add {path}" if where == "corpora" else f"{'repro' if gone else 'commit --force'} {name}"
    assert f"`.venv/bin/dvc {command}` puts it into the cache again" in str(refused.value)
    if gone:
        write(path, "first rows" if where != "corpora" else "first")
    add(path) if where == "corpora" else record(name)
    push()
    assert there(lost).is_file()


def test_outputs_of_what_a_user_s_stage_has_newly_written_are_not_overwritten():
    path, name = kept("stage")
    merge = Path("dvc.yaml").read_text().replace("data/texts]", f"data/texts, {path}]")
    write("dvc.yaml", merge)
    record()
    write(path, "second")
    record(name)
    keeps_outputs_of_other(path)


def test_a_rule_s_lost_output_is_built_again_by_make():
    objects(WEIGHTS)[0].unlink()
    with pytest.raises(UserError, match="`make` puts it into the cache again"):
        push()


@pytest.mark.parametrize("kinds", [["symlink"], ["reflink", "symlink", "copy"], ["hardlink", "copy"]])
def test_outputs_are_files_whatever_links_dvc_is_set_to(kinds):
    """ONNX Runtime reads no weights behind a symbolic link, and a package has files alone."""
    Path(".dvc/config").write_text(f"[core]\n    no_scm = True\n[cache]\n    type = {','.join(kinds)}\n")
    [cached] = objects(WEIGHTS)
    WEIGHTS.unlink()
    WEIGHTS.symlink_to(cached)  # as DVC's own command line makes it
    record()
    assert not WEIGHTS.is_symlink()
    shutil.rmtree("build")
    remote.restore(JOB)
    assert not WEIGHTS.is_symlink()
    assert WEIGHTS.read_text() == cached.read_text() == f"first {WEIGHTS}"


@pytest.mark.parametrize(("edit", "named"), [(None, None), (WEIGHTS, "merge"), (DATA, "merge, data/rows.json.dvc")])
def test_a_user_s_own_stage_that_is_old_stops_no_proof(monkeypatch, edit, named):
    """No rule builds it, and what it makes is no output that is recorded."""
    add_stage("rows")  # never recorded
    path, name = Path("deployed.md"), "deploy"
    write(path, "of the former one")
    write(
        "dvc.yaml", Path("dvc.yaml").read_text() + "  deploy: {cmd: write, deps: [build/merged], outs: [deployed.md]}\n"
    )
    record(name)
    write(WEIGHTS, "second")
    record()  # of a later build
    proved = []
    stand_ins = {"built_from": str, "Plan": str, "stages": lambda: ["merge"], "record": lambda *_: proved.append(True)}
    for function, stand_in in stand_ins.items():
        monkeypatch.setattr(remote, function, stand_in)
    monkeypatch.setattr(remote.params, "load", str)
    if edit:
        write(edit, "edited")
        with pytest.raises(UserError, match=f"but {named} would be built again"):
            PROVE(JOB)
    else:
        PROVE(JOB)
    assert proved == [True] * (not edit)
    assert path.read_text() == "of the former one"


@pytest.mark.parametrize("lost", [WEIGHTS.parent, WEIGHTS, FOLDER, FOLDER / "a.txt", DATA, None])
def test_what_the_cache_has_lost_is_never_deleted(lost):
    """None: the whole cache. `dvc checkout --force` deletes such a folder, though it is what was recorded."""
    everything = [DATA, *FOLDER.iterdir(), *WEIGHTS.parent.iterdir(), Path("results/scores.csv")]
    before = {path: path.read_text() for path in everything}
    shutil.rmtree(".dvc/cache") if lost is None else objects(lost)[0].unlink()
    if lost:
        Path("results/scores.csv").unlink()
    Path("there/object").touch()  # `pull` refuses an empty remote
    with pytest.raises(UserError, match="neither DVC's cache on this disk nor the remote has all of it"):
        remote.pull(JOB)
    with pytest.raises(UserError, match="was left as it is, because DVC's cache on this disk does not have") as refused:
        remote.restore(JOB)
    assert {path: path.read_text() for path in everything} == before
    path = {WEIGHTS: WEIGHTS.parent, FOLDER / "a.txt": FOLDER}.get(lost, lost)
    again = "make" if path == WEIGHTS.parent else f".venv/bin/dvc add {path}"
    assert str(refused.value).startswith(f"{path or DATA} was")
    assert lost is None or f"`{again}` puts it into the cache again" in str(refused.value)
    for added in (DATA, FOLDER):
        add(added)  # as the message says
    record()
    remote.restore(JOB)


def test_a_link_into_a_cache_that_is_gone_is_named():
    shutil.rmtree(".dvc/cache")
    (FOLDER / "a.txt").unlink()
    (FOLDER / "a.txt").symlink_to("gone")
    with pytest.raises(UserError, match=f"{FOLDER} is not what {FOLDER}.dvc recorded"):
        remote.restore(JOB)


def test_restore_says_what_is_neither_here_nor_in_the_cache():
    objects(WEIGHTS)[0].unlink()
    shutil.rmtree("build")
    with pytest.raises(UserError, match=r"^dvc checkout: .*`make pull` brings from a remote"):
        remote.restore(JOB)


@pytest.mark.parametrize("gone", [False, True])
def test_another_commit_has_other_files_in_a_folder_of_data(monkeypatch, gone):
    """dvc.yaml names those that are here: first the folder is put back, then dvc.yaml is written."""

    def update() -> None:
        write("dvc.yaml", STAGES.replace("data/texts]", f"{', '.join(sorted(map(str, FOLDER.glob('*'))))}]"))

    monkeypatch.setattr(dvc_yaml, "update", update)
    update()
    record()
    first = {name: Path(name).read_bytes() for name in (f"{FOLDER}.dvc", "dvc.lock", "dvc.yaml")}
    write(FOLDER / "c.txt", "more")
    write(WEIGHTS, "second")
    add(FOLDER)
    update()
    record()
    for name, content in first.items():  # as `git checkout` does
        Path(name).write_bytes(content)
    if gone:
        shutil.rmtree(FOLDER)
    remote.restore(JOB)
    assert sorted(path.name for path in FOLDER.iterdir()) == ["a.txt", "b.txt"]
    assert WEIGHTS.read_text() == f"first {WEIGHTS}"
