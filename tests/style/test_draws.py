import torch

from utils.style.draws import draw_step

SETTINGS = {"batch_size": 8, "num_images": 5, "num_copies": 2, "num_templates": 3, "num_train_timesteps": 1000}


def draw(seed=0, step=0):
    return draw_step(seed, step, latent_shape=(2, 4, 4), **SETTINGS)


def test_a_step_draws_the_same_again_and_other_steps_and_seeds_draw_otherwise():
    assert torch.equal(draw(step=7).noise, draw(step=7).noise)
    assert not torch.equal(draw(step=7).noise, draw(step=8).noise)
    assert not torch.equal(draw(seed=1).noise, draw(seed=2).noise)


def test_timesteps_have_one_in_every_part_of_the_range():
    for step in range(20):
        assert sorted((draw(step=step).timesteps // 125).tolist()) == list(range(8))


def test_parts_of_two_processes_are_together_the_whole_batch():
    whole, parts = draw(), [draw().part(rank, 2) for rank in range(2)]
    assert sorted(parts[0].timesteps.tolist() + parts[1].timesteps.tolist()) == whole.timesteps.tolist()
    assert torch.equal(parts[1].noise, whole.noise[1::2])
