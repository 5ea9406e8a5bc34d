"""Inputs are replaced, processes killed and runs restarted at random moments: every result belongs to its inputs.

A history is a row of runs of one script into one folder. Its seed says which inputs are replaced, how, and at which
file operation of a run (or after how many seconds), where a run is killed or asked to end, and what is run next. Each
input has a few versions, so that a clean run of those that a record names gives what the result must be.
"""

import functools
import hashlib
import importlib
import io
import json
import os
import pkgutil
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.processes import ROOT, start_script

pytest_plugins = ["tests.transfer.fixtures"]

CHILD = "from tests.test_schedule import be_child; be_child()"
FILE_EVENTS = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}
MANNERS = ("renamed", "in place", "same times", "swapped")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
PAST = 1_600_000_000  # the modification time of all files of all versions
OVERWRITE, KEEP, RESUME = (
    "--overwrite_output_dir", "--no_overwrite_output_dir", ["--resume_from_checkpoint", "latest"]
)  # fmt: skip


class Killed(BaseException):
    """Instead of SIGKILL, within the test process."""


class Moments:
    """Counts this process's file operations below a folder, in all threads, and runs the actions planned for some of
    them.

    Meanwhile, other threads wait at their file operations there.
    """

    watched: "Moments | None" = None

    def __init__(self, folder: Path, plan: dict[int, Callable[[], None]]):
        self.folder = str(folder)
        self.plan = plan
        self.count = 0
        self._pid, self._lock, self._acts = os.getpid(), threading.RLock(), False

    def see(self, arguments: tuple) -> None:
        if os.getpid() != self._pid or not any(str(word).startswith(self.folder) for word in arguments):
            return
        with self._lock:
            if self._acts:
                return
            self.count += 1
            if self.count in self.plan:
                self._acts = True
                try:
                    self.plan[self.count]()
                finally:
                    self._acts = False


@functools.cache
def install_hook() -> None:
    def look(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and Moments.watched is not None:
            Moments.watched.see(arguments)

    sys.addaudithook(look)


@contextmanager
def watching(moments: Moments) -> Iterator[None]:
    install_hook()
    Moments.watched = moments
    try:
        yield
    finally:
        Moments.watched = None


@dataclass(frozen=True)
class World:
    """The folders of a history. `versions` maps each input's flag to its versions, numbered from 0."""

    root: Path
    versions: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def state(self) -> dict[str, int]:
        """The version of each input."""
        return json.loads((self.root / "state.json").read_text())

    @property
    def log(self) -> list[list]:
        """The actions on inputs and runs since the log was cleared."""
        path = self.root / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def begin(self, state: dict[str, int]) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        for flag, version in state.items():
            shutil.copytree(self.versions / flag / str(version), self.root / "inputs" / flag)
        for name in ("spare", "work"):
            (self.root / name).mkdir()
        (self.root / "state.json").write_text(json.dumps(state))

    def clear_log(self) -> None:
        (self.root / "log.jsonl").unlink(missing_ok=True)

    def note(self, action: list) -> None:
        with open(self.root / "log.jsonl", "a") as file:
            file.write(json.dumps(action) + "\n")

    def act(self, action: list) -> None:
        """Replace an input, as `["replace", flag, version, manner]`, or end this process, as `["end", signal]`."""
        self.note(action)
        if action[0] == "replace":
            self.replace(*action[1:])
        elif action[1] == "SIGKILL" and not is_child():
            raise Killed
        else:
            os.kill(os.getpid(), signal.Signals[action[1]])

    def replace(self, flag: str, version: int, manner: str) -> None:
        state, target = self.state, self.root / "inputs" / flag
        source = self.versions / flag / str(version)
        if manner == "touched":
            for path in files_of(target).values():
                os.utime(path)
            return
        if manner == "swapped":  # the earlier folder comes back unchanged
            old, new = (self.root / "spare" / f"{flag}-{number}" for number in (state[flag], version))
            if not new.exists():
                shutil.copytree(source, new)
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            new.rename(target)
        else:
            before, after = files_of(target), files_of(source)
            for name in before.keys() - after.keys():
                before[name].unlink()
            for name, path in after.items():
                if name not in before or before[name].read_bytes() != path.read_bytes():
                    write_file(path.read_bytes(), target / name, manner, self.root / "spare" / "file")
        (self.root / "state.json").write_text(json.dumps(state | {flag: version}))

    def describe_changes(self) -> list[str]:
        """Return unexpected changes outside the output folder and the caches."""
        changed = [
            f"--{flag} {name}"
            for flag, version in self.state.items()
            for name in differing_files(self.root / "inputs" / flag, self.versions / flag / str(version))
        ]
        known = {"inputs", "out", "caches", "spare", "work", "state.json", "log.jsonl"}
        return changed + [path.name for path in self.root.iterdir() if path.name not in known] + [
            f"working directory: {path.name}" for path in (self.root / "work").iterdir()
        ]  # fmt: skip


def write_file(content: bytes, path: Path, manner: str, spare: Path) -> None:
    times = os.stat(path) if path.exists() else None
    if manner == "renamed":
        spare.write_bytes(content)
        os.replace(spare, path)
    else:
        path.write_bytes(content)
    if manner == "same times" and times is not None:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def files_of(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def differing_files(folder: Path, other: Path) -> list[str]:
    ours, theirs = ({name: path.read_bytes() for name, path in files_of(where).items()} for where in (folder, other))
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


# --- the inputs and their versions


def save_versions(folder: Path, base: Path, *changes: Callable[[Path], None]) -> None:
    """Save a folder unchanged and after each change, all files with the same times."""
    for number, change in enumerate([lambda _: None, *changes]):
        change(Path(shutil.copytree(base, folder / str(number))))
        for path in files_of(folder / str(number)).values():
            os.utime(path, (PAST, PAST))


def moved(name: str) -> Callable[[Path], None]:
    """Return a function that shifts the weights in a safetensors file."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = {key: value + 0.01 for key, value in load_file(folder / name).items()}
        save_file(weights, folder / name, {"format": "pt"})

    return change


def reworded(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text and len(old) == len(new)
        (folder / name).write_text(text.replace(old, new))

    return change


def all_of(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes]


def inverted(class_name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from PIL import Image, ImageOps

        for path in (folder / class_name).iterdir():
            ImageOps.invert(Image.open(path)).save(path)

    return change


def exchanged(class_name: str, other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / class_name).rename(folder / "aside")
        (folder / other).rename(folder / class_name)
        (folder / "aside").rename(folder / other)

    return change


def save_photos(folder: Path, num_per_class: int) -> Path:
    """Save class folders of BMP files, all of the same size."""
    import numpy as np

    from tests.conftest import CLASS_NAMES, draw_image

    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASS_NAMES):
        (folder / name).mkdir(parents=True)
        for number in range(num_per_class):
            draw_image(label, rng).save(folder / name / f"{number}.bmp")
    return folder


def save_parquet(folder: Path, photos: Path, num_per_class: int, rows_per_file: int) -> Path:
    """Save the first photos of each class as files whose sizes do not depend on the contents."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    from tests.conftest import CLASS_NAMES

    rows = [
        {"image": {"bytes": (photos / name / f"{number}.bmp").read_bytes(), "path": None}, "label": label,
         "class_index": number}
        for number in range(num_per_class)
        for label, name in enumerate(CLASS_NAMES)
    ]  # fmt: skip
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES), "class_index": Value("int64")})
    (folder / "data").mkdir(parents=True)
    for number, start in enumerate(range(0, len(rows), rows_per_file)):
        shard = Dataset.from_list(rows[start : start + rows_per_file], features=features)
        shard.to_parquet(folder / "data" / f"train-{number:05d}.parquet")
    return folder


