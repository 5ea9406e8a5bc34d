"""BatchNorm per kind of image: each image is normalised as in a network with the statistics of its kind."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import load_dataset

from tests.transfer.builders import assert_same, run_plan
from tests.transfer.two_processes import SETTINGS, contiguous
from utils.transfer import stage
from utils.transfer.classifiers import load_classifier, load_image_processor
from utils.transfer.domain_norm import measure_statistics, normalising_synthetic
from utils.transfer.image_format import EvalImages
from utils.transfer.methods import METHODS, StagePlan, StageSettings, plan_stages
from utils.transfer.model_parts import recalibrate_batch_norm
from utils.transfer.replay import ReplayedImages

pytest_plugins = ["tests.transfer.fixtures"]
PLAN = StagePlan(
    "stage2", "replayed", "reset", replace(SETTINGS, dropout=None, batch_norm="domain"), synthetic_share=0.5
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def replayed(images, real_images_dir):
    return ReplayedImages(images, load_dataset(str(real_images_dir), split="test").select(range(0, 30, 3)), share=0.5)


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_each_image_gets_the_logits_of_a_network_with_the_statistics_of_its_kind(classifiers, replayed, name):
    path = classifiers[name]
    processor = load_image_processor(path)
    model = load_classifier(path, replayed.real.features["label"].names, True, seed=0)
    of_synthetic, of_real = copy.deepcopy(model), copy.deepcopy(model)
    real, synthetic = EvalImages(replayed.real, processor), EvalImages(replayed.synthetic, processor)
    recalibrate_batch_norm(of_synthetic, synthetic, CPU, 0)
    recalibrate_batch_norm(of_real, real, CPU, 0)
    statistics = measure_statistics(model, synthetic, real, CPU, 0)
    torch.testing.assert_close(model.state_dict(), of_real.state_dict())
    pixels = torch.stack([item["pixel_values"] for item in (real[0], synthetic[0], real[1], synthetic[1])])
    is_synthetic = torch.tensor([False, True, False, True])
    state = {"is_synthetic": is_synthetic}
    for each in (model.eval(), of_synthetic.eval(), of_real.eval()):
        each.requires_grad_(False)
    with normalising_synthetic(model, statistics, state):
        logits = model(pixel_values=pixels).logits
        state.clear()
        evaluated = model(pixel_values=pixels).logits
    expected = [each(pixel_values=pixels).logits for each in (of_real, of_synthetic)]
    wanted = torch.where(is_synthetic[:, None], expected[1], expected[0])
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-5)
    assert (expected[1] - expected[0]).abs().max() > 1e-3
    torch.testing.assert_close(evaluated, expected[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected[0], rtol=1e-3, atol=1e-5)


@pytest.fixture
def run(classifiers, replayed, tmp_path):
    def run(folder, name, batch_norm, resume=False, share=0.5):
        plan = replace(PLAN, settings=replace(PLAN.settings, batch_norm=batch_norm))
        options = {"save_strategy": "steps", "save_steps": 2}
        seen = replace(replayed, share=share)
        model, _ = run_plan(plan, classifiers[name], seen, tmp_path / folder, None, None, resume, **options)
        return contiguous(model.state_dict())

    return run


def test_the_classifier_has_the_statistics_of_real_images_and_learns_other_weights(run):
    domain, recalibrated = (run(batch_norm, "resnet", batch_norm) for batch_norm in ("domain", "recalibrate"))
    assert domain.keys() == recalibrated.keys()
    differing = {key for key in domain if not torch.allclose(domain[key], recalibrated[key], rtol=1e-3, atol=1e-5)}
    assert any("running_" in key for key in domain)
    assert differing and all("weight" in key or "bias" in key for key in differing)
    alike = [run(f"{batch_norm}-0", "resnet", batch_norm, share=0.0) for batch_norm in ("domain", "recalibrate")]
    torch.testing.assert_close(*alike, rtol=1e-3, atol=1e-5)  # without synthetic images they are the same


def test_a_network_without_batch_norm_is_trained_as_usual_with_a_warning(run, caplog):
    trained_as_ever = run("frozen", "vit", "frozen")
    assert "BatchNorm" not in caplog.text
    assert_same(run("domain", "vit", "domain"), trained_as_ever)
    assert "--batch_norm domain: " in caplog.text and "has no BatchNorm; no effect." in caplog.text


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_a_stage_resumes_with_the_statistics_it_started_with(run, tmp_path, monkeypatch, name):
    alone = run("stage", name, "domain")
    (tmp_path / "stage" / "stage.json").unlink()
    for step in (6, 7):
        shutil.rmtree(tmp_path / "stage" / f"checkpoint-{step}")
    monkeypatch.setattr(stage, "measure_statistics", lambda *_: pytest.fail("measured again"))
    assert_same(alone, run("stage", name, "domain", resume=True))


def test_the_row_is_bridged_replay_with_other_statistics_in_stage_2():
    settings = StageSettings(90, 5e-4, mixup_alpha=0.2), StageSettings(30, 1e-4)
    ours, theirs = (
        plan_stages(METHODS[name], *settings, images_per_class=4) for name in ("bridged_domain_norm", "bridged_replay")
    )
    assert ours[0] == theirs[0]
    with_domain = replace(theirs[1], settings=replace(theirs[1].settings, batch_norm="domain"))
    assert ours[1] == with_domain
