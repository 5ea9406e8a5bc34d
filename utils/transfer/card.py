"""The model card of a bridged classifier."""

import math
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants

from utils.cli.records import image_set_name
from utils.hub.cards import FUNCTIONS, License, code, common_license, hub_ids, save_card

TEMPLATE = Path(__file__).with_name("card.md.jinja")
METRIC_NAMES = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "mean_per_class_accuracy": "Mean per-class accuracy",
    "macro_f1": "Macro F1",
    "expected_calibration_error": "Expected calibration error",
}
MEANS_OVER_CLASSES = ("mean_per_class_accuracy", "macro_f1")


def write_model_card(
    output_dir: str | Path,
    model_name: str,
    base_model: str,
    config: dict,
    results: dict,
    licenses: dict[str, License],
    command: str,
) -> None:
    """Write `README.md` with a `model-index`, the data sets and the base model linked.

    `config` is what `bridged_config.json` holds, `results` what `all_results.json` holds, `licenses` maps each source's
    name to its licence, of which the classifier gets that of `base_model`. Local paths are named in the text only: the
    Hub takes ids in the metadata. A card that is there already is merged.

    Raises:
        UserError: that card's metadata are malformed.
    """
    real = image_set_name(config["real_images"])
    synthetic = config["synthetic_dataset"]["name"] if config["synthetic_dataset"] else None
    base_models = hub_ids(base_model)
    data = ModelCardData(
        **common_license([licenses[base_model]]).to_metadata(),
        model_name=model_name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["bridged-transfer", "image-classification", "synthetic-data", *(["lora"] if config["lora"] else [])],
        base_model=base_models[0] if base_models else None,
        base_model_relation="finetune" if base_models else None,
        datasets=hub_ids(real, synthetic) or None,
        eval_results=eval_results(real, config.get("test_split"), results) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        model_path=base_model,
        base_link=_link(base_model),
        real_link=_link(real, "datasets/"),
        synthetic_link=synthetic and _link(synthetic, "datasets/"),
        config=config,
        results=results,
        metric_names=METRIC_NAMES,
        licenses=licenses,
        command=command,
        **FUNCTIONS,
    )
    save_card(card, Path(output_dir) / "README.md")


def _link(name: str, folder: str = "") -> str:
    return f"[{code(name)}]({constants.ENDPOINT}/{folder}{name})" if hub_ids(name) else code(name)


def eval_results(dataset_name: str, split: str | None, results: dict) -> list[EvalResult]:
    """Return the test metrics of `results` that are numbers, for a `model-index`; a `split` of None has no name."""
    folder_or_repository = Path(dataset_name).resolve().name if Path(dataset_name).is_dir() else dataset_name
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=folder_or_repository,
            dataset_name=Path(folder_or_repository).name,
            dataset_split=split,
            metric_type=metric,
            metric_name=metric_name,
            metric_value=round(float(results[f"test_{metric}"]), 4),
        )
        for metric, metric_name in METRIC_NAMES.items()
        if math.isfinite(results.get(f"test_{metric}", math.nan))
    ]
