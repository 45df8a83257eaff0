"""A rule that DVC runs refuses a dvc.yaml that does not watch every file of params.yaml that a rule reads."""

import pytest
import yaml
from tiny import write_params

from slmake import params
from slmake.errors import UserError
from slmake.plan import Plan
from slmake.platforms import origins

NAMED = {
    "package": {"license_files": ["LICENSE", "NOTICE"], "constrain": {"json_schema": "answer.json"}},
    "gates": {"published": "published.json"},
    "evaluate": {"metrics": ["json_valid", "my_metric.py:score"], "lm_eval": ["tasks/mine.yaml"]},
}
FILES = {"LICENSE", "NOTICE", "answer.json", "published.json", "my_metric.py", "tasks/mine.yaml", "data/dataset.json"}
FILES |= {"envs/lm-eval.lock"}  # of the harness that runs the task


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Compare a plan with a dvc.yaml that watches some files."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "my_metric.py").write_text("def score(answer, expected):\n    return 1.0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "evaluate")

    def run(watched: set[str], **changes: object) -> None:
        content = {"stages": {"evaluate": {"deps": sorted(watched)}, "code": {"cmd": "true"}}}
        (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        origins.refuse_other_sources(Plan(params.load(write_params(tmp_path / "params.yaml", **NAMED | changes))))

    return run


@pytest.mark.parametrize("file", sorted(FILES))
def test_each_file_must_be_watched(check, file):
    check(FILES)
    with pytest.raises(UserError, match=f"dvc.yaml does not watch {file}, which params.yaml names"):
        check(FILES - {file})


def test_files_that_no_rule_of_this_build_reads_need_not_be_watched(check):
    check({"data/dataset.json"}, all={"stages": ["finetune", "merge"]})
