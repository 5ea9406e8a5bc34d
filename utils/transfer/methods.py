"""The methods as plans: which stages, from which weights, on which images, for how many steps. No torch."""

from dataclasses import dataclass, replace

METHODS = ("bridged", "vanilla", "mix", "synthetic_only")


@dataclass(frozen=True)
class StageSettings:
    """How one stage trains; `head_learning_rate_factor` multiplies the learning rate for the head."""

    max_steps: int
    learning_rate: float
    head_learning_rate_factor: float = 1.0
    mixup_alpha: float = 0.0
    batch_norm: str = "frozen"


@dataclass(frozen=True)
class StagePlan:
    """One stage. `images` is `real`, `synthetic` or `both`."""

    name: str
    images: str
    reset_head: bool
    settings: StageSettings

    @property
    def starts_from_bridge(self) -> bool:
        return self.name == "stage2"


def plan_stages(
    method: str,
    bridge_settings: StageSettings,
    settings: StageSettings,
    head_init: str = "reset",
    match_steps: bool = False,
) -> list[StagePlan]:
    """Return the stages of a method.

    `bridge_settings` go with synthetic images, `settings` with real ones; with both kinds together the steps are
    `settings`'. `match_steps` gives vanilla and mix the steps of both stages together.
    """
    if match_steps and method in ("vanilla", "mix"):
        settings = replace(settings, max_steps=bridge_settings.max_steps + settings.max_steps)
    stage1 = StagePlan("stage1", "synthetic", True, bridge_settings)
    return {
        "bridged": [stage1, StagePlan("stage2", "real", head_init == "reset", settings)],
        "synthetic_only": [stage1],
        "vanilla": [StagePlan("vanilla", "real", True, settings)],
        "mix": [StagePlan("mix", "both", True, settings)],
    }[method]
