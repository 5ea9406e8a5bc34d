"""The sets that the benchmarks of generate_synthetic.py draw, as commands of the script and of a plain loop."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks import peer_loop
from benchmarks.commands import python_command
from benchmarks.pipelines import DEMO_DIR, QUICK, SD15, save_pipeline

SCRIPT = Path(__file__).parents[1] / "generate_synthetic.py"
RECIPE = Path(__file__).parents[1] / "demo" / "recipes" / "generate_full.yaml"
DRAWING_BAR = "synthetic images"
NOUNS = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "bag", "sneaker", "boot", "hat")
# with `--multi_gpu`, accelerate starts several processes on a CPU too
LAUNCH = ["launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]


@dataclass(frozen=True)
class Case:
    """A set to draw; the images per class are a multiple of `batch_size`, so the loop's batches are full too."""

    name: str
    pipeline_dir: Path
    num_images_per_class: int
    batch_size: int
    num_inference_steps: int
    guidance_scale: float
    mixed_precision: str = "no"
    images_per_shard: int = 1_000
    image_format: str = "png"

    @property
    def num_images(self) -> int:
        return self.num_images_per_class * len(NOUNS)

    def our_command(self, work_dir: Path, num_processes: int = 1, **flags) -> list[str]:
        """Return a command that draws the set into `work_dir`/set, with the pipeline's own scheduler."""
        flags |= self._shared_flags(work_dir) | {
            "pretrained_model_name_or_path": self.pipeline_dir, "output_dir": work_dir / "set", "scheduler": "default",
            "images_per_shard": self.images_per_shard,
        }  # fmt: skip
        python, *command = python_command(SCRIPT, flags)
        if num_processes == 1:
            return [python, *command]
        return [str(Path(python).with_name("accelerate")), *LAUNCH, "--num_processes", str(num_processes), *command]

    def peer_command(self, work_dir: Path) -> list[str]:
        """Return a command that draws the same number of images of the same classes into `work_dir`/loop."""
        flags = self._shared_flags(work_dir) | {"pipeline_dir": self.pipeline_dir, "output_dir": work_dir / "loop"}
        return python_command(peer_loop.__file__, flags)

    def _shared_flags(self, work_dir: Path) -> dict:
        names = work_dir / "names.txt"
        names.write_text("\n".join(NOUNS) + "\n")
        return {
            "class_names_file": names, "num_images_per_class": self.num_images_per_class,
            "batch_size": self.batch_size, "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale, "mixed_precision": self.mixed_precision,
            "image_format": self.image_format,
        }  # fmt: skip


def demo_case(num_images_per_class: int) -> Case:
    """Return the demo's generator and recipe, with small shards, so that processes get equal parts."""
    recipe = yaml.safe_load(RECIPE.read_text())
    return Case(
        "The demo's pipeline, 32 px, float32", DEMO_DIR, num_images_per_class, recipe["batch_size"],
        recipe["num_inference_steps"], recipe["guidance_scale"], images_per_shard=2 * recipe["batch_size"],
    )  # fmt: skip


def sd15_case(num_images_per_class: int, work_dir: Path, pipeline_dir: Path | None = None) -> Case:
    """Return a pipeline of the size of Stable Diffusion 1.5 with random weights, `pipeline_dir` or a new one."""
    return Case(
        "Size of Stable Diffusion 1.5, 512 px, bfloat16", pipeline_dir or save_pipeline(SD15, work_dir / "pipeline"),
        num_images_per_class, batch_size=16, num_inference_steps=25, guidance_scale=3.0, mixed_precision="bf16",
    )  # fmt: skip


def quick_case(num_images_per_class: int, work_dir: Path, batch_size: int = 2, images_per_shard: int = 2) -> Case:
    """Return a pipeline so small that it draws many images quickly, in one step."""
    return Case(
        "A minimal pipeline, 64 px, float32", save_pipeline(QUICK, work_dir / "pipeline"), num_images_per_class,
        batch_size, num_inference_steps=1, guidance_scale=1.0, images_per_shard=images_per_shard,
    )  # fmt: skip
