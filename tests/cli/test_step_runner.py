from dataclasses import replace

import pytest

from utils.cli.step_runner import Step, StepRunner


def test_finished_steps_are_not_run_again_and_failed_ones_are(tmp_path):
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
    runner.run(step)  # its result is gone
    assert log.exists()
    log.unlink()
    runner.run(replace(step, command=(str(script), str(tmp_path / "other")), finished=tmp_path / "done"))
    assert "other" in log.read_text()  # another command with the same name
    failing = Step("another", "to see", tmp_path / "done", (*step.command, "fail"), is_launched=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another failed, see .*another.log"):
            runner.run(failing)
    assert "another" not in runner.costs


def test_a_step_is_run_again_if_a_file_or_folder_in_its_command_changed(tmp_path, capsys):
    script = tmp_path / "step.py"
    script.write_text(
        "import pathlib, sys; path = pathlib.Path(sys.argv[2]); path.parent.mkdir(exist_ok=True)\n"
        "path.write_text(' '.join(sys.argv))"
    )
    recipe, made = tmp_path / "recipe.yaml", [tmp_path / f"made-{seed}" / "model.safetensors" for seed in range(2)]
    photo = tmp_path / "photos" / "cat" / "1.png"
    for path in (recipe, photo, *made):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"train_dir: {photo.parents[1]}")
    step = Step(
        "later", "to see", tmp_path / "out" / "done",
        (str(script), str(recipe), str(tmp_path / "out" / "done"), "--sets", f"dsi={tmp_path}/made-{{seed}}"),
        is_launched=False,
    )  # fmt: skip
    runner = StepRunner(tmp_path, tmp_path / "runs")
    runner.run(step)
    for changed in (photo, recipe, *made):
        runner.run(step)
        assert "later: already done, in" in capsys.readouterr().out
        changed.write_text(f"train_dir: {photo.parents[1]}  # again")
        runner.run(step)
        named = {recipe: recipe.name, photo: "photos"}.get(changed, changed.parent.name)
        assert f"later: {named} changed; running it again" in capsys.readouterr().out
        assert step.finished.read_text().endswith(" --overwrite_output_dir")
    for path in (made[0].parent / "run_config.json", made[0].parent / "style.png"):  # seconds, and pictures
        path.write_text("another")
    runner.run(step)
    assert "later: already done, in" in capsys.readouterr().out
    made[0].write_text("again")
    runner.run(replace(step, from_scratch=()))
    assert not step.finished.read_text().endswith("--overwrite_output_dir")


def test_parallel_steps_wait_only_for_those_whose_folders_they_name(tmp_path, capsys):
    script = tmp_path / "step.py"
    script.write_text(
        "import pathlib, sys, time; path = pathlib.Path(sys.argv[1]) / 'done'; path.parent.mkdir()\n"
        "assert all((pathlib.Path(name) / 'done').exists() for name in sys.argv[3:])\n"
        "time.sleep(float(sys.argv[2])); path.touch()"
    )

    def step(name: str, seconds: float, *reads: str) -> Step:
        folders = [str(tmp_path / each) for each in (name, *reads)]
        command = (str(script), folders[0], str(seconds), *folders[1:])
        return Step(name, "to see", tmp_path / name / "done", command, is_launched=False)

    steps = [step("last", 0, "set", "plain"), step("set", 0, "style"), step("style", 0), step("plain", 1.5)]
    StepRunner(tmp_path, tmp_path / "runs").run_in_parallel(steps)
    finished = [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines() if "finished in" in line]
    assert finished == ["style", "set", "plain", "last"]


def test_a_log_is_read_without_progress_bars_and_its_last_line_tells_why_a_step_failed(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(
        "import sys; print('found: 3')\n"
        "print('\\r 50%|##  | 1/2\\r          \\r'); print('\\n\\nerror: --x 1: wrong')\n"
        "sys.exit(len(sys.argv) > 2)"
    )
    runner = StepRunner(tmp_path, tmp_path / "runs")
    step = Step("a step", "to see", tmp_path / "step.py", (str(script), "x"), is_launched=False)
    assert runner.run(step) is True and runner.run(step) is False
    assert runner.read_log(step) == "found: 3\n\nerror: --x 1: wrong"
    with pytest.raises(RuntimeError, match=r"a-step.log \(error: --x 1: wrong\); the same make command"):
        runner.run(replace(step, command=(*step.command, "fail")))


def test_a_step_is_run_again_if_something_that_it_also_reads_changed(tmp_path, capsys):
    script, record = tmp_path / "step.py", tmp_path / "out" / "record.json"
    script.write_text("import pathlib, sys; pathlib.Path(sys.argv[1], 'done').touch()")
    record.parent.mkdir()
    record.write_text("1")
    step = Step(
        "later", "to see", tmp_path / "out" / "done", (str(script), str(tmp_path / "out")), False, (), (record,)
    )  # fmt: skip
    runner = StepRunner(tmp_path, tmp_path / "runs")
    assert [runner.run(step), runner.run(step)] == [True, False]
    record.write_text("2")
    assert runner.run(step) is True
    assert "record.json changed; running it again" in capsys.readouterr().out
