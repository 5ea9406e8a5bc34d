import time

import torch

from utils.transfer.waiting import WaitingTime


def test_seconds_in_the_context_add_up_and_go_on_from_what_a_checkpoint_kept():
    waiting = WaitingTime(torch.device("cpu"))
    waiting.seconds = 100.0
    for _ in range(3):
        time.sleep(0.05)
        with waiting:
            time.sleep(0.02)
    assert 100.06 <= waiting.seconds < 100.14
