"""benchmarks.gpu: its time limit, parts that fail or are left out, its report, and a complete run on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import children, dsi_speed, fine_tuning_cases, fine_tuning_speed
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import lines as gpu_lines
from benchmarks.gpu import parts as gpu_parts
from benchmarks.gpu import training
from benchmarks.gpu.bench import Bench, LeftOutError
from benchmarks.gpu.checks import relative_error
from benchmarks.gpu.lines import FAILED, LEFT_OUT, MEASURED, TARGETS, Line, append_line, read_lines, write_report
from benchmarks.gpu.parts import PARTS, Budget, Part, run_parts
from benchmarks.gpu.training import GpuUse
from benchmarks.pipelines import TINY, Cost, save_pipeline

WORKS, FAILS, HANGS = (
    "print('seen')",
    "import sys\nprint('first', file=sys.stderr)\nraise ValueError('why')",
    # a process that it started keeps writing
    "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)",
)
CHILD = "import time, pathlib\nwhile True: pathlib.Path({path!r}).write_text(str(time.time())); time.sleep(0.05)"


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_part(name: str, share: float = 0.5, **needs) -> Part:
    return Part(name, "checks", f"Title of {name}", share, **needs)


@pytest.fixture
def bench(tmp_path):
    return Bench("parity", "cpu", False, tmp_path, tmp_path / "gpu.jsonl", time.time() + 60)


@pytest.fixture
def run(tmp_path):
    """Run parts given as programs by name; return their lines. Changes are counted."""

    def run(programs: dict[str, str], seconds: float = 60, parts=None) -> list[Line]:
        parts, results_path = parts or [make_part(name) for name in programs], tmp_path / "gpu.jsonl"
        run.changes = 0

        def count() -> None:
            run.changes += 1

        run_parts(
            parts, Budget(seconds, time.time(), sum(part.share for part in parts)), results_path, tmp_path, False,
            lambda part, _: [sys.executable, "-c", programs[part.name]], {}, count,
        )  # fmt: skip
        return read_lines(results_path)

    return run


def test_a_part_has_its_share_of_the_time_limit_and_no_more_than_is_left():
    first, last = make_part("a", 0.5), make_part("b", 0.75)
    clock = Clock()
    budget = Budget(40, started=100, shares=1.25, clock=clock)
    assert (budget.limit(first), budget.limit(last)) == (20, 30)
    clock.now = 116
    assert (budget.limit(first), budget.limit(last)) == (20, 24)
    clock.now = 150
    assert budget.limit(first) < 0
    clock.now = 100
    assert Budget(40, started=100, shares=0.5, clock=clock).limit(first) == 40  # alone


def test_a_failed_part_reports_the_last_line_of_its_error_and_the_next_one_runs(run):
    lines = run({"a": FAILS, "b": WORKS})
    [failure] = [line for line in lines if line.status == FAILED]
    assert (failure.part, str(failure)) == ("a", "all: failed: ValueError: why")
    assert "first" in failure.values["log"]
    assert [line.part for line in lines if line.name == "time"] == ["a", "b"]
    assert run.changes >= 2


def test_a_crashed_part_reports_the_signal(run):
    lines = run({"a": "import os\nos.kill(os.getpid(), 9)"})
    assert str(lines[0]) == "all: failed: killed by SIGKILL"


def test_a_hanging_part_is_stopped_with_its_processes_and_the_next_one_runs(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_parts, "MIN_SECONDS", 0.1)
    beat = tmp_path / "beat"
    hangs = HANGS.format(child=CHILD.format(path=str(beat)))
    began = time.monotonic()
    lines = run({"a": hangs, "b": WORKS}, seconds=10)
    assert time.monotonic() - began < 30
    assert str(lines[0]) == "all: failed: stopped after its 5 s"
    assert [line.status for line in lines if line.part == "b"] == [MEASURED]
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last


def test_parts_that_a_machine_cannot_run_are_left_out_without_a_process(run):
    parts = [make_part("a", modules=("torch", "no_such_module")), make_part("b", gib_on_disk=1e9), make_part("c")]
    lines = run({"a": FAILS, "b": FAILS, "c": WORKS}, parts=parts)
    assert str(lines[0]) == "all: left out: no_such_module is not installed"
    assert "needs 1000000000.0 GiB" in lines[1].text and lines[1].status == LEFT_OUT
    assert [line.part for line in lines] == ["a", "b", "c"]


def test_a_part_without_time_is_left_out(run):
    lines = run({"a": FAILS}, seconds=3)
    assert str(lines[0]) == "all: left out: only 3 s are left"


def test_a_line_is_written_at_once_and_an_incomplete_one_is_ignored(tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    line = Line("dsi", "speed", "3 samples/s", values={"dsi_share": 12.0}, target="dsi_share", verdict="missed")
    append_line(path, line)
    assert capsys.readouterr().out == "[dsi] speed: 3 samples/s (target: at least 40 %, missed)\n"
    with path.open("a") as file:
        file.write('{"part": "dsi", "na')
    assert read_lines(path) == [line]


def test_the_report_has_the_targets_and_a_section_for_each_part_with_lines(tmp_path):
    lines = [
        Line("dsi", "speed", "3 samples/s", values={"dsi_share": 12.3456}, target="dsi_share", verdict="missed"),
        Line("dsi", "theirs", "no checkout", LEFT_OUT),
    ]
    path = tmp_path / "gpu.md"
    path.write_text("old")
    write_report(path, lines, {"dsi": "Learning", "tests": "Tests"}, "By a command.")
    text = path.read_text()
    assert "old" not in text and "By a command." in text
    assert "| DSI, of the matrix rate | at least 40 % | 12.3 % | missed |" in text
    assert "| generation, 25 steps with guidance | at least 10 images/s | not measured |  |" in text
    assert (
        "## Learning\n\n- speed: 3 samples/s (target: at least 40 %, missed)\n- theirs: left out: no checkout" in text
    )
    assert "## Tests" not in text
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.md"]


def test_a_report_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "gpu.md"
    path.write_text("old")
    monkeypatch.setattr(gpu_lines, "_format_targets", lambda _: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_report(path, [], {}, "")
    assert path.read_text() == "old"


def test_several_lines_of_a_target_show_the_worst(tmp_path):
    errors = (1e-5, 3e-2, 1e-4)
    lines = [Line("parity", "a", "", values={"parity": value}, target="parity", verdict="") for value in errors]
    write_report(tmp_path / "gpu.md", lines, {}, "")
    assert "| 0.03 |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [("dsi_share", 40, "reached"), ("dsi_share", 39.9, "missed"), ("resnet18_idle", 9.9, "reached"),
     ("resnet18_idle", 11, "missed"), ("parity", float("nan"), "missed")],
)  # fmt: skip
def test_a_target_is_an_upper_or_a_lower_limit(name, value, verdict):
    assert TARGETS[name].judge(value) == verdict


def test_an_error_within_a_part_is_reported_and_the_part_continues(bench):
    with bench.measuring("a"):
        raise RuntimeError("python train.py: exit status 1\n\nOutOfMemoryError: too much\n")
    with bench.measuring("b"):
        raise LeftOutError("no kernel")
    with bench.measuring("c"):
        bench.require_seconds(1000)
    with bench.measuring("d"):
        bench.report("d", "1 image/s", target="generation_25", generation_25=1.0)
    lines = read_lines(bench.results_path)
    assert [str(line) for line in lines[:2]] == ["a: failed: OutOfMemoryError: too much", "b: left out: no kernel"]
    assert "exit status 1" in lines[0].values["log"]
    assert lines[2].status == LEFT_OUT and lines[2].text.startswith("takes about 1000 s, ")
    assert (lines[3].status, lines[3].verdict) == (MEASURED, "missed")


def test_at_tiny_size_no_target_is_judged_and_no_time_required(tmp_path):
    bench = Bench("dsi", "cpu", True, tmp_path, tmp_path / "gpu.jsonl", time.time())
    bench.require_seconds(1000)
    bench.report("d", "1 image/s", target="generation_25", generation_25=1.0)
    assert read_lines(bench.results_path)[0].verdict is None


def test_the_difference_of_tensors_is_relative_to_the_largest_value_of_each():
    expected = {"a": torch.tensor([0.0, 100.0]), "b": torch.tensor([1.0, -2.0])}
    assert relative_error({"a": torch.tensor([1.0, 100.0]), "b": expected["b"]}, expected) == pytest.approx(0.01)
    assert relative_error({"a": expected["a"], "b": torch.tensor([1.0, -1.0])}, expected) == pytest.approx(0.5)
    assert relative_error({"a": expected["a"], "b": torch.tensor([torch.nan, -2])}, expected) != pytest.approx(0)


def test_the_gpus_use_is_measured_during_the_steps():
    use = GpuUse(is_cuda=False)
    use.reason = None
    use.looks = [(1.0, 0.0), (2.0, 90.0), (3.0, 70.0), (4.0, 0.0)]
    assert use.idle_share(1.5, 3.5) == pytest.approx(20)
    with pytest.raises(LeftOutError, match="reported nothing"):
        use.idle_share(7, 8)
    with pytest.raises(LeftOutError, match="no GPU"):
        GpuUse(is_cuda=False).idle_share(0, 1)


THEIR_DSI = """
import sys, time
from tqdm import tqdm
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
assert flags["train_batch_size"] == "2", flags
for _ in tqdm(range(int(flags["max_train_steps"])), desc="Steps", mininterval=0):
    time.sleep(0.02)
