"""The command lines of the benchmarks, the commands that they measure, and the environment of these."""

import argparse
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[1] / "train_dsi.py"
TRAINING_BAR = "style token"
ENCODING_BAR = "encoding images"


def make_parser(description: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark, with `--rounds` and `--device` if it runs programs in turn."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="trial run, at a small size if it has one; write nothing")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="runs of each program (default: %(default)s)")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    return parser


def parse_with_checkout(parser: argparse.ArgumentParser, library: str, version: str, script: str):
    """Return the arguments, including the checkout of a library's repository, and the path of `script` in it."""
    parser.add_argument(f"--{library}", type=Path, default=Path(library), help=f"checkout of the {library} repository")
    args = parser.parse_args()
    checkout = getattr(args, library)
    if not (checkout / script).exists():
        clone = f"git clone --depth 1 --branch {version} https://github.com/huggingface/{library}"
        parser.error(f"--{library} {checkout}: has no {script}; get it with: {clone}")
    return args, checkout / script


def python_command(script: str | Path, flags: dict) -> list[str]:
    return [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items())]


def our_command(pipeline_dir: Path, parquet_dir: Path, work_dir: Path, **flags) -> list[str]:
    """Return a command that learns a token, with latent cache and output in `work_dir`, without preview images."""
    flags |= {
        "pretrained_model_name_or_path": pipeline_dir, "dataset_name": parquet_dir, "num_validation_images": 0,
        "latent_cache_dir": work_dir / "latents", "output_dir": work_dir / "style", "overwrite_output_dir": True,
        "report_to": "none",
    }  # fmt: skip
    return python_command(SCRIPT, flags)


def environment_of(work_dir: Path, device: str, num_threads: int = 1) -> dict[str, str]:
    """Return the environment variables of a run on `device`, without network and with a separate Hugging Face cache.

    On a CPU it has one thread by default, as under `accelerate launch`: on shared cores, two threads wait for each
    other, and the same command takes anything from 20 to 290 seconds.
    """
    environment = {"HF_HOME": str(work_dir / "hf-home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TQDM_MININTERVAL": "0"}  # every step is drawn, so every step is timed
    return environment | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(num_threads)} if device == "cpu" else {})


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
