"""The guard of replay: what share synthetic images get by what they are worth, and that a stage takes it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import train_bridged
from utils.cli.records import read_record
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.guard import Usefulness, measure_usefulness
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import METHODS, StageSettings, plan_stages
from utils.transfer.probe import build_probe, cross_validated_predictions, extract_features
from utils.transfer.replay import ReplayedImages

pytest_plugins = ["tests.transfer.fixtures"]


@pytest.fixture
def stages():
    """The stages of bridged_replay at two images per class, of which three quarters are synthetic."""
    return plan_stages(METHODS["bridged_replay"], StageSettings(6, 1e-3), StageSettings(6, 1e-4, None), 2)


@pytest.mark.parametrize(
    ("synthetic", "probe", "share"),
    [
        (0.6, 0.6, 0.75), (0.9, 0.6, 0.75), (0.4, None, 0.75),  # as planned
        (0.5, 0.6, 0.6),  # half of the odds, 3 to 1
        (0.4, 0.6, 0.0), (0.1, 0.6, 0.0), (0.0, 0.0, 0.0),
        (1 / 3, None, 0.0), (0.3, 0.2, 0.0),  # no better than guessing
    ],
)  # fmt: skip
def test_the_share_falls_with_what_synthetic_images_are_worth_against_a_probe(stages, synthetic, probe, share):
    guarded = Usefulness(30, 3, 6, synthetic, probe).guard(stages[1])
    assert guarded.synthetic_share == pytest.approx(share)
    assert (guarded.start, guarded.head_init) == (("stage1", "keep") if share else (None, "reset"))
    # a fresh head is trained faster than the rest, one that is kept is not
    assert guarded.settings.head_learning_rate_factor == (1.0 if share else 10.0)
    assert guarded.settings.max_steps == stages[1].settings.max_steps


def test_what_is_left_out_of_a_head_warmup_is_left_out_of_the_stage_after_it():
    settings = StageSettings(6, 1e-4, head_warmup_steps=0.5)
    _, warmup, stage = plan_stages(METHODS["bridged_replay"], StageSettings(6, 1e-3), settings, 2)
    useless = Usefulness(30, 3, 6, 0.1, 0.9)
    guarded = [useless.guard(warmup), useless.guard(stage)]
    assert [(stage.start, stage.head_init, stage.synthetic_share) for stage in guarded] == [
        (None, "reset", 0.0), ("stage2_head", "keep", 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("synthetic", "probe", "shares", "words"),
    [
        (
            0.54,
            0.61,
            (0.27, 0.09),
            "a probe fitted on real ones on 61 %: the synthetic share of each batch is cut from 27 % to 9 %.",
        ),
        (0.7, 0.61, (0.27, 0.27), "on 61 %: the synthetic share of each batch stays 27 %."),
        (
            0.3,
            0.61,
            (0.27, 0.0),
            "on 61 %: synthetic images are left out, with what was learned from them, and these steps are lost.",
        ),
        (
            0.1,
            0.61,
            (0.27, 0.0),
            "no better than guessing (do the synthetic images have the right labels?), so synthetic "
            "images are left out, with what was learned from them, and these steps are lost.",
        ),
        (
            0.7,
            None,
            (0.86, 0.86),
            "with one real image per class, no probe can be tested: the synthetic share of each batch stays 86 %.",
        ),
    ],
)
def test_the_finding_says_what_was_measured_and_done(synthetic, probe, shares, words):
    finding = Usefulness(160, 10, 73, synthetic, probe).results(*shares)["finding"]
    assert finding.startswith(
        f"After 73 steps on synthetic images alone, the network is right on {100 * synthetic:.0f} % of 160 of"
    )
    assert finding.endswith(words)


class TellsRed(nn.Module):
    """A classifier that is right on class 0 alone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 3)
        self.config = type("Config", (), {"num_labels": 3, "name_or_path": "red"})
        self.dtype = torch.float32

    def forward(self, pixel_values):
        return type("Output", (), {"logits": torch.eye(3)[torch.zeros(len(pixel_values), dtype=torch.int64)]})


