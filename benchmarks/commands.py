"""The command of train_dsi.py in a benchmark, and what any command runs with."""

import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "train_dsi.py"
TRAINING_BAR = "style token"
ENCODING_BAR = "encoding images"


def our_command(pipeline_dir: Path, parquet_dir: Path, work_dir: Path, **flags) -> list[str]:
    """Return a command that learns a token, with its latent cache and output in `work_dir`, and draws no images."""
    flags |= {
        "pretrained_model_name_or_path": pipeline_dir, "dataset_name": parquet_dir, "num_validation_images": 0,
        "latent_cache_dir": work_dir / "latents", "output_dir": work_dir / "style", "overwrite_output_dir": True,
        "report_to": "none",
    }  # fmt: skip
    return [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items())]


def environment_of(work_dir: Path, device: str, num_threads: int = 1) -> dict[str, str]:
    """Return variables for a run on `device`, without network and with a Hugging Face cache of its own.

    On a CPU it has one thread by default, as under `accelerate launch`: two threads on cores that others use wait for
    each other, and the same command then takes 20 or 290 seconds.
    """
    environment = {"HF_HOME": str(work_dir / "hf-home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TQDM_MININTERVAL": "0"}  # every step is drawn, so every step has its time
    return environment | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(num_threads)} if device == "cpu" else {})


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
