import numpy as np
import pytest
import torch

from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images
from utils.style.base_models import open_base_model
from utils.style.latents import LatentCache
from utils.style.steps import TrainingSteps, micro_batches, step_loader

LABELS = [0, 1, 2, 1, 0]


@pytest.fixture(scope="module")
def latents(tiny_pipeline_dir, real_images_dir, tmp_path_factory):
    """The latents of five images, mirrored too."""
    images = load_real_images(RealImagesRecord(str(real_images_dir))).train.select(range(5))
    cache = LatentCache(tmp_path_factory.mktemp("latents"), list("abcde"), 32, "a VAE", 2)
    cache.encode(open_base_model(str(tiny_pipeline_dir), "--model").load_vae(), images, [0], show_progress=False)
    return cache.open()


def make_steps(latents, seed=0, images_per_step=8, rank=0, num_parts=1):
    return TrainingSteps(latents, LABELS, seed, images_per_step, 3, 1000, rank, num_parts)


def rows_of(batch):
    """Return the rows of a batch in an order that does not depend on who drew them."""
    rows = [tuple(value[i].flatten().tolist() for value in batch.values()) for i in range(len(batch["labels"]))]
    return sorted(rows, key=str)


def test_a_step_is_the_same_again_and_other_steps_and_seeds_are_others(latents):
    first = make_steps(latents)[7]
    again = make_steps(latents)
    again[3]  # whatever was drawn before
    assert all(torch.equal(first[name], value) for name, value in again[7].items())
    for other in (make_steps(latents)[8], make_steps(latents, seed=1)[7]):
        for name in ("noise", "timesteps", "latents"):
            assert not torch.equal(first[name], other[name])


def test_timesteps_have_one_in_every_part_of_the_range(latents):
    steps = make_steps(latents)
    for step in range(20):
        assert sorted((steps[step]["timesteps"] // 125).tolist()) == list(range(8))


def test_every_image_is_shown_once_an_epoch_and_in_another_order_in_the_next(latents):
    steps = make_steps(latents, images_per_step=5)
    orders = [[steps._image_at(step * 5 + place) for place in range(5)] for step in range(6)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert np.bincount(steps[0]["labels"]).tolist() == [2, 2, 1]


def test_every_image_of_a_step_has_noise_of_its_own(latents):
    noise = make_steps(latents)[0]["noise"]
    assert len({row.numpy().tobytes() for row in noise}) == 8
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_parts_of_all_processes_are_the_whole_step(latents, num_parts):
    whole = make_steps(latents)[3]
    parts = [make_steps(latents, rank=rank, num_parts=num_parts)[3] for rank in range(num_parts)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in whole}
    assert rows_of(joined) == rows_of(whole)


def test_micro_batches_are_together_the_step(latents):
    whole = make_steps(latents)[0]
    parts = micro_batches(whole, 4)
    assert [len(part["labels"]) for part in parts] == [2] * 4
    assert rows_of({name: torch.cat([part[name] for part in parts]) for name in whole}) == rows_of(whole)


def test_images_are_sampled_from_their_posterior_in_both_copies(latents):
    steps = make_steps(latents, images_per_step=5)
    batches = [steps[step] for step in range(40)]
    for label in set(LABELS):
        drawn = torch.cat([batch["latents"][batch["labels"] == label] for batch in batches])
        images = [i for i, other in enumerate(LABELS) if other == label]
        both = torch.tensor(images * 2), torch.tensor([0, 1]).repeat_interleave(len(images))
        means = latents.sample(*both, torch.zeros(1))
        nearest = (drawn[:, None] - means[None]).square().flatten(2).mean(-1).argmin(1)
        assert set(nearest.tolist()) == set(range(len(means)))  # every image of the class, mirrored and not


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_goes_on_where_it_is_told(latents, num_workers):
    steps = make_steps(latents)
    loaded = list(step_loader(steps, 4, 7, num_workers, pin_memory=False))
    assert len(loaded) == 3
    assert torch.equal(loaded[0]["noise"], steps[4]["noise"])
    assert torch.equal(loaded[2]["noise"], steps[6]["noise"])