def save_set(folder: Path, photos: Path, num_per_class: int, real: dict) -> Path:
    """Save photos as a synthetic set for real images; with more photos, the first files stay the same."""
    from tests.conftest import CLASS_NAMES
    from utils.cli.records import GENERATION_CONFIG, write_record

    record = {
        "real_images": real, "class_names": CLASS_NAMES, "token": None, "train_indices": None,
        "num_images": 3 * num_per_class, "num_images_per_class": num_per_class,
    }  # fmt: skip
    write_record(save_parquet(folder, photos, num_per_class, 6) / GENERATION_CONFIG, record)
    return folder


def replaced_by(other: Path) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(other, folder)

    return change


def save_real_images(folder: Path, base: Path, place: str, num_per_class: int) -> None:
    """Save versions of photos, as class folders or, for `dataset_name`, as parquet."""
    changes = [inverted("red_square"), exchanged("red_square", "green circle")]
    if place == "train_dir":
        save_versions(folder, save_photos(base / "photos", num_per_class), *changes)
        return
    save_versions(base / "drawn", save_photos(base / "photos", num_per_class), *changes)
    saved = [save_parquet(base / f"parquet-{n}", base / "drawn" / str(n), num_per_class, 100) for n in range(3)]
    sizes = {path.stat().st_size for made in saved for path in files_of(made).values()}
    assert len(sizes) == 1, sizes
    save_versions(folder, saved[0], *map(replaced_by, saved[1:]))


def make_dsi_inputs(variant: "Variant", versions: Path, base: Path, root: Path, fixtures: dict) -> None:
    unet, text_encoder, vae = (
        moved(f"{part}.safetensors")
        for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model")
    )
    scaled = reworded("vae/config.json", "0.18215", "0.28215")
    save_versions(
        versions / "pretrained_model_name_or_path", fixtures["pipeline"], unet, text_encoder, vae, scaled,
        all_of(unet, text_encoder, vae),
    )  # fmt: skip
    save_real_images(versions / variant.real, base, variant.real, 6)
    (base / "texts").mkdir()
    (base / "texts" / "nouns.yaml").write_text("red_square: red square\n")
    save_versions(versions / "class_names_file", base / "texts", reworded("nouns.yaml", "red square", "red cirque"))
    (base / "texts" / "nouns.yaml").unlink()
    (base / "texts" / "templates.txt").write_text("{class} like {token}\n")
    save_versions(versions / "prompt_templates_file", base / "texts", reworded("templates.txt", "like", "as a"))


