"""What a finished token's folder holds, and what is said of it. No torch."""

import re
import shutil
from pathlib import Path

from utils.cli.options import absolute_if_local
from utils.cli.records import DSI_CONFIG, RUN_CONFIG, image_set_name, write_record, write_run_config
from utils.hub.cards import read_licenses
from utils.style.base_models import BaseModel
from utils.style.card import STYLE_PICTURE, write_token_card

TRAINING_PICTURE = "training.png"
PUBLISHED_FILES = (
    "learned_embeds.safetensors", TRAINING_PICTURE, STYLE_PICTURE, DSI_CONFIG, RUN_CONFIG, "README.md",
)  # fmt: skip


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, the earliest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def start_token_folder(output_dir: Path, keep_checkpoints: bool) -> None:
    """Make the folder, or remove what says that the token which is being replaced is finished."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in (DSI_CONFIG, STYLE_PICTURE):
        (output_dir / name).unlink(missing_ok=True)
    for folder in [] if keep_checkpoints else checkpoint_folders(output_dir):
        shutil.rmtree(folder)


def describe_token(base_model: BaseModel, real_images, nouns: list[str], templates: list[str], **settings) -> dict:
    """Return what the next step needs to know of a token: base model, images, class names, prompts."""
    return {
        "base_model": {"id": absolute_if_local(base_model.source.name), "revision": base_model.source.revision},
        "pipeline_class": base_model.pipeline_class,
        "real_images": real_images.record.to_dict(),
        "train_indices": real_images.train_indices.tolist(),
        "class_names": real_images.class_names,
        "prompt_nouns": nouns,
        "prompt_templates": templates,
        **settings,
    }


def write_records(
    output_dir: Path, record: dict, options: dict, started: float, command: str, hub_id: str | None, token: str | None
) -> None:
    """Write `run_config.json`, the card, and last `dsi_config.json`: its presence says that the token is finished."""
    base_model, real = record["base_model"], record["real_images"]
    sources = [
        (base_model["id"], "model", base_model["revision"]),
        (image_set_name(real), "dataset", real["dataset_revision"]),
    ]
    run = write_run_config(output_dir, options, started)
    write_token_card(output_dir, record, run, read_licenses(sources, token), command, hub_id)
    write_record(output_dir / DSI_CONFIG, record)


def print_summary(output_dir: Path, health: dict, seconds: float) -> None:
    """Print what the token learned, where it lies, and the next command."""
    print(f"Denoising loss on {health['num_images']} {health['images']}, with fixed noise:")
    for arm in ("no_token", "untrained_token", "trained_token"):
        print(f"  {arm.replace('_', ' '):16s} {health[f'loss_{arm}']:.4f}")
    for embedding in health["embeddings"]:
        low, middle, high = embedding["vocabulary_5_50_95"]
        print(
            f"Embedding norm {embedding['norm']:.3f}; of the vocabulary's 5 % are below {low:.3f}, half below "
            f"{middle:.3f}, 95 % below {high:.3f}."
        )
    if health["num_skipped_images"]:
        print(f"{health['num_skipped_images']} damaged images were left out.")
    if not health["token_learned"]:
        print(
            "WARNING: the token learned nothing: the loss with it is not clearly below that with the untrained token. "
            "Try more steps, a higher --learning_rate, or another --initializer_token."
        )
    print(f"Style token in {output_dir}, {seconds:.0f} s. Next:")
    print(f"  accelerate launch generate_synthetic.py --learned_embeds {output_dir}")
