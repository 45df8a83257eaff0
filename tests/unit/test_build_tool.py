"""The tool behind `make`, without Snakemake."""

import pytest
from tiny import write_params

from tools import build


@pytest.fixture
def pages(tmp_path, monkeypatch) -> list[str]:
    """The pages that a build writes in a project with the figures of a former one."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml")
    build.OVERVIEW.parent.mkdir(parents=True)
    build.OVERVIEW.touch()
    written = []
    monkeypatch.setattr(build, "run", lambda screen, targets: True)
    monkeypatch.setattr(build.dvc_yaml, "update", lambda: None)
    monkeypatch.setattr(build, "write_page", lambda: written.append("page"))
    return written


@pytest.mark.parametrize("target", ["results/rehearsal.json", "build/dataset", "finetune"])
def test_what_is_built_without_the_report_needs_no_page(pages, target):
    """`make rehearse` and `make preview`: figures that params.yaml now asks for are not there yet."""
    assert build.main([target]) == 0
    assert not pages


@pytest.mark.parametrize("target", ["build/report/overview.html", "./build/report/scores.svg", "report", "all"])
def test_the_report_comes_with_its_page(pages, target):
    assert build.main([target]) == 0
    assert pages == ["page"]


def test_a_build_of_everything_has_a_page_if_it_has_a_report():
    assert build.with_report([], ["finetune", "report"])
    assert not build.with_report([], ["finetune"])
