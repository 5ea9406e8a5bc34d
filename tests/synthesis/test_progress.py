import threading

from utils.synthesis import runner
from utils.synthesis.runner import SharedProgress


def test_the_bar_adds_up_all_processes_and_waits_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_LOOKS", 0.01)
    (tmp_path / "drawn-1").write_text("99")  # of an earlier run
    main, other = (SharedProgress(tmp_path, index, 2, total=10) for index in (0, 1))
    main.update(3)
    assert main.bar.n == 3
    waiting = threading.Thread(target=main.finish)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    for _ in range(7):
        other.update(1)
    other.finish()
    waiting.join(5)
    assert not waiting.is_alive()
    assert main.bar.n == 10
    assert other.bar.disable
