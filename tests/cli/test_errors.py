"""User errors, bugs and signals each end a script in their own way, with nothing half done."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.cli import errors
from utils.cli.errors import Interrupted, UserError, graceful_interrupt, report_unwritable, run_script

ROOT = Path(__file__).parents[2]
SCRIPT = """
import time
from utils.cli.errors import graceful_interrupt, run_script

def main():
    with graceful_interrupt(lambda: "Resume with: the command"):
        try:
            print("working", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.5)  # work that must finish despite further signals
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
def test_a_signal_ends_a_script_gracefully_and_a_second_one_is_ignored(number):
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "working\n"
    child.send_signal(number)
    child.send_signal(signal.SIGTERM)
    output, messages = child.communicate(timeout=300)
    assert output == "cleaned up\n"
    assert messages == "\n-c: interrupted. Resume with: the command\n"  # below a progress bar
    assert child.returncode == 128 + number


def test_a_forked_process_ends_at_its_pools_signal_where_an_exception_would_get_lost():
    with graceful_interrupt(lambda: ""):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.write(writer, b"forked")
                time.sleep(60)
            finally:
                os._exit(0)  # exceptions here are lost
        os.read(reader, 6)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="advice") as caught, graceful_interrupt(lambda: "advice"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signal_number == signal.SIGTERM
    with graceful_interrupt(lambda: "advice"):
        pass
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(("seconds_to_end", "is_ignored"), [(10.0, True), (0.0, False)])
def test_a_later_signal_ends_the_block_if_the_first_got_lost(seconds_to_end, is_ignored, monkeypatch):
    monkeypatch.setattr(errors, "SECONDS_TO_END", seconds_to_end)
    reached = []
    with pytest.raises(Interrupted), graceful_interrupt(lambda: ""):
        with contextlib.suppress(KeyboardInterrupt):  # as if raised in a destructor
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(True)
        raise KeyboardInterrupt
    assert bool(reached) is is_ignored


def no_room(*_):
    os.write(os.open("/dev/full", os.O_WRONLY), b"no room")


@pytest.mark.parametrize(("fail", "reason"), [
    (no_room, "No space left on device"),
    (lambda folder: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded")), "Disk quota exceeded"),
    (lambda folder: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system", str(folder / "a"))),
     "Read-only file system"),
    (lambda folder: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied", str(folder / "a"))),
     "Permission denied"),
    (lambda folder: (_ for _ in ()).throw(RuntimeError("PytorchStreamWriter failed writing file data/0")),
     "PytorchStreamWriter failed"),
    (lambda folder: (_ for _ in ()).throw(RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 1")),
     "inline_container"),
    (lambda folder: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device", "/cache/file")),
     "No space left on device: /cache/file"),
    (lambda folder: (folder.rmdir(), (folder / "record.json").write_text("")), "it was removed"),
])  # fmt: skip
def test_an_unwritable_output_folder_is_one_line_with_how_to_resume(fail, reason, tmp_path):
    (folder := tmp_path / "out").mkdir()
    with pytest.raises(UserError) as error, report_unwritable(folder, lambda: "stage1 is kept; resume with: this"):
        fail(folder)
    line = f"--output_dir {folder}: cannot be written ({reason}); stage1 is kept; resume with: this"
    assert str(error.value) == line


@pytest.mark.parametrize("error", [
    PermissionError(errno.EACCES, "Permission denied", "/photos/cat.jpg"),  # an input
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/photos/cat.jpg"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
])  # fmt: skip
def test_other_errors_are_unchanged(error, tmp_path):
    with pytest.raises(type(error)) as raised, report_unwritable(tmp_path, lambda: "never said"):
        raise error
    assert raised.value is error


def test_a_full_disk_elsewhere_ends_a_script_with_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(no_room)
    assert ended.value.code == 2
    assert "cannot be written (No space left on device); free some space" in capsys.readouterr().err
