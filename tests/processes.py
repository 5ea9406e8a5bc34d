"""Processes that start at once: forked from one that has already imported the libraries."""

import functools
import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = ["accelerate", "launch"]
REPORT = """
import sys
from accelerate import PartialState
state = PartialState()
sys.stdout.write(f"{state.distributed_type.name} {state.num_processes} processes\\n")  # in one piece: others write too
"""
# only libraries that the scripts import, which take seconds in every process
PRELOADED = [
    "accelerate.commands.launch", "datasets", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "matplotlib.figure", "torch._dynamo", "torch.distributed.run", "transformers.models.clip.modeling_clip",
]  # fmt: skip

_numbers = itertools.count()


@functools.cache
def _forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class ForkedPython:
    """A `python SCRIPT ...` or `accelerate launch ... SCRIPT ...`, with the interface of `subprocess.Popen`.

    It behaves like a started process, with its own process group, environment and output files. The processes of
    `accelerate launch` are forked too. Environment variables that libraries read on import are pytest's: for another
    Hub, start a process.
    """

    def __init__(self, command: list, folder: Path, environment: dict[str, str]):
        number = next(_numbers)
        self.outputs = [Path(folder) / f"process-{number}.{name}" for name in ("stdout", "stderr")]
        arguments = [str(word) for word in command], dict(environment), [str(path) for path in self.outputs]
        self._process = _forkserver().Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it if it still runs."""
        self._process.kill()
        self._process.join()

    def readline(self) -> str:
        """Wait for the first whole line on stdout."""
        while "\n" not in (written := self.outputs[0].read_text() if self.outputs[0].exists() else ""):
            assert self.poll() is None, self.communicate()[1]
            time.sleep(0.01)
        return written[: written.index("\n") + 1]

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end, and return what it wrote to stdout and to stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
            raise TimeoutError(f"ran past {timeout} s: {self.outputs[1].read_text()[-2000:]}")
        return tuple(path.read_text() for path in self.outputs)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


def start_script(program: str, argv: list, folder: Path, num_processes: int = 1, **environment: str) -> ForkedPython:
    """Start a program on one or more CPU processes, which finally print how accelerate was launched."""
    script = Path(folder) / "script.py"
    script.write_text(f"{program}\n{REPORT}")
    flags = ["--num_processes", num_processes, "--num_machines", 1, "--main_process_port", 0, "--mixed_precision", "no",
             "--dynamo_backend", "no"]  # fmt: skip
    # with `--multi_gpu`, `accelerate launch` starts several
    command = [*LAUNCH, "--multi_gpu", *flags] if num_processes > 1 else []
    return ForkedPython([*command, script, *argv], folder, os.environ | {"ACCELERATE_USE_CPU": "true"} | environment)


def _run(command: list[str], environment: dict[str, str], outputs: list[str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.path.insert(0, str(ROOT))
    if command[: len(LAUNCH)] == LAUNCH:
        _launch(command[1:])
    else:
        _run_script(*command)


def _run_script(*command: str) -> None:
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


def _launch(argv: list[str]) -> None:
    """Act as `accelerate launch`, with processes that torch's launcher forks instead of starting."""
    from accelerate.commands import launch
    from torch.distributed import run

    def config_of_forks(args):
        config, _, command = config_from_args(args)
        return replace(config, start_method="fork"), _run_script, command[command.index(args.training_script) :]

    config_from_args, run.config_from_args = run.config_from_args, config_of_forks
    sys.argv = argv
    launch.main()
