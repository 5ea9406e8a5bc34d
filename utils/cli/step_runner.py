"""Runs commands as steps of a longer job: finished steps are not repeated, and two may run at once."""

import fnmatch
import glob
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import yaml

from utils.cli.contents import describe_files, list_files
from utils.cli.parsing import RECIPE_SUFFIXES
from utils.cli.records import ALL_RESULTS, RUN_CONFIG, write_text

NUM_LANES = 2
PROGRESS = re.compile(r"\d%\||\x1b\[A|^\r? +\r?$")
# files in a step's folder that no later step depends on: times, texts and pictures
NOT_RESULTS = (RUN_CONFIG, ALL_RESULTS, "*.md", "*.png", "SHA256SUMS", "quality.json")


@dataclass(frozen=True)
class Step:
    """A command (a script with its flags), why it is run, and the file that exists once it is finished.

    `is_launched` tells whether `accelerate launch` runs the script, or plain Python; `from_scratch` are the flags with
    which it replaces a result made from other inputs; `also_reads` are inputs besides those that the command names,
    such as a record in the folder that the step writes to.
    """

    name: str
    why: str
    finished: Path
    command: tuple[str, ...]
    is_launched: bool = True
    from_scratch: tuple[str, ...] = ("--overwrite_output_dir",)
    also_reads: tuple[Path, ...] = ()

    @property
    def text(self) -> str:
        """The command as a user would type it."""
        return shlex.join([*(("accelerate", "launch") if self.is_launched else ("python",)), *self.command])

    def reads(self, other: "Step") -> bool:
        """Return whether the command names the folder that another step makes."""
        return other is not self and str(other.finished.parent) in self.command


@dataclass
class StepRunner:
    """Runs steps in `root`, prints what each does, and records its seconds and peak memory in `runs_dir`.

    A step is run again if its command or one of the files and folders in it changed, or if its result is gone.

    `launch` are flags of `accelerate launch`; `environment` is added to this process's environment.
    """

    root: Path
    runs_dir: Path
    launch: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._costs_path = self.runs_dir / "steps.json"
        self.costs = json.loads(self._costs_path.read_text()) if self._costs_path.exists() else {}
        self._lock = threading.Lock()

    def run(self, step: Step, show: bool = False) -> bool:
        """Run one step, and return whether that was needed.

        Its output goes to a log file, or with `show` to the terminal.

        Raises:
            RuntimeError: the command failed; the message names the log.
        """
        before, asked, inputs = self.costs.get(step.name, {}), step.text, self._describe_inputs(step)
        noted = before.get("inputs", inputs)  # earlier versions recorded none
        changed = [name for name in {**noted, **inputs} if noted.get(name) != inputs.get(name)]
        if step.finished.exists() and before.get("command") == asked and not changed:
            self.say(f"{step.name}: already done, in {before['seconds']:.0f} s")
            return False
        if step.finished.exists() and changed:
            self.say(f"{step.name}: {', '.join(changed)} changed; running it again")
            step = replace(step, command=(*step.command, *(set(step.from_scratch) - set(step.command))))
        self.say(f"\033[1m{step.name}\033[0m: {step.why}\n  $ {step.text}")
        log_path = self.log_path(step)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        started = time.time()
        with log_path.open("w") as log:
            result = subprocess.run(
                self._argv(step), cwd=self.root, check=False, env=os.environ | self.environment,
                stdout=None if show else log, stderr=None if show else subprocess.STDOUT,
            )  # fmt: skip
        if result.returncode:
            where = "see above" if show else f"see {log_path}{_last_line(log_path)}"
            raise RuntimeError(f"{step.name} failed, {where}; the same make command resumes here")
        seconds = round(time.time() - started, 1)
        run_config = step.finished.parent / RUN_CONFIG
        memory = json.loads(run_config.read_text())["peak_memory_gib"] if run_config.exists() else None
        with self._lock:
            self.costs[step.name] = {"seconds": seconds, "peak_memory_gib": memory, "command": asked, "inputs": inputs}
            write_text(self._costs_path, json.dumps(self.costs, indent=2) + "\n")
        if not show:
            self.say(f"  {step.name}: finished in {seconds:.0f} s")
        return True

    def log_path(self, step: Step) -> Path:
        """Return the file with the output of a step that was not shown."""
        return self.runs_dir / "logs" / f"{step.name.replace(' ', '-').replace(',', '')}.log"

    def read_log(self, step: Step) -> str:
        """Return the output of a step that was not shown, without progress bars."""
        lines = self.log_path(step).read_text(encoding="utf-8", errors="replace").split("\n")
        kept = (line.rstrip() for line in lines if not PROGRESS.search(line))
        return "\n".join(line for line, _ in groupby(kept)).strip("\n")

    def run_in_parallel(self, steps: Sequence[Step], num_lanes: int = NUM_LANES) -> None:
        """Run steps, `num_lanes` at a time: always the first one whose inputs are finished."""
        waiting, running = list(steps), {}
        with ThreadPoolExecutor(num_lanes) as pool:
            while waiting or running:
                for step in list(waiting):
                    if len(running) < num_lanes and not any(map(step.reads, [*waiting, *running.values()])):
                        waiting.remove(step)
                        running[pool.submit(self.run, step)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    del running[future]

    def say(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)

    def print_costs(self) -> None:
        """Print the cost of each step in a line."""
        for name, cost in self.costs.items():
            memory = f" {cost['peak_memory_gib']:6.1f} GiB" if cost["peak_memory_gib"] else ""
            print(f"  {name:36s} {cost['seconds']:7.0f} s{memory}")

    def _describe_inputs(self, step: Step) -> dict[str, str]:
        """Return path -> identity of the contents of the files and folders that a command names."""
        finished = (self.root / step.finished).absolute()
        inputs, own = {}, {finished, *finished.parents}
        words = [word for word in step.command[1:] if "/" in word]
        for recipe in [self.root / word for word in words if word.endswith(RECIPE_SUFFIXES)]:
            entries = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None
            if isinstance(entries, dict):
                words += [value for value in entries.values() if isinstance(value, str) and "/" in value]
        for path in step.also_reads:
            if (self.root / path).exists():
                inputs[str(path)] = describe_files(self.root / path.parent, [path.name])
        for word in words:
            pattern = "*".join(map(glob.escape, word.rpartition("=")[2].split("{seed}")))
            for path in map(Path, sorted(glob.glob(os.path.join(self.root, pattern)))):
                if path.absolute() in own:
                    continue
                folder, names = path.parent, [path.name]
                if path.is_dir():
                    folder, names = path, [name for name in list_files(path) if not _is_not_result(name)]
                inputs[os.path.relpath(path, self.root)] = describe_files(folder, names)
        return inputs

    def _argv(self, step: Step) -> list[str]:
        python = Path(sys.executable)
        if not step.is_launched:
            return [str(python), *step.command]
        return [str(python.with_name("accelerate")), "launch", *self.launch, *step.command]


def _is_not_result(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_RESULTS)


def _last_line(log_path: Path) -> str:
    """Return what went wrong by a log, in parentheses: a script's line about its error, else the last line."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").split("\n") if line.strip()]
    last = next((line for line in reversed(lines) if ".py: error: " in line), lines[-1] if lines else "")
    return f" ({last})" if last else ""