def make_generation_inputs(variant: "Variant", versions: Path, base: Path, root: Path, fixtures: dict) -> None:
    from tests.synthesis.tokens import save_token

    save_versions(
        versions / "generator", fixtures["pipeline"], moved("unet/diffusion_pytorch_model.safetensors"),
        moved("text_encoder/model.safetensors"), reworded("vae/config.json", "0.18215", "0.28215"),
    )  # fmt: skip
    token = save_token(base / "token", root / "inputs" / "generator", fixtures["real"])
    save_versions(
        versions / "learned_embeds", token, moved("learned_embeds.safetensors"),
        reworded("dsi_config.json", "red square", "red cirque"),
    )  # fmt: skip


def make_transfer_inputs(variant: "Variant", versions: Path, base: Path, root: Path, fixtures: dict) -> None:
    from utils.data.image_set import RealImagesRecord

    save_versions(
        versions / "model_name_or_path", fixtures["classifier"], moved("model.safetensors"),
        reworded("preprocessor_config.json", "0.5", "0.4"),
    )  # fmt: skip
    save_real_images(versions / variant.real, base, variant.real, 10)
    real = RealImagesRecord(**{variant.real: str(root / "inputs" / variant.real)}, num_shots=2).to_dict()
    save_versions(base / "others", base / "photos", inverted("blue-stripe"))
    sets = [
        save_set(base / f"set-{count}-{number}", base / "others" / str(number), count, real)
        for count, number in ((4, 0), (4, 1), (6, 0), (6, 1))
    ]
    save_versions(versions / "synthetic_dataset", sets[0], *map(replaced_by, sets[1:]))


# --- the scripts


