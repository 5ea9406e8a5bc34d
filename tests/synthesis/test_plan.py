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
    """A prompt with label and number."""

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
    # torch reads 32 bits: among this many hashes, about 23 would collide
    seeds = {scramble(0, number) for number in range(440_000)}
    assert len(seeds) == 440_000
    assert max(seeds) < 2**32
    assert scramble(0, 1) - scramble(0, 0) not in (1, -1)


def test_redraws_have_unique_numbers_up_to_the_limits():
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
    assert [image.index for batch in batches for image in batch] == list(range(16, 22))
    assert all(len(batch) == 3 for batch in batches)
    assert batches[-1][-1].index >= small.num_images
    assert batches == list(islice(large.batches(last), len(batches)))


@pytest.mark.parametrize("scales", [(2.0, 4.0), (1.5, 3.0, 6.0)])
def test_each_guidance_scale_has_an_equal_share_of_each_class_at_any_size(scales):
    plan = make_plan(guidance_scales=scales, num_images_per_class=50)
    images = all_images(plan)
    shares = {label: Counter(dict.fromkeys(scales, 0)) for label in plan.labels}
    for image in images:
        share = shares[image.label]
        share[image.guidance_scale] += 1
        assert max(share.values()) - min(share.values()) <= 1
    # independent of the set's size, batches, shards and other classes
    other = make_plan(guidance_scales=scales, num_images_per_class=90, batch_size=5, images_per_shard=11, labels=(0, 2))
    scale_of = {(image.label, image.class_index): image.guidance_scale for image in all_images(other)}
    for image in images:
        assert image.label == 1 or scale_of[image.label, image.class_index] == image.guidance_scale


def test_guidance_shares_hold_with_small_shards_and_large_batches():
    plan = make_plan(guidance_scales=(2.0, 4.0), num_images_per_class=6, batch_size=8, images_per_shard=10)
    assert Counter(image.guidance_scale for image in all_images(plan)) == {2.0: 9, 4.0: 9}


def test_guidance_scales_are_independent_of_numbers_prompts_and_classes():
    prompts = TemplatePrompts(tuple(build_templates("diverse", PLAIN_TEMPLATE)), ("dog", "house cat", "suv"))
    plan = make_plan(guidance_scales=(2.0, 4.0), prompts=prompts, num_images_per_class=20 * 192)
    images = all_images(plan)
    low = [image for image in images if image.guidance_scale == 2.0]
    for label in plan.labels:
        odd = sum(image.class_index % 2 for image in low if image.label == label) / (len(low) / 3)
        assert 0.45 < odd < 0.55
    with_low = Counter(image.prompt for image in low)
    assert all(2 <= with_low[prompt] <= 18 for prompt in {image.prompt for image in images})  # of 20
    scales = [tuple(plan.image(3 * index + label).guidance_scale for index in range(40)) for label in plan.labels]
    assert len(set(scales)) == 3
    assert scales[0] != tuple(replace(plan, seed=1).image(3 * index).guidance_scale for index in range(40))


@pytest.mark.parametrize("scales", [(3.0,), (2.0, 4.0), (1.5, 3.0, 6.0), (3.0, 3.0, 6.0)])
@pytest.mark.parametrize("scales_by_batch", [False, True])
def test_batches_hold_each_image_of_a_shard_once_with_others_of_its_guidance(scales, scales_by_batch):
    plan = make_plan(
        num_classes=8, labels=tuple(range(8)), guidance_scales=scales, num_images_per_class=19, batch_size=4,
        images_per_shard=50, scales_by_batch=scales_by_batch,
    )  # fmt: skip
    grown = replace(plan, num_images_per_class=60)
    for number in range(plan.num_shards):
        shard, batches = plan.shard(number), list(plan.batches(number))
        for batch in batches:
            assert len(batch) == 4
            assert len({image.guidance_scale for image in batch}) == 1
            assert batch[0].index in shard
            assert [image.index for image in batch] == sorted(image.index for image in batch)
        drawn = [image.index for batch in batches for image in batch]
        assert [index for index in sorted(drawn) if index in shard] == list(shard)
        assert len(drawn) - len(shard) <= 3 * len(scales)
        assert all(batch in list(grown.batches(number)) for batch in batches)


def test_a_set_of_an_earlier_version_keeps_its_guidance_scales_by_batch():
    plan = make_plan(guidance_scales=(1.5, 3.0, 6.0), num_images_per_class=600, scales_by_batch=True)
    first = [1.5] * 3 + [6.0] * 3 + [3.0] * 2 + [6.0] * 3 + [1.5] * 3 + [3.0] * 2  # two shards of 3, 3 and 2 images
    assert [plan.image(index).guidance_scale for index in range(16)] == first


def test_guidance_shares_are_a_setting_only_of_new_sets_with_several_scales():
    assert make_plan(guidance_scales=(2.0, 4.0)).guidance_settings == {"guidance_shares": "per class"}
    assert make_plan(guidance_scales=(2.0, 4.0), scales_by_batch=True).guidance_settings == {}
    assert make_plan().guidance_settings == {}


def test_redraw_batches_are_full_have_one_guidance_and_the_next_seeds():
    plan = make_plan(guidance_scales=(1.0, 2.0, 2.0), images_per_shard=6)
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
