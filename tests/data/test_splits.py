import numpy as np
import pytest

from utils.data.splits import balanced_indices, few_shot_indices, stratified_split

LABELS = np.repeat([0, 1, 2], [30, 50, 20])


def test_stratified_split_takes_the_share_of_every_class_and_no_image_twice():
    rest, part = stratified_split(LABELS, 0.1)
    assert np.bincount(LABELS[part]).tolist() == [3, 5, 2]
    assert sorted([*rest, *part]) == list(range(100))


def test_stratified_split_of_a_single_image_leaves_it_in_the_rest():
    rest, part = stratified_split(np.array([0, 1, 1]), 0.5)
    assert 0 in rest
    assert len(part) == 1


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
