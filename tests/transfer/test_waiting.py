import time

import torch

from utils.transfer.waiting import WaitingTime, advise_on_waiting


def test_seconds_in_the_context_add_up_and_go_on_from_what_a_checkpoint_kept():
    waiting = WaitingTime(torch.device("cpu"))
    waiting.seconds = 100.0
    for _ in range(3):
        time.sleep(0.05)
        with waiting:
            time.sleep(0.02)
    assert 100.06 <= waiting.seconds < 100.14


def test_a_device_that_waits_for_more_than_a_fifth_of_a_stage_is_worth_a_line():
    assert advise_on_waiting(20, 100, 3) is None and advise_on_waiting(0, 0, 0) is None
    advice = advise_on_waiting(21, 100, 3)
    assert (
        advice == "the GPU waited 21 of 100 s for images; try more --dataloader_num_workers (now 3) or --cache_images."
    )
