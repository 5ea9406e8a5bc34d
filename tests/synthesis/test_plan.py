import tracemalloc
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice

import pytest

from utils.data.prompts import PLAIN_TEMPLATE
from utils.synthesis.plan import MAX_IMAGES, MAX_REDRAWS, NUMBER_BITS, GenerationPlan, scramble
from utils.synthesis.prompts import TemplatePrompts, build_templates


@dataclass(frozen=True)
class NumberedPrompts:
    """A prompt that tells label and number."""

    def prompt(self, label: int, class_index: int) -> str:
        return f"{'abcdefghij'[label]} {class_index}"


def make_plan(**changes) -> GenerationPlan:
    options = {
        "num_classes": 3, "labels": (0, 1, 2), "prompts": NumberedPrompts(), "guidance_scales": (3.0,),
        "num_images_per_class": 7, "seed": 0, "batch_size": 3, "images_per_shard": 8,
    }  # fmt: skip
    return GenerationPlan(**(options | changes))


def all_images(plan: GenerationPlan) -> list:
    return [plan.image(index) for index in range(plan.num_images)]


def test_image_class_is_the_inner_order_and_its_seed_is_pinned():
    images = all_images(make_plan())[:5]
    assert [image.label for image in images] == [0, 1, 2, 0, 1]
    assert [image.class_index for image in images] == [0, 0, 0, 1, 1]
    assert (images[4].prompt, images[4].seed) == ("b 1", 2395114194)


def test_image_seed_depends_on_seed_class_number_and_redraw_only():
    plan = make_plan()
    seeds = {plan.image(index, redraw).seed for index in range(21) for redraw in range(3)}
    assert len(seeds) == 63
    assert plan.image(4) == make_plan(num_images_per_class=900, batch_size=5, images_per_shard=2).image(4)
    assert plan.image(4).seed != make_plan(seed=1).image(4).seed


def test_no_two_of_many_images_start_from_the_same_noise():
    # torch reads 32 bits: of as many hashes, about 23 would meet
    seeds = {scramble(0, number) for number in range(440_000)}
    assert len(seeds) == 440_000
    assert max(seeds) < 2**32
    assert scramble(0, 1) - scramble(0, 0) not in (1, -1)


def test_redraws_have_numbers_of_their_own_up_to_the_limits():
    assert (MAX_REDRAWS + 1) << NUMBER_BITS == 2**32
    plan = make_plan(num_classes=1, labels=(0,), num_images_per_class=MAX_IMAGES, batch_size=1000)
    assert 0 <= plan.image(MAX_IMAGES + 999, MAX_REDRAWS).seed < 2**32
    assert MAX_IMAGES + 1000 < 1 << NUMBER_BITS


def test_a_subset_of_classes_draws_the_same_images_of_them():
    whole = {(image.label, image.class_index): image for image in all_images(make_plan())}
    subset = all_images(make_plan(labels=(0, 2)))
    assert [image.label for image in subset[:3]] == [0, 2, 0]
    assert len(subset) == 14
    for image in subset:
        assert image == replace(whole[image.label, image.class_index], index=image.index)


def test_batches_keep_their_composition_when_the_set_grows():
    small, large = make_plan(), make_plan(num_images_per_class=70)
    last = small.num_shards - 1
    batches = list(small.batches(last))
    assert all(len(batch) == 3 for batch in batches)
    assert batches[-1][-1].index >= small.num_images
    assert batches == list(islice(large.batches(last), len(batches)))


def test_guidance_is_one_for_a_batch_and_each_scale_has_an_equal_share_in_every_class():
    scales = (1.5, 3.0, 6.0)
    # as many classes as two batches: taken in turn, a class would always get the same scales
    plan = make_plan(
        num_classes=8, labels=tuple(range(8)), guidance_scales=scales, num_images_per_class=600, batch_size=4,
        images_per_shard=100,
    )  # fmt: skip
    for number in range(plan.num_shards):
        for batch in plan.batches(number):
            kept = [image for image in batch if image.index in plan.shard(number)]
            assert len({image.guidance_scale for image in kept}) == 1
    images = all_images(plan)
    assert Counter(image.guidance_scale for image in images) == dict.fromkeys(scales, 1600)
    for label in range(8):
        shares = Counter(image.guidance_scale for image in images if image.label == label)
        assert all(150 < share < 250 for share in shares.values())
    grown = replace(plan, num_images_per_class=900)
    assert [grown.image(index) for index in range(4800)] == images


def test_redraw_batches_are_full_have_one_guidance_and_the_next_seeds():
    plan = make_plan(guidance_scales=(1.0, 2.0), images_per_shard=6)
    bad = [plan.image(index) for index in (7, 0, 3, 1, 2)]
    batches = list(plan.redraw_batches(bad))
    wanted = [image for batch, count in batches for image in batch[:count]]
    assert sorted(image.index for image in wanted) == [0, 1, 2, 3, 7]
    for batch, _ in batches:
        assert len(batch) == plan.batch_size
        assert len({image.guidance_scale for image in batch}) == 1
    for image in wanted:
        assert image == plan.image(image.index, redraw=1)
    assert batches == list(plan.redraw_batches(bad[::-1]))


@pytest.mark.parametrize("scales", [(3.0,), (2.0, 3.0)])
def test_plan_and_prompts_of_600_000_images_take_no_memory(scales):
    prompts = TemplatePrompts(tuple(build_templates("diverse", PLAIN_TEMPLATE)), ("dog", "house cat", "suv"))
    prompts.prompt(0, 0)
    tracemalloc.start()
    plan = make_plan(num_images_per_class=200_000, images_per_shard=1000, batch_size=16, guidance_scales=scales,
                     prompts=prompts)  # fmt: skip
    total = sum(len(plan.shard(number)) for number in range(plan.num_shards))
    for index in range(0, 600_000, 30):
        plan.image(index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 600_000
    assert peak < 100_000
