"""The sampling settings that benchmarks.generate_quality compares, their measurements, and the one to use."""

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from utils.comparison.statistics import Gain
from utils.style.families import FAST_SCHEDULER, OWN_SCHEDULER

ROOT = Path(__file__).parents[1]
GUIDANCE, NO_GUIDANCE = 1.2, 1.0
INTERVAL = "0.2 0.8"
UNIPC = "UniPCMultistepScheduler"
ADAPTER = "demo/few_steps"  # distilled for three steps without guidance
MAX_FRECHET_ABOVE = 0.05  # of the loop's setting
LOOP_FLAGS = {"scheduler": OWN_SCHEDULER, "num_inference_steps": 12, "guidance_scale": GUIDANCE}


@dataclass(frozen=True)
class Setting:
    """A row of the table: its name, its line (`series`) in the plot, and the flags of generate_synthetic.py.

    Flags that an adapter sets by itself are left out.
    """

    name: str
    series: str
    flags: dict = field(hash=False)

    @property
    def num_steps(self) -> int:
        return self.flags["num_inference_steps"]

    @property
    def words(self) -> list[str]:
        """The flags as words of a command line."""
        return [word for name, value in self.flags.items() for word in (f"--{name}", *str(value).split())]

    @property
    def adapter(self) -> Path | None:
        """The folder of its adapter; None without one."""
        return ROOT / self.flags["lora"] if "lora" in self.flags else None


def _rows(name: str, series: str, scheduler: str, steps: tuple[int, ...], guidance_scale: float) -> list[Setting]:
    """Return a setting for each number of steps."""
    suffix, title = ("-guided", f", guidance {guidance_scale}") if guidance_scale > 1 else ("", ", no guidance")
    return [
        Setting(
            f"{name}-{number}{suffix}", f"{series}{title}",
            {"scheduler": scheduler, "num_inference_steps": number, "guidance_scale": guidance_scale},
        )
        for number in steps
    ]  # fmt: skip


LOOP = Setting("loop", "DDIM, guidance 1.2 (the loop's)", LOOP_FLAGS)
SETTINGS = (
    LOOP,
    *_rows("ddim", "DDIM", OWN_SCHEDULER, (12, 8, 6, 4), NO_GUIDANCE),
    Setting(
        "ddim-12-interval", "DDIM, guidance 1.2 from 0.2 to 0.8", LOOP_FLAGS | {"guidance_interval": INTERVAL}
    ),
    *_rows("dpm", "DPM-Solver++ 2M", FAST_SCHEDULER, (8, 6, 4), GUIDANCE),
    *_rows("dpm", "DPM-Solver++ 2M", FAST_SCHEDULER, (8, 6, 4), NO_GUIDANCE),
    *_rows("unipc", "UniPC", UNIPC, (8, 6, 4), GUIDANCE),
    *_rows("unipc", "UniPC", UNIPC, (8, 6, 4), NO_GUIDANCE),
    *(
        Setting(f"adapter-{number}", "distilled adapter, no guidance", {"lora": ADAPTER, "num_inference_steps": number})
        for number in (4, 3, 2)
    ),
    Setting(
        "adapter-3-lcm", "distilled adapter, no guidance, LCM",
        {"lora": ADAPTER, "num_inference_steps": 3, "scheduler": "LCMScheduler"},
    ),
)  # fmt: skip


def select_settings(names: list[str] | None) -> tuple[list[Setting], list[Setting]]:
    """Return the settings with these names (None: all), the loop's first, and those left out as an adapter is missing.

    Raises:
        ValueError: a name is unknown.
    """
    known = {setting.name: setting for setting in SETTINGS}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"--settings {unknown[0]}: unknown; choose from {', '.join(known)}.")
    wanted = {LOOP.name, *(known if names is None else names)}
    chosen = [setting for setting in SETTINGS if setting.name in wanted]
    lacking = [setting for setting in chosen if setting.adapter is not None and not setting.adapter.is_dir()]
    return [setting for setting in chosen if setting not in lacking], lacking


@dataclass(frozen=True)
class Result:
    """The measurements of a setting; lists, also in `scores`, have an entry for each seed.

    `times` is the speed as a multiple of the plain loop's at that time, `accuracies` are in percent. `gain` is the
    paired difference in accuracy to the loop's setting. `scores` are those of `quality_scores.Judge.measure`.
    """

    setting: Setting
    speeds: list[float]
    times: list[float]
    accuracies: list[float]
    gain: Gain
    scores: dict[str, list[float]]

    @property
    def speed(self) -> float:
        """The speed as a multiple of the plain loop's, the median over seeds; robust to other load on the machine."""
        return statistics.median(self.times)

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def frechet(self) -> float:
        return self.mean("frechet")

    def mean(self, score: str) -> float:
        return statistics.fmean(self.scores[score])


