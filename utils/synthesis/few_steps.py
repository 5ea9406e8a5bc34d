"""Models and adapters distilled for few steps: how each kind is sampled, by its name, in one table. No torch."""

import re
from dataclasses import dataclass, field, replace

from utils.style.families import OWN_SCHEDULER

NO_GUIDANCE = 1.0


@dataclass(frozen=True)
class FewSteps:
    """How a distilled model is sampled; `why` says what tells that it is one.

    `scheduler` is a class of diffusers, made from the pipeline's own config but for `scheduler_config`. A
    `guidance_scale` of None is the user's: the denoiser takes the scale as an input, and no value leaves it out.
    """

    why: str
    scheduler: str = OWN_SCHEDULER
    num_inference_steps: int = 4
    guidance_scale: float | None = NO_GUIDANCE
    scheduler_config: dict = field(default_factory=dict)

    @property
    def flags(self) -> dict:
        """The values of flags that suit it."""
        scales = {} if self.guidance_scale is None else {"guidance_scale": [self.guidance_scale]}
        return {"num_inference_steps": self.num_inference_steps} | scales

    def choose(self, given: dict) -> tuple[dict, str]:
        """Return the flags that are not `given`, with the values that suit, and in one line what was chosen and why.

        Where given ones are known to draw noise or burnt images, the line says so.
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
                f"WARNING: {_as_flags(unfit)}: known to draw noise or burnt images where {self.why}; "
                f"{_as_flags({name: suited[name] for name in unfit})} suits it"
            )
        return chosen, ". ".join(parts)

    def _is_unfit(self, name: str, given: dict) -> bool:
        if name not in given:
            return False
        if name == "num_inference_steps":
            return given[name] > 4 * self.num_inference_steps
        # what is distilled without guidance takes a little of it
        return self.guidance_scale == NO_GUIDANCE and max(given[name]) > 2


def _as_flags(values: dict) -> str:
    def shown(value: object) -> str:
        return " ".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value)

    return " ".join(f"--{name} {shown(value)}" for name, value in values.items())


TRAILING = {"timestep_spacing": "trailing"}
# by what its repository, or the file in it, is called; the first that is found. From the models' own cards
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
    """Return how what is called so is sampled, a repository or a file in one; None where no name tells of few steps.

    A number of steps in the name is taken: `sdxl_lightning_8step_lora.safetensors`.
    """
    lowered = name.lower()
    for pattern, kind in KINDS:
        if re.search(pattern, lowered):
            steps = re.search(r"(?<!\d)(\d{1,2})[-_]?steps?", lowered)
            number = int(steps[1]) if steps else kind.num_inference_steps
            return replace(kind, why=f"the name {name} says", num_inference_steps=number)
    return None
