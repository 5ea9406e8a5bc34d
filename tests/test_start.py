"""`--help` and wrong flags answer before imports that take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
START = """
import sys, time
def run(script):
    for flags in (["--help"], ["--no_such_flag"]):
        try:
            script.main(flags)
        except (SystemExit, ValueError) as ended:
            print(type(ended).__name__)
"""


def run_python(code: str) -> list[str]:
    """Return the words of the last line that a new process prints; the line before names a wrong flag's exception."""
    done = subprocess.run([sys.executable, "-c", START + code], cwd=ROOT, capture_output=True, text=True, check=True)
    *_, ended, figures = done.stdout.splitlines()
    assert ended == "UserError"
    return figures.split()


@pytest.mark.parametrize("script", ["train_dsi", "generate_synthetic"])
def test_help_and_a_wrong_flag_need_no_torch_and_under_three_seconds(script):
    has_torch, seconds = run_python(
        f"import {script}; run({script}); print('torch' in sys.modules, time.process_time())"
    )
    assert has_torch == "False"
    assert float(seconds) < 3  # CPU time of this process, whatever else the machine does


def test_train_bridged_answers_soon_after_the_training_arguments_are_imported():
    """It imports the Trainer's flags, which alone takes seconds; our imports may add 30 %."""
    [ratio] = run_python(
        "began = time.process_time()\n"
        "from transformers import TrainingArguments\n"
        "imported = time.process_time()\n"
        "import train_bridged; run(train_bridged)\n"
        "print((time.process_time() - began) / (imported - began))"
    )
    assert float(ratio) < 1.3
