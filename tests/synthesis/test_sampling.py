"""Batches, redraws and their cap, with a drawing function whose bad images are chosen by the test."""

import numpy as np
import pytest

from tests.synthesis.test_plan import make_plan
from utils.cli.errors import UserError
from utils.synthesis.sampling import draw_batch
from utils.synthesis.shards import count_class_redraws, make_row, shard_path, synthetic_features, write_shard


def draw_black_until(good_redraws: dict[int, int], calls: list):
    """Return a drawing function: image `index` is black before its redraw `good_redraws[index]`."""

    def draw(images):
        calls.append([image.index for image in images])
        pixels = np.stack([np.random.default_rng(image.seed).random((4, 4, 3), dtype=np.float32) for image in images])
        for position, image in enumerate(images):
            if image.redraw < good_redraws.get(image.index, 0):
                pixels[position] = 0
        return pixels, [False] * len(images)

    return draw


def test_black_images_are_redrawn_with_the_next_seed_at_the_same_batch_size():
    plan, calls = make_plan(), []
    batch = range(3, 6)
    drawn = draw_batch(draw_black_until({4: 2}, calls), plan, batch, plan.shard(0), max_redraws=2)
    assert [image.index for image, _ in drawn] == [3, 4, 5]
    assert [image.redraw for image, _ in drawn] == [0, 2, 0]
    assert drawn[1][0].seed == plan.image(4, 2).seed
    assert all(pixels.any() for _, pixels in drawn)
    assert calls == [[3, 4, 5]] * 3


def test_redraws_do_not_change_the_good_images_of_the_batch():
    plan = make_plan()
    clean = draw_batch(draw_black_until({}, []), plan, range(3), plan.shard(0), max_redraws=3)
    redrawn = draw_batch(draw_black_until({1: 3}, []), plan, range(3), plan.shard(0), max_redraws=3)
    for position in (0, 2):
        np.testing.assert_array_equal(clean[position][1], redrawn[position][1])


def test_cap_of_redraws_ends_in_an_error_with_class_and_prompt():
    plan = make_plan()
    with pytest.raises(UserError, match=r"--max_redraws 1: .*b \('a b'\): black"):
        draw_batch(draw_black_until({4: 2}, []), plan, range(3, 6), plan.shard(0), max_redraws=1)


def test_padding_is_left_out_and_never_redrawn():
    plan, calls = make_plan(), []
    drawn = draw_batch(draw_black_until({8: 99}, calls), plan, range(6, 9), plan.shard(0), max_redraws=1)
    assert [image.index for image, _ in drawn] == [6, 7]
    assert len(calls) == 1


def test_redraws_are_counted_per_class_from_the_shards(tmp_path):
    plan = make_plan(num_images_per_class=4)
    features = synthetic_features(list(plan.class_names))
    for number in range(plan.num_shards):
        images = [plan.image(index, redraw=2 if index in (1, 10) else 0) for index in plan.shard(number)]
        write_shard(shard_path(tmp_path, number), [make_row(image, b"", 3.0) for image in images], features)
    assert count_class_redraws(tmp_path, plan, max_redraws=2) == {"a": 0, "b": 4, "c": 0}
