"""The model card of a bridged classifier."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
METRIC_NAMES = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "mean_per_class_accuracy": "Mean per-class accuracy",
    "macro_f1": "Macro F1",
}


def write_model_card(output_dir: str | Path, model_name: str, base_model: str, config: dict, results: dict) -> None:
    """Write `README.md` with a `model-index`, the data sets linked.

    `config` is what `bridged_config.json` holds, `results` what `all_results.json` holds. Local paths are named in the
    text only: the Hub takes ids in the metadata.
    """
    real = config["real_images"]["dataset_name"]
    synthetic = config["synthetic_dataset"]["name"] if config["synthetic_dataset"] else None
    data = ModelCardData(
        model_name=model_name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["bridged-transfer", "image-classification", "synthetic-data"],
        base_model=None if Path(base_model).exists() else base_model,
        datasets=[name for name in (real, synthetic) if name and not Path(name).exists()] or None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=Path(real).name if Path(real).exists() else real,
                dataset_name=Path(real).name,
                dataset_split="test",
                metric_type=metric,
                metric_name=METRIC_NAMES[metric],
                metric_value=round(results[f"test_{metric}"], 4),
            )
            for metric in METRIC_NAMES
            if f"test_{metric}" in results
        ],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        model_path=base_model,
        real=real,
        synthetic=synthetic,
        config=config,
        results=results,
        metric_names=METRIC_NAMES,
    )
    card.save(Path(output_dir) / "README.md")
