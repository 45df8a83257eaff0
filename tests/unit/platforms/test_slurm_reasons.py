"""Messages about jobs that Slurm ended: rule, job id, reason, remedy, log. (tests/real/test_slurm.py sees real ones.)"""

import pytest

from slmake.platforms.slurm import reasons

SAID = """\
Job 4 has been submitted with SLURM jobid 17 (log: {log}).
[Tue Nov 24 14:45:23 2026]
Error in rule merge:
    message: SLURM-job '17' failed, SLURM status is: '{status}'. Detailed failure reason unavailable.
    jobid: 4
    input: scripts/merge.py
"""
ASKED = "resources: tmpdir=/tmp, mem_mb=300, mem=300 MB, nodes=1, runtime=60\n"


@pytest.mark.parametrize(
    ("status", "printed", "expected"),
    [
        ("TIMEOUT", "", "it ran over its time limit of 60 minutes. Raise it: --set-resources merge:runtime=MINUTES."),
        ("FAILED", "slurmstepd: error: Exceeded job memory limit\n", "it was killed over its memory limit of 300 MB."),
        ("FAILED", "srun: error: vm: task 0: Killed\n", "--set-resources merge:mem_mb=MB, or lower the batch size."),
        ("FAILED", "slurmstepd: error: Detected 1 oom_kill event in StepId=17.0.\n", "over its memory limit"),
        ("OUT_OF_MEMORY", "", "over its memory limit of 300 MB."),
        ("NODE_FAIL", "", "its node failed."),
    ],
)
def test_each_reason_takes_one_line(tmp_path, status, printed, expected):
    log = tmp_path / "17.log"
    log.write_text(ASKED + printed)
    (line,) = reasons(SAID.format(log=log, status=status))
    assert line.startswith("rule merge, Slurm job 17: it")
    assert expected in line
    assert line.endswith(f"Its log: {log}")


def test_an_error_of_the_rule_itself_is_left_to_the_rule(tmp_path):
    log = tmp_path / "17.log"
    log.write_text(ASKED + "merge: error: build/base: no model here.\n")
    assert reasons(SAID.format(log=log, status="FAILED")) == []


def test_of_several_attempts_the_last_is_reported(tmp_path):
    log = tmp_path / "17.log"
    log.write_text(ASKED)
    first = SAID.format(log=log, status="NODE_FAIL")
    (line,) = reasons(first + first.replace("17", "18").replace("NODE_FAIL", "TIMEOUT"))
    assert "Slurm job 18: it ran over its time limit of ? minutes" in line
