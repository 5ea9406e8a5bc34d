import numpy as np
import pytest

from utils.data.splits import balanced_indices, carve, evenly_spaced, few_shot_indices

LABELS = np.repeat([0, 1, 2], [30, 50, 20])


def test_carve_takes_about_the_share_of_every_class_and_no_image_twice():
    labels = np.repeat([0, 1], [3000, 1000])
    rest, part = carve(labels, np.random.default_rng(0).random(4000), np.arange(4000), 0.1)
    assert np.abs(np.bincount(labels[part]) - [300, 100]).max() < 50
    assert sorted([*rest, *part]) == list(range(4000))


def test_carve_leaves_one_of_each_class_and_takes_one_of_two():
    labels = np.array([0, 1, 1, 2, 2])
    for places in (np.full(5, 0.9), np.zeros(5)):
        rest, part = carve(labels, places, np.arange(5), 0.5)
        assert labels[rest].tolist() == [0, 1, 2]
        assert labels[part].tolist() == [1, 2]


def test_a_second_part_is_carved_from_what_is_left():
    labels, places = np.zeros(10, int), np.arange(10) / 10
    rest, test = carve(labels, places, np.arange(10), 0.2)
    rest, validation = carve(labels, places, rest, 0.4)
    assert (rest.tolist(), validation.tolist(), test.tolist()) == ([4, 5, 6, 7, 8, 9], [2, 3], [0, 1])


def test_evenly_spaced_rows_begin_and_end_with_the_set():
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 4).tolist() == evenly_spaced(3, None).tolist() == [0, 1, 2]
    assert evenly_spaced(0, 4).tolist() == []


def test_few_shot_indices_are_nested_and_balanced():
    for seed in range(3):
        one, four = few_shot_indices(LABELS, 1, seed), few_shot_indices(LABELS, 4, seed)
        assert np.bincount(LABELS[four]).tolist() == [4, 4, 4]
        assert set(one) < set(four)


def test_few_shot_indices_of_other_seeds_differ():
    assert few_shot_indices(LABELS, 4, 0).tolist() != few_shot_indices(LABELS, 4, 1).tolist()


def test_few_shot_indices_of_too_many_shots_raise_with_the_class():
    with pytest.raises(ValueError, match="label 2 has 20 images, 21"):
        few_shot_indices(LABELS, 21, 0)


def test_balanced_indices_are_nested_and_balanced():
    chosen = [set(balanced_indices(LABELS, number, 1)) for number in range(1, 101)]
    for smaller, larger in zip(chosen, chosen[1:]):
        assert smaller < larger
    for number, indices in enumerate(chosen[:60], 1):
        counts = np.bincount(LABELS[sorted(indices)], minlength=3)
        assert counts.sum() == number
        assert counts.max() - counts.min() <= 1
    assert np.bincount(LABELS[sorted(chosen[74])]).tolist() == [28, 27, 20]  # the last class has no more


def test_balanced_indices_of_k_for_each_class_are_those_of_k_shots():
    for num_shots in (1, 4, 20):
        expected = few_shot_indices(LABELS, num_shots, 7).tolist()
        assert balanced_indices(LABELS, 3 * num_shots, 7).tolist() == expected


def test_balanced_indices_of_more_than_there_are_take_all_in_order():
    assert balanced_indices(LABELS, 1000, 0).tolist() == list(range(100))
