"""The command lines of the benchmarks, the commands that they measure, and what those run with."""

import argparse
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[1] / "train_dsi.py"
TRAINING_BAR = "style token"
ENCODING_BAR = "encoding images"


def make_parser(description: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark, with `--rounds` and `--device` where it runs programs in turn."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="try it, at small size where it has one; write nothing")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="runs of each program")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    return parser


def parse_with_checkout(parser: argparse.ArgumentParser, library: str, version: str, script: str):
    """Return the arguments, with one for a checkout of a library's repository, and the path of its `script` there."""
    parser.add_argument(f"--{library}", type=Path, default=Path(library), help="checkout of its repository")
    args = parser.parse_args()
    checkout = getattr(args, library)
    if not (checkout / script).exists():
        clone = f"git clone --depth 1 --branch {version} https://github.com/huggingface/{library}"
        parser.error(f"--{library} {checkout}: has no {script}; get it with: {clone}")
    return args, checkout / script


def python_command(script: str | Path, flags: dict) -> list[str]:
    return [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items())]


def our_command(pipeline_dir: Path, parquet_dir: Path, work_dir: Path, **flags) -> list[str]:
    """Return a command that learns a token, with its latent cache and output in `work_dir`, and draws no images."""
    flags |= {
        "pretrained_model_name_or_path": pipeline_dir, "dataset_name": parquet_dir, "num_validation_images": 0,
        "latent_cache_dir": work_dir / "latents", "output_dir": work_dir / "style", "overwrite_output_dir": True,
        "report_to": "none",
    }  # fmt: skip
    return python_command(SCRIPT, flags)


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
