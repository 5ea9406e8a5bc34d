"""Shares with intervals, agreement of reviewers, and the blind test, against values computed in other ways."""

import math
from itertools import combinations

import pytest

from utils.review.summary import (
    Share,
    fleiss_kappa,
    measure_agreement,
    summarise_blind,
    summarise_classes,
    tabulate_summary,
)


def verdicts_of(votes: dict[str, str]) -> dict:
    """Return verdicts on images 0, 1, ... of a class: a letter an image and reviewer, `a`, `r`, or `-` for none."""
    words = {"a": "accept", "r": "reject"}
    num_images = len(next(iter(votes.values())))
    images = {
        str(index): {name: {"verdict": words[said[index]]} for name, said in votes.items() if said[index] != "-"}
        for index in range(num_images)
    }
    return {"car": {index: given for index, given in images.items() if given}}


def test_a_share_has_the_interval_of_wilsons_formula():
    z, n, p = 1.959964, 20, 17 / 20
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert Share(17, 20).interval == pytest.approx(expected, abs=1e-6)
    assert str(Share(17, 20)) == "85% [64%, 95%]"
    assert str(Share(0, 0)) == "-"


def test_a_class_counts_as_training_does_with_ties_kept_and_other_images_left_aside():
    verdicts = verdicts_of({"anna": "arra-r", "ben": "arar--"})
    [summary] = summarise_classes({"car": [("car", index) for index in range(5)]}, verdicts)
    assert (summary.num_images, summary.num_reviewed, summary.num_rejected) == (5, 4, 1)
    assert summary.accepted is None  # one is not reviewed
    [complete] = summarise_classes({"car": [("car", index) for index in range(4)]}, verdicts)
    assert complete.accepted == Share(3, 4)


def test_two_reviewers_have_cohens_kappa_on_the_images_of_both():
    agreement = measure_agreement(verdicts_of({"anna": "aaaaarrrrr-a", "ben": "aaaarrrrraa-"}))
    # 8 of 10 agree; by chance half of them would
    assert agreement.name == "Cohen's" and agreement.num_images == 10
    assert agreement.kappa == pytest.approx((0.8 - 0.5) / (1 - 0.5))


def test_more_reviewers_have_fleiss_kappa():
    votes = {"anna": "aaaaarrrrr", "ben": "aaaarrrrra", "cleo": "aarararrra"}
    agreement = measure_agreement(verdicts_of(votes))
    pairs = list(combinations(votes.values(), 2))
    observed = sum(one == other for first, second in pairs for one, other in zip(first, second)) / (10 * len(pairs))
    accepted = sum(said.count("a") for said in votes.values()) / 30
    expected = accepted**2 + (1 - accepted) ** 2
    assert agreement.name == "Fleiss'"
    assert agreement.kappa == pytest.approx((observed - expected) / (1 - expected))


def test_agreement_is_not_defined_where_all_say_the_same_and_not_known_without_common_images():
    assert "not defined" in str(measure_agreement(verdicts_of({"anna": "aa", "ben": "aa"})))
    assert "not known" in str(measure_agreement(verdicts_of({"anna": "a-", "ben": "-a"})))
    assert measure_agreement(verdicts_of({"anna": "ar"})) is None
    assert fleiss_kappa([["accept"] * 3] * 4) is None


def test_the_blind_test_counts_classes_and_kinds():
    def answer(name, is_real, said_class, said_real):
        return {"class": name, "is_real": is_real, "said_class": said_class, "said_real": said_real}

    blind = {
        "anna": {"1": answer("car", True, "car", True), "2": answer("car", False, "van", True)},
        "ben": {"1": answer("car", True, "van", False), "3": answer("van", False, "van", False)},
    }
    summary = summarise_blind(blind, ["car", "van"])
    assert summary.by_class == {"car": (Share(1, 2), Share(0, 1)), "van": (Share(0, 0), Share(1, 1))}
    assert summary.real_recognised == Share(1, 2)
    assert summary.synthetic_taken_for_real == Share(1, 2)
    _, _, lines = tabulate_summary([], None, summary, False)
    assert "on real images 50% [9%, 91%], on synthetic images 50%" in lines[-1]
    assert summarise_blind({}, ["car"]) is None


@pytest.mark.parametrize("is_sample", [True, False])
def test_the_accepted_share_is_estimated_from_a_sample_only(is_sample):
    classes = summarise_classes({"car": [("car", 0), ("car", 1)]}, verdicts_of({"anna": "ar"}))
    heads, [row], lines = tabulate_summary(classes, None, None, is_sample)
    assert row[:4] == ["car", "2", "2", "1"]
    assert (len(heads), len(row)) == (4 + is_sample, 4 + is_sample)
    assert lines == ["Reviewed: 2 of 2 images; rejected: 1."]
