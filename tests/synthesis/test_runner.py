"""Redraws, their limit, and the work in parallel to sampling, with a sampler whose bad images the test chooses."""

import io
import threading
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from tests.synthesis.test_plan import make_plan
from utils.cli.errors import UserError
from utils.synthesis import runner as runner_module
from utils.synthesis.output_folder import make_folders
from utils.synthesis.runner import Encoders, Runner, SharedProgress, encode_image
from utils.synthesis.shards import Shards

NAMES = ["a", "b", "c"]


class ChosenSampler:
    """Draws noise from the seed; image `index` is black until its redraw `good_redraws[index]`."""

    def __init__(self, plan, good_redraws=None):
        self.num_at_a_time = plan.batch_size
        self.calls = []
        self.bad_seeds = {
            plan.image(index, redraw).seed for index, count in (good_redraws or {}).items() for redraw in range(count)
        }

    def draw(self, prompts, seeds, guidance_scale):
        self.calls.append((prompts, seeds, guidance_scale))
        pixels = np.stack([np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8) for seed in seeds])
        return pixels, ["black" if seed in self.bad_seeds else None for seed in seeds]


def make_set(folder, plan, sampler, max_redraws=3) -> tuple[Shards, list[int]]:
    shards, drawn = Shards(folder, plan, "f", NAMES), []
    make_folders(folder)
    with Encoders("png", 95) as encoders:
        Runner(sampler, shards, encoders, max_redraws, drawn.append).make_shards(range(plan.num_shards))
    return shards, drawn


def rows_of(shards: Shards) -> list[dict]:
    return [row for number in range(shards.plan.num_shards) for row in pq.read_table(shards.path(number)).to_pylist()]


def test_every_planned_image_is_in_its_place(tmp_path):
    plan = make_plan(guidance_scales=(2.0, 4.0))
    shards, drawn = make_set(tmp_path, plan, sampler := ChosenSampler(plan))
    rows = rows_of(shards)
    assert sum(drawn) == len(rows) == 21
    for index, row in enumerate(rows):
        image = plan.image(index)
        assert {key: row[key] for key in ("label", "class_index", "prompt", "seed", "guidance_scale")} == {
            "label": image.label, "class_index": image.class_index, "prompt": image.prompt, "seed": image.seed,
            "guidance_scale": image.guidance_scale,
        }  # fmt: skip
        pixels = np.asarray(PILImage.open(io.BytesIO(row["image"]["bytes"])))
        assert (pixels == np.random.default_rng(image.seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)).all()
    assert shards.find_missing() == []
    assert {len(prompts) for prompts, _, _ in sampler.calls} == {3}
    drawn_with = {seed: scale for _, seeds, scale in sampler.calls for seed in seeds}
    for row in rows:
        assert drawn_with[row["seed"]] == row["guidance_scale"]


def test_bad_images_are_drawn_again_together_with_the_next_seeds(tmp_path):
    plan = make_plan()
    clean, _ = make_set(tmp_path / "clean", plan, ChosenSampler(plan))
    shards, drawn = make_set(tmp_path / "redrawn", plan, sampler := ChosenSampler(plan, {0: 1, 4: 3, 7: 1}))
    rows = rows_of(shards)
    assert [rows[index]["seed"] for index in (0, 4, 7)] == [
        plan.image(index, redraw).seed for index, redraw in ((0, 1), (4, 3), (7, 1))
    ]
    differing = [index for index, pair in enumerate(zip(rows, rows_of(clean), strict=True)) if pair[0] != pair[1]]
    assert differing == [0, 4, 7]
    # three batches for the eight images of shard 0, one for its three bad ones, two for the last
    first_shard = [seeds for _, seeds, _ in sampler.calls][:6]
    assert set(first_shard[3]) == {plan.image(index, 1).seed for index in (0, 4, 7)}
    assert set(first_shard[4]) == {plan.image(4, 2).seed}
    assert len(sampler.calls) == 3 + 3 + 2 + 3
    assert sum(drawn) == 21
    assert shards.summarise()["num_redraws"] == {"a": 1, "b": 4, "c": 0}


def test_cap_of_redraws_is_an_error_with_classes_and_prompts_and_keeps_finished_shards(tmp_path):
    plan = make_plan()
    message = r"--max_redraws 1: 2 images are still bad .*: b \('b 3'\): black; c \('c 2'\): black\. The finished"
    with pytest.raises(UserError, match=message):
        make_set(tmp_path, plan, ChosenSampler(plan, {8: 2, 10: 2}), max_redraws=1)
    assert Shards(tmp_path, plan, "f", NAMES).find_missing() == [1, 2]
    with pytest.raises(UserError, match="--max_redraws 0"):
        make_set(tmp_path, plan, ChosenSampler(plan, {0: 1}), max_redraws=0)


def test_padding_is_left_out_and_never_drawn_again(tmp_path):
    plan = make_plan()
    beyond = plan.num_images
    assert beyond in [image.index for image in list(plan.batches(plan.num_shards - 1))[-1]]
    sampler = ChosenSampler(plan, {beyond: 99})
    sampler.num_at_a_time = 1  # as after running out of memory, which is recorded
    shards, _ = make_set(tmp_path, plan, sampler, max_redraws=0)
    assert len(rows_of(shards)) == 21
    assert len(sampler.calls) == 3 + 3 + 2
    assert shards.summarise()["images_at_a_time"] == 1


def test_submitting_too_many_images_to_the_encoders_blocks(monkeypatch):
    running, go_on = Counter(), threading.Event()

    def slow(pixels, *_):
        running[int(pixels)] += 1
        go_on.wait(10)

    monkeypatch.setattr(runner_module, "encode_image", slow)
    monkeypatch.setattr(runner_module, "MAX_WAITING", 4)
    submitted = []

    def give(encoders):
        for number in range(8):
            encoders.submit(np.array(number))
            submitted.append(number)

    with Encoders("png", 95) as encoders:
        giver = threading.Thread(target=give, args=(encoders,))
        giver.start()
        giver.join(0.5)
        assert submitted == [0, 1, 2, 3]
        go_on.set()
        giver.join(10)
        assert len(submitted) == 8
    assert sum(running.values()) >= 4


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_encoded_images_have_their_format_and_quality(image_format):
    ramp = np.arange(32)[:, None, None] * 5 + np.arange(48)[None, :, None] * 2
    pixels = np.random.default_rng(0).integers(0, 9, (32, 48, 3), dtype=np.uint8) + ramp.astype(np.uint8) % 200
    good, bad = (PILImage.open(io.BytesIO(encode_image(pixels, image_format, quality))) for quality in (95, 5))
    assert good.format == image_format.upper()
    assert good.size == (48, 32)
    errors = [np.abs(np.asarray(image.convert("RGB"), dtype=int) - pixels).mean() for image in (good, bad)]
    assert errors == [0, 0] if image_format == "png" else 0 < errors[0] < 3 < errors[1]


def test_the_bar_adds_up_all_processes_and_waits_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "SECONDS_BETWEEN_LOOKS", 0.01)
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


def test_the_main_process_does_not_wait_for_counts_in_a_folder_that_was_removed(tmp_path):
    (tmp_path / "counts").mkdir()
    main, other = (SharedProgress(tmp_path / "counts", index, 2, total=10) for index in (0, 1))
    other.update(10)
    (tmp_path / "counts").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        main.finish()