def deviation(values: list[float]) -> float | None:
    """Return the standard deviation over seeds; None for one seed."""
    return statistics.stdev(values) if len(values) > 1 else None


def pareto_front(results: list[Result], quality: Callable[[Result], float]) -> list[Result]:
    """Return the results that no other beats in both speed and `quality`, from the slowest to the fastest.

    Of equal results, all are returned.
    """

    def is_beaten(result: Result) -> bool:
        return any(
            other.speed >= result.speed and quality(other) >= quality(result)
            and (other.speed, quality(other)) != (result.speed, quality(result))
            for other in results
        )  # fmt: skip

    return sorted((result for result in results if not is_beaten(result)), key=lambda result: result.speed)


def find_loop(results: list[Result]) -> Result:
    return next(result for result in results if result.setting.name == LOOP.name)


def is_good_enough(result: Result, loop: Result) -> bool:
    """Return whether accuracy is not below the loop's setting, and Frechet distance at most 5 % higher."""
    return result.gain.mean >= 0 and result.frechet <= (1 + MAX_FRECHET_ABOVE) * loop.frechet


def choose(results: list[Result]) -> Result:
    """Return the fastest setting that is good enough, if necessary the loop's."""
    loop = find_loop(results)
    return max((result for result in results if is_good_enough(result, loop)), key=lambda result: result.speed)


def describe_choice(results: list[Result]) -> tuple[str, str]:
    """Return a sentence in Markdown that names the setting to use, and the reasons in a second text."""
    chosen, loop = choose(results), find_loop(results)
    num_seeds = len(loop.accuracies)
    seeds = f"{num_seeds} paired seeds" if num_seeds > 1 else "one seed"
    rule = (
        f"whose mean accuracy over {seeds} is not below that of the loop's setting, and whose Frechet distance is "
        f"at most {100 * MAX_FRECHET_ABOVE:.0f} % higher"
    )
    if chosen == loop:
        answer = f"**Stay with the loop's setting** (`{shlex.join(LOOP.words)}`)."
        return answer, f"Among the {len(results) - 1} others no faster one was found {rule}."
    answer = (
        f"**Take `{shlex.join(chosen.setting.words)}`**: {chosen.speed:.1f} times the plain loop's images/s, at an "
        f"accuracy of {chosen.accuracy:.1f} % ({chosen.gain} points over the loop's setting) and a Frechet distance "
        f"of {chosen.frechet:.0f} ({chosen.frechet / loop.frechet - 1:+.1%})."
    )
    reason = f"It is the fastest of {len(results)} settings {rule}."
    if chosen.gain.low is not None and chosen.gain.low < 0:
        reason += f" Its interval does not rule out a loss of {-chosen.gain.low:.1f} points."
    return answer, reason


def list_rows(results: list[Result], floor: dict[str, float]) -> list[dict[str, str]]:
    """Return the table: one row per setting, the chosen one in bold, and one for real images with scores `floor`."""
    chosen, loop = choose(results), find_loop(results)
    rows = []
    for result in results:
        mark = "**" if result == chosen else ""
        spread = deviation(result.accuracies)
        rows.append({
            "setting": f"{mark}{result.setting.name}{mark}",
            "images/s": f"{statistics.median(result.speeds):.1f}",
            "s per 1,000": f"{1000 / statistics.median(result.speeds):.1f}",
            "times the loop's": f"{mark}{result.speed:.2f}{mark} ({min(result.times):.2f} to {max(result.times):.2f})",
            "accuracy, %": f"{result.accuracy:.1f}" + ("" if spread is None else f" ± {spread:.1f}"),
            "to the loop's setting": "" if result == loop else str(result.gain),
            "Frechet": f"{result.frechet:.0f} ({result.frechet / loop.frechet - 1:+.1%})",
            **{name: f"{result.mean(name):.3f}" for name in ("kernel", "precision", "recall", "diversity")},
        })  # fmt: skip
    real = {"setting": "real images", "Frechet": f"{floor['frechet']:.0f}"}
    real |= {name: f"{floor[name]:.3f}" for name in ("kernel", "precision", "recall", "diversity")}
    return [*rows, {name: real.get(name, "") for name in rows[0]}]
