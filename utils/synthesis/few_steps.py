"""Models and adapters distilled for few steps: how to sample each kind, by its name, in one table. No torch."""

import re
from dataclasses import dataclass, field, replace

from utils.style.families import OWN_SCHEDULER

NO_GUIDANCE = 1.0


@dataclass(frozen=True)
class FewSteps:
    """How to sample a distilled model; `why` is the evidence that it is one.

    `scheduler` is a class of diffusers, made from the pipeline's own config updated with `scheduler_config`. With a
    `guidance_scale` of None the user's applies: the denoiser takes the scale as an input, and no value turns it off.
    """

    why: str
    scheduler: str = OWN_SCHEDULER
    num_inference_steps: int = 4
    guidance_scale: float | None = NO_GUIDANCE
    scheduler_config: dict = field(default_factory=dict)

    @property
    def flags(self) -> dict:
        """The values of flags that suit the model."""
        scales = {} if self.guidance_scale is None else {"guidance_scale": [self.guidance_scale]}
        return {"num_inference_steps": self.num_inference_steps} | scales

    def choose(self, given: dict) -> tuple[dict, str]:
        """Return suitable values for the flags that are not `given`, and a line that says what was chosen and why.

        If given values are known to draw noise or oversaturated images, the line warns about them.
        """
        chosen = {name: value for name, value in self.flags.items() if name not in given}
        scheduler = {} if self.scheduler == OWN_SCHEDULER or "scheduler" in given else {"scheduler": self.scheduler}
        parts = [f"{_as_flags(scheduler | chosen)}, as {self.why}"] if scheduler or chosen else []
        unfit = {name: given[name] for name in ("num_inference_steps", "guidance_scale") if self._is_unfit(name, given)}
        if "scheduler" in given and self.scheduler not in (OWN_SCHEDULER, given["scheduler"]):
            unfit["scheduler"] = given["scheduler"]
        if unfit:
            suited = {"scheduler": self.scheduler} | self.flags
            parts.append(
                f"WARNING: {_as_flags(unfit)}: known to draw noise or oversaturated images, as {self.why}; "
                f"try {_as_flags({name: suited[name] for name in unfit})}"
            )
        return chosen, ". ".join(parts)

    def _is_unfit(self, name: str, given: dict) -> bool:
        if name not in given:
            return False
        if name == "num_inference_steps":
            return given[name] > 4 * self.num_inference_steps
        # models distilled without guidance tolerate a little of it
        return self.guidance_scale == NO_GUIDANCE and max(given[name]) > 2


def _as_flags(values: dict) -> str:
    def shown(value: object) -> str:
        return " ".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value)

    return " ".join(f"--{name} {shown(value)}" for name, value in values.items())


TRAILING = {"timestep_spacing": "trailing"}
# by the name of the repository or file; the first match counts. From the models' own cards
KINDS = (
    # Hyper-SD's with guidance: 8 or 12 steps
    (r"hyper.*cfg", FewSteps("", "DDIMScheduler", 8, 5.0, TRAILING)),
    (r"hyper.*(?<!\d)1[-_]?step", FewSteps("", "TCDScheduler", 1)),
    (r"hyper", FewSteps("", "DDIMScheduler", 4, scheduler_config=TRAILING)),
    (r"lightning", FewSteps("", "EulerDiscreteScheduler", 4, scheduler_config=TRAILING)),
    (r"(?<![a-z])lcm|consistency", FewSteps("", "LCMScheduler", 4)),
    (r"(?<![a-z])tcd", FewSteps("", "TCDScheduler", 4)),
    (r"(?<![a-z])dmd", FewSteps("", "LCMScheduler", 4)),
    (r"(?<![a-z])pcm", FewSteps(
        "", "DDIMScheduler", 4, scheduler_config=TRAILING | {"clip_sample": False, "set_alpha_to_one": False}
    )),
    (r"turbo", FewSteps("", "EulerAncestralDiscreteScheduler", 4, scheduler_config=TRAILING)),
    (r"schnell", FewSteps("", OWN_SCHEDULER, 4)),
)  # fmt: skip


def find_few_steps(name: str) -> FewSteps | None:
    """Return how to sample a repository or file of this name; None if the name says nothing about few steps.

    A number of steps in the name is used: `sdxl_lightning_8step_lora.safetensors`.
    """
    lowered = name.lower()
    for pattern, kind in KINDS:
        if re.search(pattern, lowered):
            steps = re.search(r"(?<!\d)(\d{1,2})[-_]?steps?", lowered)
            number = int(steps[1]) if steps else kind.num_inference_steps
            return replace(kind, why=f"the name {name} says", num_inference_steps=number)
    return None
