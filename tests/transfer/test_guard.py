"""The guard of replay: the share of synthetic images by what they add, and stages that use it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from safetensors.torch import load_file
from torch import nn

import train_bridged
from utils.cli.records import read_record
from utils.transfer import guard
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.guard import Usefulness, guard_stages, measure_usefulness
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import METHODS, StageSettings, plan_stages, with_fresh_head
from utils.transfer.probe import build_probe, cross_validated_predictions, extract_features
from utils.transfer.replay import ReplayedImages
from utils.transfer.stage import open_pretrained

pytest_plugins = ["tests.transfer.fixtures"]


def plan(weight=1.0, name="bridged_replay", flags=None, **settings):
    """Return stages of 12 steps at two images per class, of which three quarters are planned to be synthetic."""
    real = StageSettings(6, 1e-4, None, **settings)
    return plan_stages(METHODS[name].with_flags(flags or {}), StageSettings(6, 1e-3), real, 2, weight)


def outline(stages):
    return [(stage.name, stage.start, stage.head_init, stage.settings.max_steps) for stage in stages]


@pytest.mark.parametrize(
    ("synthetic", "probe", "joint", "weight"),
    [
        (0.6, 0.6, 0.7, 1.0), (0.4, None, None, 1.0),  # as planned
        (0.5, 0.6, 0.63, 0.5), (0.2 + 1 / 3, 0.6, 0.615, 0.25),
        (0.5, 0.6, 0.6, 0.0), (0.9, 0.6, 0.5, 0.0),
        (1 / 3, None, None, 0.0), (0.3, 0.2, 0.9, 0.0),  # no better than guessing
    ],
)  # fmt: skip
def test_the_weight_of_synthetic_images_is_what_they_add_to_a_probe(synthetic, probe, joint, weight):
    assert Usefulness(30, 3, synthetic, probe, joint).weight == pytest.approx(weight, abs=1e-4)


def test_shares_and_steps_of_both_stages_decrease_with_the_weight():
    for weight, share, num_first in ((1.0, 0.75, 6), (0.5, 0.6, 6), (0.1, 0.6 / 2.6, 3)):
        stages = plan(weight)
        assert outline(stages) == [
            ("stage1", None, "reset", num_first), ("stage2", "stage1", "keep", 12 - num_first),
        ]  # fmt: skip
        assert stages[1].synthetic_share == pytest.approx(share)


def test_without_synthetic_images_all_steps_are_on_real_ones_from_the_head_of_a_probe():
    (stage,) = plan(0.0)
    assert outline([stage]) == [("stage2", None, "probe", 12)]
    assert stage.synthetic_share == 0 and stage.settings.mixup_alpha == 0.2
    assert stage.settings.head_learning_rate_factor == 1.0
    assert with_fresh_head(stage).settings.head_learning_rate_factor == 10.0
    warmup, stage = plan(0.0, head_warmup_steps=0.5)
    assert outline([warmup, stage]) == [("stage2_head", None, "probe", 6), ("stage2", "stage2_head", "keep", 6)]
    # head inits that need no synthetic images are kept
    for head_init in ("imprint", "probe", "reset"):
        assert outline(plan(0.0, flags={"head_init": head_init})) == [("stage2", None, head_init, 12)]
    assert plan(0.0, "bridged_domain_norm")[0].settings.batch_norm == "frozen"
    assert plan(0.0, flags={"average": 0.5})[0].average is None


@pytest.mark.parametrize(
    ("usefulness", "shares", "words"),
    [
        ((0.54, 0.61, 0.63), (0.27, 0.09), "the share of synthetic images is cut from 27 % to 9 %."),
        ((0.54, 0.61, 0.7), (0.27, 0.27), "the share of synthetic images stays at 27 %."),
        ((0.54, 0.61, 0.6), (0.27, 0.0), "synthetic images are left out."),
        ((0.1, 0.61, 0.7), (0.27, 0.0), "synthetic images alone are no better than guessing (do they have the right "
         "labels?), and are left out."),
    ],
)  # fmt: skip
def test_the_finding_says_what_was_measured_and_done(usefulness, shares, words):
    synthetic, probe, joint = (100 * accuracy for accuracy in usefulness)
    assert Usefulness(160, 10, *usefulness).results(*shares)["finding"] == (
        "A linear probe of the pretrained features, tested on 160 of your images (10 classes), is right on "
        f"{probe:.0f} % if fitted on other real images, {synthetic:.0f} % on synthetic images alone, and {joint:.0f} % "
        f"on both ({joint - probe:+.1f} points): {words}"
    )


def test_with_one_image_per_class_the_finding_says_that_nothing_was_compared():
    assert Usefulness(10, 10, 0.7).results(0.86, 0.86)["finding"] == (
        "A linear probe of the pretrained features, fitted on synthetic images, is right on 70 % of 10 of your images "
        "(10 classes); with one real image per class no other probe can be tested: the share of synthetic images stays "
        "at 86 %."
    )


@pytest.fixture
def measure(classifiers, images):
    """Return `measure_usefulness` of a network on real images, `images` by default, and synthetic ones."""
    processor = load_image_processor(classifiers["resnet"])
    base = load_classifier(classifiers["resnet"], ["a", "b", "c"], True, 0)

    def measure(synthetic, real=images, share=0.5):
        return measure_usefulness(base, ReplayedImages(real, synthetic), share, processor)

    return measure


def test_accuracies_are_those_of_probes_on_real_images_that_they_have_not_seen(measure, classifiers, images):
    measured = measure(images)
    assert (measured.num_images, measured.num_classes) == (12, 3)
    assert measured.synthetic_accuracy > 0.9  # on images that it was fitted on
    base, processor = (
        load_classifier(classifiers["resnet"], ["a", "b", "c"], True, 0),
        load_image_processor(classifiers["resnet"]),
    )
    features, labels = extract_features(base, EvalImages(images, processor))
    hits = cross_validated_predictions(features, labels) == labels
    assert measured.probe_accuracy == hits.mean()
    # the tested images themselves are among the synthetic ones here
    assert measured.joint_accuracy > measured.probe_accuracy
    others = np.random.default_rng(0).permutation(labels)
    assert hits.mean() > 0.5 > (cross_validated_predictions(features, others) == others).mean()
    # a probe is right on all images that it has seen, so it has not seen these
    assert build_probe(1e6).fit(features, labels).score(features, labels) == 1.0


def test_images_with_wrong_labels_add_nothing(measure, images):
    labels = (np.array(images["label"]) + 1) % 3
    wrong = images.remove_columns("label").add_column("label", labels.tolist(), feature=images.features["label"])
    measured = measure(wrong, share=0.9)
    assert measured.synthetic_accuracy < 0.1 and measured.is_guessing and measured.weight == 0
    assert measured.joint_accuracy < measured.probe_accuracy


def test_additional_images_have_the_weight_of_their_share(images):
    """For two images with the same features, the probe predicts the label with the higher weight."""
    features, labels = np.repeat(np.eye(3), 4, 0) + 0.0, np.repeat(np.arange(3), 4)
    wrong = np.eye(3), np.array([1, 2, 0])
    for weight, is_right in ((0.5, True), (2.0, False)):
        predictions = cross_validated_predictions(features, labels, (*wrong, weight))
        assert ((predictions == labels) == is_right).all()


def test_classes_without_synthetic_images_are_not_judged_and_every_class_counts_the_same(measure, images):
    labels = np.array(images["label"])
    measured = measure(images.select(np.flatnonzero(labels < 2)))
    assert (measured.num_images, measured.num_classes, measured.synthetic_accuracy) == (8, 2, 1.0)
    uneven = images.select([*np.flatnonzero(labels == 0), *np.flatnonzero(labels == 1)[:2]])
    measured = measure(images.select(np.flatnonzero(labels != 1)), uneven)
    assert (measured.num_images, measured.num_classes) == (4, 1)
    red = images.select(np.flatnonzero(labels == 0)), images.select(np.flatnonzero(labels == 1)[:1])
    measured = measure(concatenate_datasets([*red]), uneven)
    assert (measured.num_images, measured.num_classes) == (6, 2)


def test_the_first_images_of_a_stream_are_measured(measure, images):
    assert measure(images.to_iterable_dataset()) == measure(images)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_features_are_what_enters_the_head(classifiers, images, name):
    model = load_classifier(classifiers[name], ["a", "b", "c"], True, 0)
    features, labels = extract_features(model, EvalImages(images, load_image_processor(classifiers[name])), 5)
    head = next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear))
    pixels = torch.stack([item["pixel_values"] for item in EvalImages(images, load_image_processor(classifiers[name]))])
    with torch.inference_mode():
        logits = model(pixel_values=pixels).logits
        assert torch.allclose(head(torch.as_tensor(features)), logits, atol=1e-5)
    assert labels.tolist() == images["label"]


def test_one_image_per_class_gives_no_comparison():
    assert cross_validated_predictions(np.eye(3), np.arange(3)) is None
    assert cross_validated_predictions(np.eye(4), np.zeros(4)) is None  # one class


@pytest.mark.parametrize("is_useful", [True, False])
def test_the_guard_decides_and_is_recorded(classifiers, synthetic_dir, tmp_path, monkeypatch, capsys, is_useful):
    measured = Usefulness(6, 3, 0.9, 0.8, 0.9 if is_useful else 0.7)
    monkeypatch.setattr(guard, "measure_usefulness", lambda *args: measured)
    flags = ["--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["resnet"],
             "--num_shots", "2", "--method", "bridged_replay", "--bridge_max_steps", "3", "--max_steps", "2",
             "--use_cpu", "--output_dir", str(tmp_path)]  # fmt: skip
    results = train_bridged.main(flags)
    config = read_record(tmp_path / "bridged_config.json")
    assert [(stage["name"], stage["start"], stage["head_init"]) for stage in config["stages"]] == (
        [("stage1", None, "reset"), ("stage2", "stage1", "keep")] if is_useful else [("stage2", None, "probe")]
    )
    assert results["guard"]["synthetic_share"] == config["stages"][-1]["synthetic_share"] == 0.75 * is_useful
    assert results["total_steps"] == 5
    assert results["guard"]["finding"] in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "README.md").read_text()
    assert results["guard"]["finding"].replace("your images", "the real training images") in card
    assert ("with 75 % synthetic ones among them" in card) == is_useful
    assert ("the synthetic images" in card and "were tested first and left out" in card) == (not is_useful)


def test_without_its_synthetic_images_replay_gives_the_classifier_of_lp_ft(
    classifiers, synthetic_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(guard, "measure_usefulness", lambda *args: Usefulness(6, 3, 0.9, 0.8, 0.7))
    for method in ("bridged_replay", "lp_ft"):
        train_bridged.main(
            ["--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["resnet"], "--num_shots",
             "2", "--method", method, "--bridge_max_steps", "3", "--max_steps", "2", "--use_cpu", "--output_dir",
             str(tmp_path / method)]
        )  # fmt: skip
    ours, theirs = (load_file(tmp_path / method / "model.safetensors") for method in ("bridged_replay", "lp_ft"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_share_of_less_than_one_image_per_batch_is_rounded_to_none(classifiers, images, monkeypatch):
    kinds, pretrained = ReplayedImages(images, images), open_pretrained(classifiers["resnet"], None, False, None)

    def guard_at(images_per_class):
        settings = StageSettings(6, 1e-3), StageSettings(6, 1e-4)
        make = partial(plan_stages, METHODS["bridged_replay"], *settings, images_per_class)
        return guard_stages(lambda weight: make(weight=weight), kinds, pretrained, ["a", "b", "c"], 0)

    # with 32 images per batch, a share of 1 / 32: at n = 6 that is a weight of 1 / 31
    for gain, is_left_out in ((0.06 / 30, False), (0.06 / 32, True)):
        measured = Usefulness(6, 3, 0.9, 0.5, 0.5 + gain)
        monkeypatch.setattr(guard, "measure_usefulness", lambda *args, measured=measured: measured)
        stages, found = guard_at(6)
        assert (len(stages) == 1) == (found["guard"]["synthetic_share"] == 0) == is_left_out
    monkeypatch.setattr(guard, "measure_usefulness", lambda *_: pytest.fail("measured needlessly"))
    stages, found = guard_at(187)
    assert [stage.images for stage in stages] == ["real"]
    assert found["guard"]["finding"] == (
        "With this many real images, less than one image per batch would be synthetic: they are left out."
    )
    with pytest.raises(pytest.fail.Exception):
        guard_at(185)


def test_a_network_that_cannot_have_a_probe_as_head_starts_with_a_fresh_one(classifiers, images, monkeypatch, caplog):
    monkeypatch.setattr(guard, "measure_usefulness", lambda *args: Usefulness(6, 3, 0.9, 0.8, 0.7))
    pretrained = open_pretrained(classifiers["resnet"], None, False, None)
    kinds = ReplayedImages(images, images)
    stages, _ = guard_stages(plan, kinds, pretrained, ["a", "b", "c"], 0)
    assert outline(stages) == [("stage2", None, "probe", 12)]
    some = ReplayedImages(
        images.select(np.flatnonzero(np.array(images["label"]) < 2)), images
    )  # one class has no images
    stages, _ = guard_stages(plan, some, pretrained, ["a", "b", "c"], 0)
    assert outline(stages) == [("stage2", None, "reset", 12)]
    assert stages[0].settings.head_learning_rate_factor == 10.0
    caplog.set_level("INFO", "utils")
    guard_stages(lambda weight: plan(weight, flags={"average": 0.5}), kinds, pretrained, ["a", "b", "c"], 0)
    assert "--average 0.5 does nothing: synthetic images were left out." in caplog.text


def test_an_unguarded_method_takes_its_planned_share():
    unguarded = plan(name="bridged_unguarded")
    assert [replace(stage, guarded_by_probe=False) for stage in plan()] == unguarded
    assert "guarded_by_probe" not in unguarded[1].to_dict()
