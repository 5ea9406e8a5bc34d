"""The whole pipeline on real images, on two CPU cores, without network: `make demo` and `make demo-full`.

Each step is a command that you could type; what is finished is not done again, so an interrupted run goes on.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


class Demo:
    """Runs the steps one after another and remembers their seconds."""

    def __init__(self, runs_dir: Path):
        self.runs_dir = runs_dir
        self.seconds_path = runs_dir / "seconds.json"
        self.seconds = json.loads(self.seconds_path.read_text()) if self.seconds_path.exists() else {}

    def step(self, name: str, why: str, finished: Path, *command: str) -> None:
        """Say what happens and why, run `accelerate launch command` (or python, for a demo script), time it."""
        print(f"\n\033[1m{name}\033[0m: {why}", flush=True)
        if name in self.seconds and finished.exists():
            print(f"  done before in {self.seconds[name]:.0f} s: {finished}")
            return
        shown = " ".join(["python" if command[0].startswith("demo/") else "accelerate launch", shlex.join(command)])
        print(f"  $ {shown}", flush=True)
        python = Path(sys.executable)
        if command[0].startswith("demo/"):
            full_command = [python, *command]
        else:
            threads = ["--num_cpu_threads_per_process", str(os.cpu_count())]
            full_command = [python.with_name("accelerate"), "launch", *LAUNCH, *threads, *command]
        started = time.time()
        result = subprocess.run(full_command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
        if result.returncode:
            sys.exit(f"{name} failed; run the same make command again to go on from here.")
        self.seconds[name] = round(time.time() - started, 1)
        self.seconds_path.parent.mkdir(parents=True, exist_ok=True)
        self.seconds_path.write_text(json.dumps(self.seconds, indent=2) + "\n")

    def style_and_set(self, seed: int, images_per_class: int) -> None:
        """Learn the style from the 1-shot images of a few-shot seed, and draw a synthetic set with it."""
        style, images = self.runs_dir / f"style-{seed}", self.runs_dir / f"synthetic-{seed}"
        self.step(
            f"style token, seed {seed}",
            "ten real images, one of each class, become one token; the generator stays as it is",
            style / "dsi_config.json",
            "train_dsi.py", "demo/recipes/dsi.yaml", "--few_shot_seed", str(seed), "--seed", str(seed),
            "--output_dir", str(style),
        )  # fmt: skip
        self.step(
            f"synthetic set, seed {seed}",
            f"the generator draws {images_per_class} images of each class in that style, with labels",
            images / "run_config.json",
            "generate_synthetic.py", "demo/recipes/generate.yaml", "--learned_embeds", str(style),
            "--seed", str(seed), "--num_images_per_class", str(images_per_class), "--output_dir", str(images),
        )  # fmt: skip

    def plain_set(self, seed: int, images_per_class: int) -> None:
        """Draw the control: the same generator and classes, without the style token."""
        images = self.runs_dir / f"plain-{seed}"
        self.step(
            f"control set, seed {seed}",
            f"{images_per_class} images of each class without the token: what the generator draws unasked",
            images / "run_config.json",
            "generate_synthetic.py", "demo/recipes/generate.yaml", "--learned_embeds",
            str(self.runs_dir / f"style-{seed}"), "--use_style_token", "false", "--seed", str(seed),
            "--num_images_per_class", str(images_per_class), "--output_dir", str(images),
        )  # fmt: skip

    def style_figures(self) -> None:
        self.step(
            "style figures",
            "are the synthetic images like the real ones? brightness at the border, colour, Frechet distance",
            self.runs_dir / "style.png",
            "demo/style_figures.py", "--real", "demo/fashion-mnist", "--with_token",
            str(self.runs_dir / "synthetic-0"), "--without_token", str(self.runs_dir / "plain-0"),
            "--classifier", "demo/classifier", "--output_dir", str(self.runs_dir),
        )  # fmt: skip

    def train_bridged(self) -> None:
        self.step(
            "bridged transfer",
            "an ImageNet classifier is fine-tuned on the synthetic images, then on the ten real ones",
            self.runs_dir / "bridged-0" / "all_results.json",
            "train_bridged.py", "demo/recipes/bridged.yaml", "--synthetic_dataset",
            str(self.runs_dir / "synthetic-0"), "--output_dir", str(self.runs_dir / "bridged-0"),
        )  # fmt: skip

    def compare(self, why: str, recipe: str, *arguments: str) -> None:
        output_dir = self.runs_dir / "comparison"
        self.step(
            "comparison", why, output_dir / "comparison.md",
            "compare_transfer.py", recipe, "--output_dir", str(output_dir), *arguments,
        )  # fmt: skip

    def finish(self) -> None:
        """Print the seconds of the steps and where the pictures are."""
        print("\n\033[1mWhat it took\033[0m")
        for name, seconds in self.seconds.items():
            print(f"  {name:26s} {seconds:7.0f} s")
        print(f"  {'all':26s} {sum(self.seconds.values()):7.0f} s")
        print("\n\033[1mPictures\033[0m")
        pictures = {
            "style.png": "real images, synthetic without and with the token",
            "style-0/training.png": "the style token's learning curve",
            "synthetic-0/preview.png": "the synthetic set, a row a class",
            "bridged-0/report.png": "learning curves of both stages, confusion matrix",
            "comparison/comparison.png": "accuracy over the number of real images, a line a method",
        }
        for name, what in pictures.items():
            if (self.runs_dir / name).exists():
                print(f"  {self.runs_dir / name}: {what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the README's table: 5 seeds, 1-16 shots, all methods")
    args = parser.parse_args()
    demo = Demo(Path("demo/runs-full" if args.full else "demo/runs"))
    seeds, images_per_class = (range(5), 100) if args.full else (range(3), 80)
    for seed in seeds:
        demo.style_and_set(seed, images_per_class)
        if args.full or seed == 0:
            demo.plain_set(seed, images_per_class if args.full else 30)
        if seed == 0:
            demo.style_figures()
            demo.train_bridged()
    synthetic_set = str(demo.runs_dir / "synthetic-{seed}")
    if args.full:
        plain_set = str(demo.runs_dir / "plain-{seed}")
        demo.compare(
            "every method on the same real images; learning rate and steps of each were chosen on validation images",
            "demo/recipes/compare_full.yaml", "--synthetic_dataset", f"dsi={synthetic_set}", f"plain={plain_set}",
        )  # fmt: skip
    else:
        demo.compare(
            "is it the bridge? vanilla with as many steps, mixing, and bridging, on the same real images, 3 seeds",
            "demo/recipes/compare.yaml",
            "--synthetic_dataset", f"dsi={synthetic_set}",
        )  # fmt: skip
    demo.finish()


if __name__ == "__main__":
    main()
