"""A user's error, a bug and a signal each end a script in their own way, with nothing half done."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import errors
from utils.cli.errors import Interrupted, UserError, graceful_interrupt, run_script

ROOT = Path(__file__).parents[2]
SCRIPT = """
import time
from utils.cli.errors import graceful_interrupt, run_script

def main():
    with graceful_interrupt(lambda: "Go on with: the command"):
        try:
            print("working", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.5)  # what must be finished, whatever comes meanwhile
            print("cleaned up", flush=True)

run_script(main)
"""


def test_a_user_error_ends_the_script_with_one_line_and_status_2_and_a_bug_keeps_its_traceback(capsys):
    def main():
        raise UserError("--learning_rate -1.0:\n  must be above 0.")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.endswith(": error: --learning_rate -1.0: must be above 0.\n")
    assert captured.err.count("\n") == 1 and captured.out == ""
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_script_cleanly_and_a_second_one_does_not_disturb(number):
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "working\n"
    child.send_signal(number)
    child.send_signal(signal.SIGTERM)
    output, messages = child.communicate(timeout=300)
    assert output == "cleaned up\n"
    assert messages == "-c: interrupted. Go on with: the command\n"
    assert child.returncode == 128 + number


def test_handlers_are_what_they_were_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="advice") as caught, graceful_interrupt(lambda: "advice"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signal_number == signal.SIGTERM
    with graceful_interrupt(lambda: "advice"):
        pass
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(("seconds_to_end", "is_ignored"), [(10.0, True), (0.0, False)])
def test_a_signal_long_after_one_that_got_lost_ends_the_block(seconds_to_end, is_ignored, monkeypatch):
    monkeypatch.setattr(errors, "SECONDS_TO_END", seconds_to_end)
    reached = []
    with pytest.raises(Interrupted), graceful_interrupt(lambda: ""):
        with contextlib.suppress(KeyboardInterrupt):  # as where it is raised in a destructor
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(True)
        raise KeyboardInterrupt
    assert bool(reached) is is_ignored
