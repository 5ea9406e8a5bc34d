"""The sets of benchmarks.generate_quality, drawn by the real command, with the plain loop timed between them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from benchmarks import peer_loop
from benchmarks.children import run_child
from benchmarks.commands import environment_of, python_command
from benchmarks.drawing import DRAWING_BAR, NOUNS, RECIPE, SCRIPT
from benchmarks.quality_settings import LOOP_FLAGS, Setting
from utils.cli.contents import describe_files, list_files
from utils.cli.records import DSI_CONFIG, RUN_CONFIG, read_record, write_record
from utils.comparison.grid import fingerprint

SETS_PER_LOOP = 6  # sets that are drawn between two timings of the loop
LOOP_CLASSES = NOUNS[:4]
# the demo's batches and files, but not its sampling, which may change with the results
SHARED_FLAGS = ("batch_size", "images_per_shard", "image_format")


@dataclass(frozen=True)
class SetToDraw:
    """A set of one setting and seed, in `work_dir`; `token` is the folder of the seed's style token."""

    setting: Setting
    seed: int
    token: Path
    num_images_per_class: int
    work_dir: Path

    @cached_property
    def flags(self) -> dict:
        recipe = yaml.safe_load(RECIPE.read_text())
        flags = {name: recipe[name] for name in SHARED_FLAGS}
        flags |= {"seed": self.seed, "num_images_per_class": self.num_images_per_class, "mixed_precision": "no"}
        return flags | {"learned_embeds": self.token}

    @cached_property
    def name(self) -> str:
        """The name of the set, which depends on the contents of its inputs."""
        record = read_record(self.token / DSI_CONFIG)
        folders = {"token": self.token, "generator": Path(record["base_model"]["id"]), "lora": self.setting.adapter}
        contents = {name: describe_files(path, list_files(path)) for name, path in folders.items() if path is not None}
        settings = {**self.setting.flags, **self.flags, "learned_embeds": None, "contents": contents}
        return f"{self.setting.name}-seed{self.seed}-{fingerprint(settings)}"

    @property
    def folder(self) -> Path:
        return self.work_dir / "sets" / self.name

    @property
    def record_path(self) -> Path:
        return self.work_dir / "drawn" / f"{self.name}.json"

    @property
    def is_drawn(self) -> bool:
        return self.record_path.exists() and (self.folder / RUN_CONFIG).exists()

    @property
    def num_images(self) -> int:
        return self.num_images_per_class * len(read_record(self.token / DSI_CONFIG)["class_names"])

    def command(self) -> list[str]:
        command = python_command(SCRIPT, self.flags | {"output_dir": self.folder})
        return [*command, *self.setting.words]

    def draw(self, loop_speed: float) -> None:
        """Draw the set, and record its speed and `loop_speed`, measured just before, in images/s."""
        shutil.rmtree(self.folder, ignore_errors=True)  # only a complete run is timed
        child = run_child(self.command(), self.log_path(self.name), self.environment)
        speed = self.num_images / child.seconds_of(DRAWING_BAR, self.num_images)
        write_record(
            self.record_path,
            {"images_per_second": speed, "loop_images_per_second": loop_speed, "seconds": child.seconds},
        )

    def time_loop(self) -> float:
        """Return the images/s of the plain loop with its own setting and the same generator."""
        batch_size = self.flags["batch_size"]
        folder = self.work_dir / "loops" / self.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        names = folder / "names.txt"
        names.write_text("\n".join(LOOP_CLASSES) + "\n")
        command = python_command(peer_loop.__file__, {
            "pipeline_dir": read_record(self.token / DSI_CONFIG)["base_model"]["id"], "class_names_file": names,
            "output_dir": folder / "images", "num_images_per_class": batch_size, "batch_size": batch_size,
            **{name: LOOP_FLAGS[name] for name in ("num_inference_steps", "guidance_scale")},
        })  # fmt: skip
        child = run_child(command, self.log_path(f"loop-{self.name}"), self.environment)
        shutil.rmtree(folder)
        num_images = len(LOOP_CLASSES) * batch_size
        return num_images / child.seconds_of(peer_loop.BAR, num_images)

    def log_path(self, name: str) -> Path:
        path = self.work_dir / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def environment(self) -> dict[str, str]:
        return environment_of(self.work_dir, "cpu") | {"ACCELERATE_USE_CPU": "true"}


def draw_sets(sets: list[SetToDraw], num_workers: int) -> None:
    """Draw the missing sets with `num_workers` in parallel, which also time the loop every few sets.

    Raises:
        RuntimeError: a command failed.
    """
    waiting = [each for each in sets if not each.is_drawn]

    def draw_in_turn(lane: list[SetToDraw]) -> None:
        for number, each in enumerate(lane):
            if number % SETS_PER_LOOP == 0:
                loop_speed = each.time_loop()
                print(f"the plain loop: {loop_speed:.1f} images/s", flush=True)
            each.draw(loop_speed)
            speed = read_record(each.record_path)["images_per_second"]
            print(f"{each.setting.name}, seed {each.seed}: {speed:.1f} images/s", flush=True)

    with ThreadPoolExecutor(num_workers) as pool:
        lanes = [waiting[number::num_workers] for number in range(num_workers)]
        for future in [pool.submit(draw_in_turn, lane) for lane in lanes]:
            future.result()