@dataclass(frozen=True)
class Variant:
    """A script with flags: how its inputs are made, where it records them, and which results are compared."""

    script: str
    flags: str
    make_inputs: Callable
    real: str | None = None
    volume: int | None = None
    named: dict[str, str] = field(default_factory=dict)  # inputs whose flag names one of their files
    hidden: tuple[str, ...] = ()  # inputs named in the record of another input

    @property
    def is_resumed_by_flag(self) -> bool:
        return self.script in ("train_dsi", "train_bridged")

    @property
    def can_overwrite(self) -> bool:
        """Whether it has --overwrite_output_dir; without it, a command always gives the result of the current
        inputs."""
        return self.script != "compare_transfer"

    def argv(self, world: World) -> list[str]:
        inputs = [
            word
            for flag in sorted(path.name for path in world.versions.iterdir())
            if flag not in self.hidden
            for word in (f"--{flag}", str(world.root / "inputs" / flag / self.named.get(flag, "")))
        ]
        return [*inputs, *self.flags.split(), "--output_dir", str(world.out)]

    def identify(self, flag: str, folder: Path) -> str:
        """Return the identity of an input's version in the scripts' records."""
        from utils.cli.contents import describe_files
        from utils.data.image_set import RealImagesRecord
        from utils.data.real_images import identify_real_images
        from utils.hub.repositories import Source
        from utils.style.base_models import open_base_model
        from utils.synthesis.generators import open_generator
        from utils.transfer.classifiers import list_loaded_files
        from utils.transfer.synthetic_images import identify_synthetic, open_synthetic

        name = str(folder)
        if flag == "pretrained_model_name_or_path":
            return open_base_model(name, f"--{flag}").identity
        if flag == "generator":
            return open_generator(name, f"--{flag}", None, None).identity
        if flag == "learned_embeds":
            return describe_token(folder / "learned_embeds.safetensors", json_of(folder / "dsi_config.json"))
        if flag == "model_name_or_path":
            return Source(name, f"--{flag}").identity(list_loaded_files)
        if flag == "synthetic_dataset":
            return identify_synthetic(open_synthetic(name), self.volume)
        if flag in self.named:
            return describe_files(folder, [self.named[flag]])
        return identify_real_images(RealImagesRecord(**{flag: name}))[1][flag]

    def noted_inputs(self, out: Path) -> dict[str, str]:
        """Return flag -> identity of the inputs in the record of a finished run."""
        if self.script == "generate_synthetic":
            settings = json_of(out / "generation_config.json")["settings"]
            token = f"{settings['learned_embeds_sha256']} {settings['prompt_nouns']}"
            return {"generator": settings["generator_contents"], "learned_embeds": token}
        if self.script == "compare_transfer":
            inputs = json_of(out / "comparison.json")["inputs"]
            return {named.split()[0].removeprefix("--"): identity for named, identity in inputs.items()}
        return json_of(out / "run_config.json")["inputs"]

    def result(self, out: Path) -> dict[str, object]:
        """Return the parts of a result that are equal in repeated runs."""
        if self.script == "train_dsi":
            return {name: (out / name).read_bytes() for name in ("learned_embeds.safetensors", "dsi_config.json")}
        if self.script == "generate_synthetic":
            return {name: path.read_bytes() for name, path in files_of(out).items() if "data" in name or "SHA" in name}
        if self.script == "train_bridged":
            metrics = without_costs(json_of(out / "all_results.json"))
            return {"model.safetensors": (out / "model.safetensors").read_bytes(), "all_results.json": metrics}
        cells = {path.name: without_costs(json_of(path)["results"]) for path in sorted((out / "cells").glob("*.json"))}
        cells |= {str(path.relative_to(out)): path.read_bytes() for path in out.glob("stage1/**/*.safetensors")}
        return cells | {"summary": [without_costs(entry) for entry in json_of(out / "comparison.json")["summary"]]}

    def kept_files(self, out: Path) -> dict[str, tuple]:
        """Return the files that a finished run must not touch: names with sizes and times."""
        patterns = {
            "generate_synthetic": ["data/*"], "compare_transfer": ["cells/*.json", "stage1/**/*.safetensors"],
        }.get(self.script, ["**/*"])  # fmt: skip
        paths = [path for pattern in patterns for path in out.glob(pattern) if path.is_file()]
        return {str(path.relative_to(out)): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def json_of(path: Path) -> dict:
    return json.loads(path.read_text())


def without_costs(results: dict) -> dict:
    return {name: value for name, value in results.items() if "second" not in name and "gpu_hours" not in name}


def describe_token(weights: Path, record: dict) -> str:
    return f"{hashlib.sha256(weights.read_bytes()).hexdigest()} {record['prompt_nouns']}"


DSI = "--max_train_steps 4 --checkpointing_steps 2 --train_batch_size 2 --learning_rate 0.1 --num_validation_images 0"
GENERATION = "--images_per_shard 4 --batch_size 2 --num_inference_steps 2"
STEPS = (
    "--learning_rate 0.001 --max_steps 4 --bridge_max_steps 4 --save_strategy steps --save_steps 2 --use_cpu "
    "--dataloader_num_workers 0"
)
COMPARISON = (
    "--num_shots 1 --seeds 0 --bridge_step_counts 2 --step_counts 1 --use_cpu --dataloader_num_workers 0 "
    "--learning_rates 0.001 --bridge_learning_rates 0.001 --methods vanilla bridged"
)
TEXTS = {"class_names_file": "nouns.yaml", "prompt_templates_file": "templates.txt"}
# histories of `make test`: the variant, the seed, and the number of random runs
SHORT = [("dsi-folders", 0, 3), ("generate", 1, 2), ("bridged-folders", 0, 1), ("compare-folders", 0, 1)]
VARIANTS = {
    "dsi-folders": Variant("train_dsi", DSI, make_dsi_inputs, "train_dir", named=TEXTS),
    "dsi-parquet": Variant("train_dsi", DSI, make_dsi_inputs, "dataset_name", named=TEXTS),
    "generate": Variant("generate_synthetic", GENERATION, make_generation_inputs, hidden=("generator",)),
    "bridged-folders": Variant("train_bridged", STEPS, make_transfer_inputs, "train_dir"),
    "bridged-parquet": Variant(
        "train_bridged", f"{STEPS} --max_synthetic_samples_per_class 4", make_transfer_inputs, "dataset_name", 4
    ),
    "compare-folders": Variant("compare_transfer", COMPARISON, make_transfer_inputs, "train_dir"),
    "compare-volumes": Variant(
        "compare_transfer", f"{COMPARISON} --volumes 2 4", make_transfer_inputs, "dataset_name", 4
    ),
}


# --- a run, in a separate process or in this one


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status (minus the number of a signal), and its stderr."""

    status: int
    errors: str


@contextmanager
def apart(world: World, script: str) -> Iterator[None]:
    """Keep caches in the world, work in it, and skip what takes longer than training a tiny model."""
    import datasets
    from huggingface_hub import constants
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(world.root / "caches"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", world.root / "caches" / "datasets")
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b""))
        patch.chdir(world.root / "work")
        if script == "train_dsi":
            patch.setattr("utils.style.monitor.NUM_TIMESTEPS", 2)
        yield


def is_child() -> bool:
    return "SCHEDULE" in os.environ


def be_child() -> None:
    """Act as a script in a separate process, with actions at some moments."""
    schedule = json.loads(os.environ["SCHEDULE"])
    world, script = World(Path(schedule["root"]), Path(schedule["versions"])), schedule["script"]
    sys.argv[0] = f"{script}.py"
    with apart(world, script), watching(Moments(world.root, plan_of(world, schedule["actions"]))):
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


def plan_of(world: World, actions: list) -> dict[int, Callable[[], None]]:
    return {moment: functools.partial(world.act, action) for moment, action in actions}


def run_child(world: World, script: str, argv: list[str], actions: list, in_time: bool) -> Outcome:
    """Run a script as a process; `actions` maps moments (numbers of file operations, or seconds) to what is done."""
    folder = world.versions.parent / "processes"
    folder.mkdir(exist_ok=True)
    schedule = {"root": str(world.root), "versions": str(world.versions), "script": script}
    schedule["actions"] = [] if in_time else actions
    child = start_script(CHILD, argv, folder, SCHEDULE=json.dumps(schedule))
    for path in child.outputs:
        path.touch()  # a process killed at once creates none
    started = time.monotonic()
    for moment, action in sorted(actions) if in_time else ():
        while time.monotonic() - started < moment and child.poll() is None:
            time.sleep(0.005)
        if child.poll() is not None:
            break
        if action[0] == "end":
            world.note(action)
            child.send_signal(signal.Signals[action[1]])
        else:
            child.send_signal(signal.SIGSTOP)
            world.act(action)
            child.send_signal(signal.SIGCONT)
    _, errors = child.communicate()
    return Outcome(child.returncode, errors)


def run_in_process(world: World, script: str, argv: list[str], actions: list, in_time: bool = False) -> Outcome:
    """Run a script in this process, where SIGKILL is an exception; moments are numbers of file operations."""
    assert not in_time
    return run_and_count(world, script, argv, actions)[0]


def run_and_count(world: World, script: str, argv: list[str], actions: list) -> tuple[Outcome, int]:
    """Run a script in this process; return the number of its file operations, too."""
    from accelerate.state import AcceleratorState, PartialState

    from utils.cli.errors import run_script

    def end_at_once(number: int, _):
        sys.exit(-number)

    main, errors, status = importlib.import_module(script).main, io.StringIO(), 0
    moments = Moments(world.root, plan_of(world, actions))
    earlier = signal.signal(signal.SIGTERM, end_at_once)
    try:
        with apart(world, script), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py"])
            with redirect_stdout(io.StringIO()), redirect_stderr(errors), watching(moments):
                run_script(lambda: main(argv))
    except SystemExit as end:
        status = end.code
    except Killed:
        status = -signal.SIGKILL
    except Exception:
        status = 1
        errors.write(traceback.format_exc())
    finally:
        signal.signal(signal.SIGTERM, earlier)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    return Outcome(status, errors.getvalue()), moments.count


# --- a history


@dataclass
class Stage:
    """The stage for a variant's histories: its world, and the results of clean runs of the versions."""

    variant: Variant
    world: World
    tally: Counter = field(default_factory=Counter)
    clean: dict = field(default_factory=dict)
    num_operations: int = 0  # file operations of a clean run

    @functools.cached_property
    def identities(self) -> dict[str, list[str]]:
        """The identities of each input's versions."""
        return {
            folder.name: [self.variant.identify(folder.name, version) for version in sorted(folder.iterdir())]
            for folder in sorted(self.world.versions.iterdir())
        }

    @property
    def first(self) -> dict[str, int]:
        return dict.fromkeys(self.identities, 0)

    def identities_of(self, state: dict[str, int]) -> dict[str, str]:
        return {flag: self.identities[flag][version] for flag, version in state.items()}

    def result_of(self, state: dict[str, int], flags: list[str]) -> dict[str, object]:
        """Return the result of an undisturbed run in the same place, with separate caches."""
        key = tuple(sorted(state.items())), tuple(flags)
        if key not in self.clean:
            root, aside = self.world.root, self.world.root.with_name("aside")
            if root.exists():
                root.rename(aside)
            self.world.begin(state)
            argv = [*self.variant.argv(self.world), *flags]
            outcome, self.num_operations = run_and_count(self.world, self.variant.script, argv, [])
            assert outcome.status == 0, outcome.errors
            assert self.variant.noted_inputs(self.world.out) == self.identities_of(state)
            self.clean[key] = self.variant.result(self.world.out)
            shutil.rmtree(root)
            if aside.exists():
                aside.rename(root)
        return self.clean[key]


@dataclass
class History:
    """Runs in one folder, one after another; `violations` lists what went wrong, `log` what was done."""

    stage: Stage
    rng: random.Random
    run: Callable[..., Outcome]
    log: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    num_images: int = 4
    is_begun: bool = False
    consistent: dict[str, str] | None = None  # identities of the inputs of everything in the folder, if known
    finished: dict[str, str] | None = None  # identities of the inputs of its result
    advised: list[str] | None = None  # the arguments with which the last run said to resume

    def __post_init__(self):
        self.stage.result_of(self.stage.first, self.size_flags())
        self.world.begin(self.stage.first)

    @property
    def world(self) -> World:
        return self.stage.world

    @property
    def variant(self) -> Variant:
        return self.stage.variant

    def play(self, num_runs: int, in_time: bool = False) -> None:
        """Make random runs with replacements between and during them, then one from scratch and one that finds it
        finished."""
        for _ in range(num_runs):
            for _ in range(self.rng.choice([0, 0, 1, 1, 2]) if self.is_begun else 0):
                self.act(self.draw_replacement())
            self.play_run(self.draw_flags(), self.draw_actions(in_time), in_time)
        self.play_run([OVERWRITE] if self.variant.can_overwrite else [])
        for flag, version in self.world.state.items():
            self.act(["replace", flag, version, "touched"])
        self.play_run([])

    def check(self) -> None:
        assert not self.violations, "\n".join(self.log)

    def act(self, action: list) -> None:
        """Replace an input between two runs."""
        self.log.append(f"  between runs: {action[1:]}")
        self.stage.tally["touched between runs" if action[3] == "touched" else "replaced between runs"] += 1
        self.world.act(action)

    def draw_replacement(self, besides: tuple = ()) -> list:
        state = self.world.state
        flag = self.rng.choice([flag for flag in state if flag not in besides])
        if self.rng.random() < 0.2:
            return ["replace", flag, state[flag], "touched"]
        version = self.rng.choice([n for n in range(len(self.stage.identities[flag])) if n != state[flag]])
        return ["replace", flag, version, self.rng.choice(MANNERS)]

    def draw_actions(self, in_time: bool) -> list:
        """Return the actions during a run: no input is replaced twice, so that none is restored."""
        actions = []
        for _ in range(self.rng.choice([0, 0, 1, 1, 2])):
            actions.append(self.draw_replacement(tuple(action[1] for action in actions)))
        if self.rng.random() < 0.5:
            actions.append(["end", self.rng.choice(SIGNALS)])
        draw = (lambda: self.rng.uniform(0.4, 4)) if in_time else lambda: self.rng.randint(1, self.stage.num_operations)
        return list({moment: [moment, action] for action in actions for moment in [draw()]}.values())

    def draw_flags(self) -> list[str]:
        """Return the flags that are added to the command, or the arguments with which the last run said to resume."""
        if self.advised is not None and self.rng.random() < 0.7:
            return self.advised
        if self.variant.script == "generate_synthetic" and self.rng.random() < 0.3:
            self.num_images = 7
        kinds = [[], [OVERWRITE]] if self.variant.can_overwrite else [[]]
        return self.rng.choice([*kinds, *[RESUME if self.variant.is_resumed_by_flag else []] * 3])

    def size_flags(self) -> list[str]:
        is_sized = self.variant.script == "generate_synthetic"
        return ["--num_images_per_class", str(self.num_images)] if is_sized else []

    def play_run(self, flags: list[str], actions: list = (), in_time: bool = False) -> None:
        """Make a run, and check everything that is promised."""
        variant, world = self.variant, self.world
        before = self.stage.identities_of(world.state)
        argv = flags if flags is self.advised else [*variant.argv(world), *self.size_flags(), *flags]
        overwrites = OVERWRITE in argv and KEEP not in argv  # the last of the two wins
        is_new = not self.is_begun or overwrites or not variant.can_overwrite
        is_done = self.finished == before and not overwrites
        goes_on = self.consistent == before and (RESUME[0] in argv or not variant.is_resumed_by_flag)
        kept, self.advised = variant.kept_files(world.out) if is_done else None, None
        world.clear_log()
        outcome = self.run(world, variant.script, argv, list(actions), in_time)
        replaced = [action[1] for action in world.log if action[0] == "replace" and action[3] != "touched"]
        signals = [action[1] for action in world.log if action[0] == "end"]
        self.log.append(f"run {' '.join(flags[-2:])!r} {world.log} -> {outcome.status}")
        self.count(outcome)

        if outcome.status == 0:
            self.check_result(before, replaced)
        elif outcome.status == 2:
            self.check_error(outcome)
        elif signals and outcome.status in (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            self.check_signalled(outcome)
        elif "SIGKILL" not in signals or outcome.status != -signal.SIGKILL:
            self.fail(3, f"ended with status {outcome.status}: {outcome.errors[-3000:]}")
        is_due = (is_new or is_done or goes_on) and not replaced
        if is_due and not signals and outcome.status != 0:
            self.fail(4 if is_new else 3, f"was refused: {outcome.errors[-1000:]!r}")
        if is_done and not replaced and variant.kept_files(world.out) != kept:
            self.fail(2, "touched what was finished")
        for change in world.describe_changes():
            self.fail(5, change)
        if outcome.status != 0 and (outcome.status != 2 or replaced):  # else it was refused, without any change
            has_begun = not self.is_begun or self.advised is not None or self.consistent == before  # certainly
            self.consistent = before if is_due and has_begun else None
            self.finished = self.finished if is_done else None
        self.is_begun = True

    def count(self, outcome: Outcome) -> None:
        tally = self.stage.tally
        tally["runs"] += 1
        tally[f"status {outcome.status}"] += 1
        for word, *_, what in self.world.log:
            happened = {"end": what, "replace": "touched" if what == "touched" else "replaced"}[word]
            tally[f"{happened} during a run"] += 1

    def check_result(self, before: dict[str, str], replaced: list[str]) -> None:
        """Check that a result belongs to the inputs in its record, which are the current ones if nothing was
        replaced."""
        variant, world, identities = self.variant, self.world, self.stage.identities
        noted, now = variant.noted_inputs(world.out), self.stage.identities_of(world.state)
        self.consistent = self.finished = noted
        differing = {flag: (noted.get(flag), now[flag]) for flag in now if noted.get(flag) != now[flag]}
        if differing and not replaced:
            self.fail(2, f"its record has other inputs than there are: {differing}")
        if any(noted.get(flag) not in identities[flag] for flag in now):
            self.fail(1, f"its record has inputs that never were: {differing}")
            return
        state = {flag: identities[flag].index(identity) for flag, identity in noted.items()}
        result, clean = variant.result(world.out), self.stage.result_of(state, self.size_flags())
        if wrong := [name for name in clean if name not in result or result[name] != clean[name]]:
            self.fail(1, f"{wrong} are not those of its inputs {state}; on the disk is {world.state}")

    def check_signalled(self, outcome: Outcome) -> None:
        """Check that a run that was asked to end says in one line how to resume, if it had started its work."""
        script, lines = f"{self.variant.script}.py", self.lines_of(outcome)
        if "Traceback" in outcome.errors:
            self.fail(3, f"a traceback after a signal: {outcome.errors[-3000:]}")
        early = f"{script}: interrupted. Nothing is lost; run the same command again."
        if outcome.status == -signal.SIGTERM or lines == [early]:
            self.stage.tally[f"ended by a signal before the work, status {outcome.status}"] += 1
            return
        self.stage.tally["ended by a signal with advice"] += 1
        advice = r"resume with: accelerate launch \S+ (.*)"
        found = re.fullmatch(rf"{re.escape(script)}: interrupted\. .*; {advice}", lines[0])
        if len(lines) != 1 or not found:
            self.fail(3, f"how to resume is not said in one line: {outcome.errors[-1500:]!r}")
        if found := re.search(advice, outcome.errors):
            self.advised = shlex.split(found[1])

    def check_error(self, outcome: Outcome) -> None:
        lines = self.lines_of(outcome)
        if len(lines) != 1 or not lines[0].startswith(f"{self.variant.script}.py: error: ") or "--" not in lines[0]:
            self.fail(3, f"not one line that names a flag: {outcome.errors[-1500:]!r}")
        if "Traceback" in outcome.errors:
            self.fail(3, f"a traceback with an error: {outcome.errors[-3000:]}")

    def lines_of(self, outcome: Outcome) -> list[str]:
        """Return the script's own lines, without progress bars and warnings of libraries."""
        lines = re.split(r"[\r\n]+", outcome.errors)
        return [line for line in lines if re.search(rf"{self.variant.script}\.py: (error|interrupted)", line)] or [""]

    def fail(self, invariant: int, what: str) -> None:
        self.stage.tally[f"violations of {invariant}"] += 1
        self.log.append(f"  VIOLATION of {invariant}: {what}")
        self.violations.append(f"{invariant}: {what}")


# --- tests


@pytest.fixture(scope="module")
def stage_of(tmp_path_factory, tiny_pipeline_dir, classifiers, real_images_dir, request) -> Iterator[Callable]:
    """A function that returns the stage of a variant; at the end, the events on all stages are reported."""
    fixtures = {"pipeline": tiny_pipeline_dir, "classifier": Path(classifiers["vit"]), "real": real_images_dir}
    stages = {}

    def find(name: str) -> Stage:
        if name not in stages:
            folder, variant = tmp_path_factory.mktemp(name), VARIANTS[name]
            world = World(folder / "world", folder / "versions")
            variant.make_inputs(variant, world.versions, folder, world.root, fixtures)
            stages[name] = Stage(variant, world)
        return stages[name]

    yield find
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        for name, stage in stages.items():
            print(f"\n{name}: {dict(sorted(stage.tally.items()))}", end="")


@pytest.fixture
def begin(stage_of) -> Callable[[str], History]:
    return lambda name: History(stage_of(name), random.Random(0), run_in_process)


@pytest.fixture
def during(monkeypatch) -> Callable[..., None]:
    """Run an action in a history when a function, 'module:name', is called for the first time."""

    def arrange(target: str, history: History, *action) -> None:
        module, _, path = target.partition(":")
        owner, _, name = path.rpartition(".")
        owner = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
        original, waiting = getattr(owner, name), [list(action)]

        def wrapped(*args, **kwargs):
            if waiting:
                history.world.act(waiting.pop())
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    return arrange


@pytest.mark.parametrize(("name", "seed", "num_runs"), SHORT)
def test_after_a_short_history_each_result_is_that_of_its_inputs(name, seed, num_runs, stage_of):
    history = History(stage_of(name), random.Random(f"{name} {seed}"), run_in_process)
    history.play(num_runs)
    history.check()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", VARIANTS)
def test_after_any_history_each_result_is_that_of_its_inputs(name, seed, stage_of):
    history = History(stage_of(name), random.Random(f"{name} {seed}"), run_child)
    history.play(num_runs=4, in_time=seed % 3 == 2)
    history.check()


def test_a_run_that_takes_an_old_result_for_a_new_one_is_found(begin, monkeypatch):
    history = begin("dsi-folders")
    history.play_run([])
    history.act(["replace", "train_dir", 1, "same times"])
    monkeypatch.setattr("utils.cli.run_folder.RunFolder.differing_inputs", lambda folder: [])
    history.play_run([])
    assert [violation[0] for violation in history.violations] == ["2"]


def test_a_result_of_other_inputs_than_its_record_says_is_found(begin, during, monkeypatch):
    history = begin("dsi-folders")
    monkeypatch.setattr("utils.cli.run_folder.RunFolder.check_unchanged", lambda *_: None)
    during(LOADS_UNET, history, "replace", "pretrained_model_name_or_path", 1, "renamed")
    history.play_run([])
    assert [violation[0] for violation in history.violations] == ["1"]


# --- faults once found by the long form


LOADS_UNET, TRAINS = "utils.style.base_models:BaseModel.load_unet", "train_dsi:train"


def test_a_parquet_file_replaced_with_its_times_is_read_again(begin):
    history = begin("dsi-parquet")
    history.play_run([])
    history.act(["replace", "dataset_name", 1, "same times"])
    history.play_run([OVERWRITE])
    history.check()


@pytest.mark.parametrize(("flag", "version"), [("train_dir", 1), ("pretrained_model_name_or_path", 3)])
def test_no_latents_of_images_or_a_vae_that_were_replaced_meanwhile_are_kept(flag, version, begin, during):
    history = begin("dsi-folders")
    during("utils.style.latents:LatentCache.encode" if flag == "train_dir" else
           "utils.style.base_models:BaseModel.load_vae", history, "replace", flag, version, "swapped")  # fmt: skip
    history.play_run([])
    history.act(["replace", flag, 0, "swapped"])
    history.play_run([OVERWRITE])
    history.check()


@pytest.mark.parametrize(("flag", "version"), [("prompt_templates_file", 1), ("pretrained_model_name_or_path", 4)])
def test_a_token_is_of_the_texts_and_configs_that_its_record_names(flag, version, begin, during):
    history = begin("dsi-folders")
    during("train_dsi:identify_inputs", history, "replace", flag, version, "renamed")
    history.play_run([])
    history.check()


def test_cells_are_of_the_images_that_their_names_hold(begin, during):
    history = begin("compare-folders")
    during("compare_transfer:fill_in_learning_rates", history, "replace", "train_dir", 1, "renamed")
    history.play_run([])
    history.play_run([])
    history.check()


def test_a_set_that_grows_while_a_run_starts_is_known_by_its_new_contents(begin, during):
    history = begin("bridged-folders")
    during("train_bridged:identify_inputs", history, "replace", "synthetic_dataset", 2, "swapped")
    history.play_run([])
    history.play_run([])
    history.check()


def test_a_digest_is_not_cached_for_files_replaced_before_they_were_read(begin, monkeypatch):
    from utils.cli import contents

    history = begin("dsi-folders")
    history.act(["replace", "train_dir", 1, "swapped"])
    history.act(["replace", "train_dir", 0, "swapped"])
    time.sleep(contents.SECONDS_TO_SETTLE + 0.1)
    remembered, waiting = contents.cached_digest, [["replace", "train_dir", 1, "swapped"]]

    def replace_and_read(folder, names, read, what=""):
        def replaced():
            if waiting and Path(folder).name == "train_dir":
                history.world.act(waiting.pop())
            yield from read()

        return remembered(folder, names, replaced, what)

    monkeypatch.setattr(contents, "cached_digest", replace_and_read)
    history.play_run([])
    history.act(["replace", "train_dir", 0, "swapped"])
    history.play_run([OVERWRITE])
    history.check()


# a touch looks the same and must not cost a run; only hashing everything that is loaded would tell them apart
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="an input that is put back in time is not noticed")
def test_a_run_that_read_an_input_which_was_put_back_is_not_finished(begin, during):
    history = begin("dsi-folders")
    during(LOADS_UNET, history, "replace", "pretrained_model_name_or_path", 1, "swapped")
    during(TRAINS, history, "replace", "pretrained_model_name_or_path", 0, "swapped")
    history.play_run([])
    history.check()


@pytest.mark.parametrize("name", ["training_state.json", "learned_embeds.safetensors"])
def test_a_run_killed_while_it_removes_a_checkpoint_is_resumed(name, begin, monkeypatch):
    history = begin("dsi-folders")
    history.play_run([])

    def remove_a_file_and_die(folder, *_, **__):
        if (Path(folder) / name).exists():
            (Path(folder) / name).unlink()
            history.world.act(["end", "SIGKILL"])

    with monkeypatch.context() as patch:
        patch.setattr("utils.cli.run_folder.shutil.rmtree", remove_a_file_and_die)
        history.play_run([OVERWRITE])
    history.play_run(RESUME)
    history.check()


def test_a_replaced_generator_has_its_own_error_line(begin, during):
    history = begin("generate")
    during("utils.synthesis.runner:load_sampler", history, "replace", "generator", 1, "renamed")
    history.play_run([])
    history.check()


def test_shards_reported_as_kept_are_kept_by_the_advised_command(begin, during):
    history = begin("generate")
    during("utils.synthesis.runner:SharedProgress.finish", history, "end", "SIGTERM")
    history.play_run([OVERWRITE])
    shards = history.variant.kept_files(history.world.out)
    assert shards and history.advised[-1] == KEEP
    history.play_run(history.advised)
    assert history.variant.kept_files(history.world.out) == shards
