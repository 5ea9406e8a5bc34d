import pytest
import torch

from utils.data.image_set import RealImagesRecord
from utils.data.real_images import load_real_images
from utils.style.base_models import open_base_model
from utils.style.latents import LatentCache
from utils.style.style_images import TrainingSteps, micro_batches

NUM_IMAGES = 5


@pytest.fixture(scope="module")
def latents(tiny_pipeline_dir, real_images_dir, tmp_path_factory):
    """The latents of five images, mirrored too."""
    images = load_real_images(RealImagesRecord(str(real_images_dir))).train.select(range(NUM_IMAGES))
    cache = LatentCache(tmp_path_factory.mktemp("latents"), list("abcde"), 32, "a VAE", 2)
    cache.encode(open_base_model(str(tiny_pipeline_dir), "--model").load_vae(), images, [0], show_progress=False)
    return cache.open()


@pytest.fixture
def make_steps(latents):
    """A function that makes training steps; every image has its own class."""

    def make_steps(**changes):
        defaults = {"seed": 0, "images_per_step": 8, "num_templates": 3, "num_train_timesteps": 1000}
        return TrainingSteps(latents=latents, labels=torch.arange(NUM_IMAGES), **defaults | changes)

    return make_steps


def rows_of(batches):
    """Return the rows of batches, sorted independently of the process that drew them."""
    rows = [
        tuple(value[i].flatten().tolist() for value in batch.values())
        for batch in batches
        for i in range(len(batch["labels"]))
    ]
    return sorted(rows, key=str)


def test_a_step_is_the_same_again_and_other_steps_and_seeds_are_others(make_steps):
    first = make_steps()[7]
    again = make_steps()
    again[3]  # regardless of earlier draws
    assert all(torch.equal(first[name], value) for name, value in again[7].items())
    for other in (make_steps()[8], make_steps(seed=1)[7]):
        for name in ("noise", "timesteps", "latents"):
            assert not torch.equal(first[name], other[name])


def test_a_step_has_a_timestep_of_every_part_of_the_range_and_noise_for_every_image(make_steps):
    for step in range(20):
        assert sorted((make_steps()[step]["timesteps"] // 125).tolist()) == list(range(8))
    noise = make_steps()[0]["noise"]
    assert len({row.numpy().tobytes() for row in noise}) == 8
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own_sampled_from_both_copies(make_steps, latents):
    steps = make_steps(images_per_step=NUM_IMAGES)
    batches = [steps[step] for step in range(40)]
    orders = [tuple(batch["labels"].tolist()) for batch in batches]
    assert all(sorted(order) == list(range(NUM_IMAGES)) for order in orders)
    assert len(set(orders)) > 1
    both = torch.arange(NUM_IMAGES).repeat(2), torch.tensor([0, 1]).repeat_interleave(NUM_IMAGES)
    means = latents.sample(*both, torch.zeros(1)).view(2, NUM_IMAGES, -1)
    for label in range(NUM_IMAGES):
        drawn = torch.cat([batch["latents"][batch["labels"] == label] for batch in batches]).flatten(1)
        assert (drawn.mean(0) - means.mean(0)).square().mean(-1).argmin() == label
        copies = (drawn[:, None] - means[None, :, label]).square().mean(-1).argmin(1)
        assert set(copies.tolist()) == {0, 1}  # mirrored and not


@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_parts_of_all_processes_and_all_micro_batches_are_the_whole_step(make_steps, num_parts):
    whole = make_steps()[3]
    assert rows_of(make_steps(rank=rank, num_parts=num_parts)[3] for rank in range(num_parts)) == rows_of([whole])
    parts = micro_batches(whole, num_parts)
    assert [len(part["labels"]) for part in parts] == [8 // num_parts] * num_parts
    assert rows_of(parts) == rows_of([whole])
