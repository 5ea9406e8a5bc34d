import tracemalloc
from itertools import islice

from utils.synthesis.plan import GenerationPlan


def make_plan(**changes) -> GenerationPlan:
    options = {
        "class_names": ("a", "b", "c"), "prompts": ("an a", "a b", "a c"), "num_images_per_class": 7, "seed": 0,
        "batch_size": 3, "images_per_shard": 8,
    }  # fmt: skip
    return GenerationPlan(**(options | changes))


def test_image_class_is_the_inner_order():
    plan = make_plan()
    images = [plan.image(index) for index in range(5)]
    assert [image.label for image in images] == [0, 1, 2, 0, 1]
    assert [image.class_index for image in images] == [0, 0, 0, 1, 1]
    assert images[4].prompt == "a b"


def test_image_seed_is_pinned():
    assert make_plan().image(4).seed == 2253534776378797116


def test_image_seed_depends_on_seed_class_number_and_redraw_only():
    plan = make_plan()
    seeds = {plan.image(index, redraw).seed for index in range(21) for redraw in range(3)}
    assert len(seeds) == 63
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert plan.image(4) == make_plan(num_images_per_class=900, batch_size=5, images_per_shard=2).image(4)
    assert plan.image(4).seed != make_plan(seed=1).image(4).seed


def test_shards_cover_every_image_once_for_any_process_count():
    plan = make_plan()
    for num_processes in (1, 2, 5):
        dealt = [n for process in range(num_processes) for n in list(range(plan.num_shards))[process::num_processes]]
        assert sorted(index for number in dealt for index in plan.shard(number)) == list(range(21))


def test_batches_keep_their_composition_when_the_set_grows():
    small, large = make_plan(), make_plan(num_images_per_class=70)
    last = small.num_shards - 1
    batches = list(small.batches(last))
    assert all(len(batch) == 3 for batch in batches)
    assert batches[-1].stop > small.num_images
    assert batches == list(islice(large.batches(last), len(batches)))


def test_find_redraw_tells_the_draw_and_rejects_strange_seeds():
    plan = make_plan()
    assert plan.find_redraw(4, plan.image(4, 2).seed, max_redraws=2) == 2
    assert plan.find_redraw(4, plan.image(4, 2).seed, max_redraws=1) is None
    assert plan.find_redraw(4, plan.image(5).seed, max_redraws=10) is None


def test_plan_of_600_000_images_takes_no_memory():
    tracemalloc.start()
    plan = make_plan(num_images_per_class=200_000, images_per_shard=1000, batch_size=16)
    total = sum(len(plan.shard(number)) for number in range(plan.num_shards))
    plan.image(599_999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 600_000
    assert peak < 100_000
