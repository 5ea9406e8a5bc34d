from collections import Counter
from dataclasses import replace

import pytest

from tests.synthesis.test_plan import all_images, make_plan
from utils.cli.errors import UserError
from utils.synthesis.counts import Counts, missing_to_largest, parse_number, split_number
from utils.synthesis.plan import MAX_IMAGES

EXTRA = (4, 0, 9, 4, 1)


def test_the_order_of_extra_images_is_that_of_a_list_and_then_all_classes_take_turns():
    counts = Counts(5, 3, EXTRA)
    by_rounds = [
        (number, position)
        for number in range(9)
        for position in sorted(range(5), key=lambda position: -EXTRA[position])
        if EXTRA[position] > number
    ]
    then = [
        (EXTRA[position] + number, position) for number in range(4) for position in range(5)
    ]  # one round of padding
    assert [counts.place(index) for index in range(18 + 4 * 5)] == by_rounds + then
    assert (counts.num_images, counts.most) == (33, 12)
    assert [counts.of_class(position) for position in range(5)] == [7, 3, 12, 7, 4]
    assert [Counts(3, 2).place(index) for index in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]


def test_a_balanced_set_only_grows_at_its_end_and_no_image_changes():
    small = make_plan(extra_images=(0, 5, 2), num_images_per_class=3, guidance_scales=(2.0, 4.0))
    large = replace(small, num_images_per_class=8)
    images = all_images(small)
    assert Counter(image.label for image in images) == {0: 3, 1: 8, 2: 5}
    assert all_images(large)[: len(images)] == images
    even = {(image.label, image.class_index): image for image in all_images(make_plan(guidance_scales=(2.0, 4.0)))}
    for image in images:  # of both sets: the same prompt, seed and scale
        same = even.get((image.label, image.class_index))
        assert same is None or replace(same, index=image.index) == image
    for number in range(small.num_shards):
        assert all(batch in list(large.batches(number)) for batch in small.batches(number))
    assert small.to_dict(["a", "b", "c"]) == {
        "num_images_per_class": 3, "num_images": 16, "num_images_of_class": {"a": 3, "b": 8, "c": 5},
    }  # fmt: skip
    assert make_plan().to_dict(["a", "b", "c"]) == {"num_images_per_class": 7, "num_images": 21}


def test_extra_images_bring_all_classes_to_the_number_of_the_largest():
    num_real = [50, 2, 0, 7]
    extra = missing_to_largest(num_real, [0, 1, 3])
    assert [num_real[label] + more for label, more in zip([0, 1, 3], extra)] == [50] * 3
    most = MAX_IMAGES // 3 - 5
    make_plan(extra_images=(0, 5, 2), num_images_per_class=most)
    with pytest.raises(UserError, match=f"balance:{most + 1}: must be at most {most:,} for 3 classes, as one has 5"):
        make_plan(extra_images=(0, 5, 2), num_images_per_class=most + 1)


def test_numbers_of_images_are_whole_or_balance_and_a_number():
    assert [parse_number(text) for text in ("500", 500, "balance:0500")] == [500, 500, "balance:500"]
    assert [split_number(value) for value in (500, "balance:500")] == [(500, False), (500, True)]
    for text in ("x", "balance", "balanced:5", "5.5", "balance:", ":5"):
        with pytest.raises(UserError, match=f"^--num_images_per_class {text}: must be a whole number, or balance"):
            parse_number(text)
    for text in ("0", "-3", "balance:0"):
        with pytest.raises(UserError, match="must be above 0"):
            parse_number(text)