"""
THEIR_TRAINER = """
import json, pathlib, sys
# check_min_version("5.0.0")
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
folder = pathlib.Path(flags["output_dir"])
folder.mkdir()
(folder / "train_results.json").write_text(json.dumps({"train_runtime": 4.0}))
"""


def write_checkout(folder: Path, name: str, text: str) -> Path:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(text)
    return folder


def test_diffusers_script_is_run_from_its_checkout(bench, tmp_path):
    cost, child = Cost(1, 1), children.Child(1.0, {"device": 0.0}, {})
    case = dsi_speed.Case("", tmp_path, cost, tmp_path, tmp_path, 32, batch_size=2, measured_steps=10)
    checkout = write_checkout(tmp_path / "checkout", dsi_speed.THEIR_SCRIPT, THEIR_DSI)
    here = replace(bench, diffusers=checkout)
    training.compare_dsi(here, case, (1000.0, child), is_first=True)
    [line] = read_lines(bench.results_path)
    assert 10 < 1000 / line.values["dsi_diffusers"] < 101  # two images in a fiftieth of a second on an idle machine
    assert line.target == "dsi_diffusers"
    with pytest.raises(LeftOutError, match="has no examples"):
        training.compare_dsi(replace(bench, diffusers=tmp_path), case, None, is_first=True)


def test_transformers_script_is_run_from_its_checkout(bench, tmp_path):
    child = children.Child(1.0, {"device": 0.0}, {})
    case = fine_tuning_cases.Case("ResNet", tmp_path, tmp_path, 8, 10, 0, 1e-3)
    checkout = write_checkout(tmp_path / "checkout", fine_tuning_speed.THEIR_SCRIPT, THEIR_TRAINER)
    training.compare_classifier(replace(bench, transformers=checkout), case, "resnet18", (30.0, child))
    [line] = read_lines(bench.results_path)
    assert line.values["resnet18_transformers"] == pytest.approx(30 / (8 * 10 / 4))
    assert (line.target, line.verdict) == ("resnet18_transformers", "reached")


def test_a_forecast_is_reported_with_the_measurement(bench):
    child = children.Child(1.0, {"device": 2048.0}, {})

    def main(argv: list[str]) -> dict:
        assert argv == ["--a=1", "--dry_run=True"]
        print("a table")
        return {"needed_bytes": 3 * 2**30, "images_per_second": None}

    training.compare_forecast(bench, "a", main, ["python", "script.py", "--a=1"], (7.0, child))
    [line] = read_lines(bench.results_path)
    assert line.text == "needs 3.0 GiB with its margin, unknown images/s; measured: 2.0 GiB, 7.0 images/s"


def test_unknown_values_of_nvidia_smi_are_ignored():
    use = GpuUse(is_cuda=False)
    began = "2026/11/28 16:20:44.500"
    use.read([f"{began}, 12\n", f"{began}, [N/A]\n", "\n", "no devices\n", "2026/11/28 16:21:44.750, 100\n"])
    assert [percent for _, percent in use.looks] == [12, 100]
    assert use.looks[1][0] - use.looks[0][0] == pytest.approx(60.25)


def test_a_bar_without_a_description_is_read():
    """As drawn by the Trainer."""
    text = "\r  3%|3         | 8/256 [00:01<00:30,  8.00it/s]\rstyle token:  50%|#  | 1/2 [00:00<00:00,  1.00it/s]"
    assert children.BAR.findall(text) == [("", "8", "256"), ("style token", "1", "2")]


def test_a_pipeline_is_saved_in_half_precision_but_for_its_text_encoder(tmp_path):
    from safetensors.torch import load_file

    folder = save_pipeline(TINY, tmp_path / "pipeline", "cpu", torch.bfloat16)
    dtypes = {
        path.parent.name: {value.dtype for value in load_file(path).values()} for path in folder.rglob("*.safetensors")
    }
    assert dtypes == {"unet": {torch.bfloat16}, "vae": {torch.bfloat16}, "text_encoder": {torch.float32}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--device", "cpu"], "add --tiny"), (["--parts", "nothing"], "invalid choice"), ([], "no CUDA GPU found")],
)  # fmt: skip
def test_bad_arguments_are_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "has_gpu", lambda: False)
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_each_part_is_a_function():
    for part in PARTS:
        assert callable(part.load())
    assert len({part.name for part in PARTS}) == len(PARTS)


def start(*flags, temporary: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", *flags]
    return subprocess.Popen(
        words, cwd=gpu_parts.ROOT, env=os.environ | {"TMPDIR": str(temporary)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "parts", [["machine", "parity"], pytest.param(["machine", "parity", "variants"], marks=pytest.mark.soak)]
)
def test_a_run_on_the_cpu_measures_and_leaves_nothing_behind(parts, tmp_path):
    (tmp_path / "tmp").mkdir()
    process = start("--parts", *parts, "--output_dir", str(tmp_path / "out"), temporary=tmp_path / "tmp")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = read_lines(tmp_path / "out" / "gpu.jsonl")
    assert [line for line in lines if line.status == FAILED] == []
    assert {line.part for line in lines} == set(parts)
    parity = {line.name: line.values["parity"] for line in lines if line.target == "parity"}
    assert set(parity) == {f"{step} step, CPU against cpu in float32" for step in ("DSI", "sampling", "classifier")}
    assert max(parity.values()) < 1e-6
    assert all(f"[{line.part}] {line}" in output for line in lines)
    report = (tmp_path / "out" / "gpu.md").read_text()
    assert "Done in " in report and all(f"- {line}\n" in report for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.jsonl", "gpu.md"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_stopped_run_has_its_lines_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "tmp").mkdir()
    process = start("--parts", "machine", "parity", "--output_dir", str(tmp_path / "out"), temporary=tmp_path / "tmp")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "out" / "gpu.jsonl").read_text().splitlines()[0])["name"] == "device"
    assert list((tmp_path / "tmp").iterdir()) == []
