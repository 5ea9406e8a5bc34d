"""Changes to the configs and weight files of saved pipelines."""

import json
from pathlib import Path


def change_config(path: Path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_scheduler(folder: Path, class_name: str, config: dict) -> None:
    change_config(folder / "model_index.json", scheduler=["diffusers", class_name])
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"_class_name": class_name}))


def rename_to_fp16(folder: Path, parts) -> None:
    for part in parts:
        for weights in list((folder / part).glob("*.safetensors")):
            weights.rename(weights.with_suffix(".fp16.safetensors"))


def pickle_weights(folder: Path, part: str) -> None:
    """Replace a part's safetensors with a pickled file."""
    (weights,) = (folder / part).glob("*.safetensors")
    (folder / part / f"{'pytorch_model' if weights.stem == 'model' else weights.stem}.bin").touch()
    weights.unlink()


def publish(local_hub, repo_id: str, folder: Path) -> str:
    """Commit a folder to the tests' Hub; return the commit."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return local_hub.create_repo(repo_id, "model").commit(files)
