"""`make reproduce`: a second build in another folder has the same bytes."""

import shutil

from project import change, run


def reproduce(project, *arguments: str):
    return run(project, "python", "-m", "tools.reproduce", *arguments)


def test_a_second_build_is_the_same(repository):
    """Recorded, with leftovers of other builds, and with a file that params.yaml names and Git does not track."""
    (repository / "data" / "seeds.json").write_text("{}", encoding="utf-8")
    shutil.copytree(repository / "build" / "onnx-int4", repository / "build" / "onnx-int8")
    licence = repository / "LICENSE.local"
    licence.write_text("ours\n", encoding="utf-8")
    change(repository, "package", license_files=["LICENSE.local"])
    assert run(repository, "python", "-m", "tools.build").returncode == 0
    done = reproduce(repository)
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == last[2] != "0"
    assert last[-1] == "byte-identical"
    for name in ("build/adapter/adapter_model.safetensors", "build/package/SHA256SUMS", "results/metrics.json"):
        assert any(line.startswith("same") and line.endswith(f"  {name}") for line in done.stdout.splitlines())


def test_what_differs_is_named(repository, tmp_path):
    shutil.copytree(repository, tmp_path / "other", symlinks=True)
    scores = tmp_path / "other" / "results" / "metrics.json"
    scores.write_text(scores.read_text() + " ", encoding="utf-8")
    (tmp_path / "other" / "build" / "adapter" / "README.md").write_text("more", encoding="utf-8")
    done = reproduce(repository, "--against", str(tmp_path / "other"))
    assert done.returncode == 1
    differing = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("DIFFERS")]
    assert differing == ["build/adapter/README.md", "results/metrics.json"]


def test_without_a_build_it_says_so(repository, tmp_path):
    done = reproduce(repository, "--against", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "error: nothing is built in" in done.stdout