def test_both_accuracies_are_those_of_the_real_images(classifiers, images):
    base = load_classifier(classifiers["resnet"], ["a", "b", "c"], True, 0)
    processor = load_image_processor(classifiers["resnet"])
    measured = measure_usefulness(TellsRed(), 7, base, ReplayedImages(images, images), processor)
    assert (measured.num_images, measured.num_steps, measured.synthetic_accuracy) == (12, 7, pytest.approx(1 / 3))
    features, labels = extract_features(base, EvalImages(images, processor))
    hits = cross_validated_predictions(features, labels) == labels
    assert measured.probe_accuracy == hits.mean()
    others = np.random.default_rng(0).permutation(labels)
    assert hits.mean() > 0.5 > (cross_validated_predictions(features, others) == others).mean()
    # of images that a probe has seen it is right on all: these it has not
    assert build_probe(1e6).fit(features, labels).score(features, labels) == 1.0


def test_classes_without_synthetic_images_are_not_judged_and_every_class_counts_the_same(classifiers, images):
    base, processor = (
        load_classifier(classifiers["resnet"], ["a", "b", "c"], True, 0),
        load_image_processor(classifiers["resnet"]),
    )
    labels = np.array(images["label"])
    some = images.select(np.flatnonzero(labels < 2))
    measured = measure_usefulness(TellsRed(), 7, base, ReplayedImages(images, some), processor)
    assert (measured.num_images, measured.num_classes, measured.synthetic_accuracy) == (8, 2, 0.5)
    uneven = images.select([*np.flatnonzero(labels == 0), *np.flatnonzero(labels == 1)[:2]])
    measured = measure_usefulness(TellsRed(), 7, base, ReplayedImages(uneven, images), processor)
    assert (measured.num_images, measured.synthetic_accuracy) == (6, 0.5)


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


def test_single_images_of_a_class_leave_nothing_to_compare_with():
    assert cross_validated_predictions(np.eye(3), np.arange(3)) is None
    assert cross_validated_predictions(np.eye(4), np.zeros(4)) is None  # one class


@pytest.mark.parametrize("is_useful", [True, False])
def test_the_guard_decides_and_is_recorded(classifiers, synthetic_dir, tmp_path, monkeypatch, capsys, is_useful):
    measured = Usefulness(6, 3, 3, 0.9 if is_useful else 0.1, 0.9)
    monkeypatch.setattr("utils.transfer.run_method.measure_usefulness", lambda *args: measured)
    flags = ["--synthetic_dataset", str(synthetic_dir), "--model_name_or_path", classifiers["resnet"],
             "--num_shots", "2", "--method", "bridged_replay", "--bridge_max_steps", "3", "--max_steps", "2",
             "--use_cpu", "--output_dir", str(tmp_path)]  # fmt: skip
    results = train_bridged.main(flags)
    config = read_record(tmp_path / "bridged_config.json")
    stage = config["stages"][-1]
    assert (stage["start"], stage["synthetic_share"]) == (("stage1", 0.75) if is_useful else (None, 0.0))
    assert results["guard"]["synthetic_share"] == stage["synthetic_share"]
    assert results["guard"]["finding"] in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "README.md").read_text()
    assert results["guard"]["finding"].replace("your images", "the real training images") in card
    # the classifier of no synthetic images at all is that of stage 2's steps on real ones from the pretrained weights
    before = (tmp_path / "stage2" / "stage_settings.json").read_text()
    assert (classifiers["resnet"] in before) == (not is_useful)


def test_what_no_synthetic_image_made_is_kept_without_them(stages):
    useless = Usefulness(30, 3, 6, 0.1, 0.9)
    for head_init in ("imprint", "probe"):
        stage = plan_stages(
            METHODS["bridged_replay"].with_flags({"head_init": head_init}),
            StageSettings(6, 1e-3),
            StageSettings(6, 1e-4),
            2,
        )[1]
        assert (useless.guard(stage).start, useless.guard(stage).head_init) == (None, head_init)
    stage = plan_stages(METHODS["bridged_domain_norm"], StageSettings(6, 1e-3), StageSettings(6, 1e-4), 2)[1]
    assert useless.guard(stage).settings.batch_norm == "frozen"


def test_an_unguarded_row_takes_its_share_whatever_the_images_are_worth(stages):
    unguarded = plan_stages(METHODS["bridged_unguarded"], StageSettings(6, 1e-3), StageSettings(6, 1e-4), 2)
    assert replace(stages[1], is_guarded=False, without_synthetic=None) == unguarded[1]
    assert "is_guarded" not in unguarded[1].to_dict()
