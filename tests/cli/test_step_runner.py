from dataclasses import replace

import pytest

from utils.cli.step_runner import Step, StepRunner


def test_steps_that_are_finished_are_not_run_again_and_a_failed_one_is(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(
        "import pathlib, sys; print(sys.argv[1:]); pathlib.Path(sys.argv[1]).touch(); sys.exit(len(sys.argv) > 2)"
    )
    step = Step("a step", "to see", tmp_path / "done", (str(script), str(tmp_path / "done")), is_launched=False)
    runner = StepRunner(tmp_path, tmp_path / "runs")
    runner.run(step)
    log = tmp_path / "runs" / "logs" / "a-step.log"
    assert "done" in log.read_text()
    log.unlink()
    StepRunner(tmp_path, tmp_path / "runs").run(step)
    assert not log.exists()
    (tmp_path / "done").unlink()
    runner.run(step)  # what it made is gone
    assert log.exists()
    log.unlink()
    runner.run(replace(step, command=(str(script), str(tmp_path / "other")), finished=tmp_path / "done"))
    assert "other" in log.read_text()  # another command of that name
    failing = Step("another", "to see", tmp_path / "done", (*step.command, "fail"), is_launched=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another failed, see .*another.log"):
            runner.run(failing)
    assert "another" not in runner.costs
