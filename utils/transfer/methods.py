"""The methods: which stages on which images, from which weights, for how many steps. No torch.

A method is a row of `METHODS`; train_bridged.py and compare_transfer.py look it up by name. `plan_stages` turns a row
and the settings of its stages into the stages to be trained.
"""

import math
from dataclasses import asdict, dataclass, field, replace

from utils.cli.errors import UserError

HEAD_INITS = ("reset", "keep", "imprint", "probe")
ONE_KIND_NORMS = ("frozen", "train", "recalibrate")
BATCH_NORM_MODES = (*ONE_KIND_NORMS, "domain")  # "domain" only if a stage replays
ALIGNMENTS = ("adversarial", "coral", "none")
AUGMENTATIONS = ("robust", "basic", "trivialaugment", "randaugment")
CLASS_WEIGHTS = ("balanced",)
REPLAY_IMAGES = 6.0  # real images per class at which half of what is seen is synthetic
HEAD_FACTOR = 10.0  # a fresh head's learning rate over the rest's
SETTINGS_OF_BOTH_STAGES = (
    "learning_rate", "weight_decay", "warmup_steps", "per_device_train_batch_size", "dropout", "drop_path_rate",
    "random_flip",
)  # fmt: skip
SETTINGS_OF_EACH_STAGE = (
    "num_train_epochs", "max_steps", "head_learning_rate", "head_warmup_steps", "freeze_backbone", "mixup_alpha",
    "label_smoothing_factor", "augmentation", "batch_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Alignment:
    """How a stage on synthetic images aligns their features with those of unlabelled real images.

    `kind` is `adversarial` or `coral`. `weight`, above 0, scales its gradients on the features relative to those of the
    classification loss.
    """

    kind: str
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One stage of a method.

    `images` is `real`, `synthetic`, `both`, or `replayed`: real images with a share of synthetic ones in each batch.
    `start` is the stage whose weights it takes (None: the pretrained checkpoint), `head_init` one of `HEAD_INITS`.
    `settings` override the defaults for a stage on such images. With `is_matched`, a stage takes the steps of a stage
    on synthetic images in addition to its own. With `guarded_by_probe`, the share of synthetic images in a stage that
    replays depends on what they add, measured before the first stage. `mix_ratio` is the number of synthetic images per
    real one in a stage on both; None takes each image once. With an `alignment`, a stage on synthetic images also sees
    the real training images, unlabelled. `average` is the share of its weights in the result, in (0, 1); the rest are
    the weights of `start`, whose head it must keep (WiSE-FT, Wortsman et al. 2022). A stage with `max_steps` 0 only
    initialises its head.
    """

    name: str
    images: str
    start: str | None = None
    head_init: str = "reset"
    settings: dict = field(default_factory=dict)
    is_matched: bool = False
    guarded_by_probe: bool = False
    mix_ratio: float | None = None
    alignment: Alignment | None = None
    average: float | None = None

    @property
    def takes_steps(self) -> bool:
        return self.settings.get("max_steps") != 0


@dataclass(frozen=True)
class Method:
    """A row of the table: a description and the stages in order; the last stage's model is the result."""

    description: str
    stages: tuple[Stage, ...]

    @property
    def kinds(self) -> set[str]:
        """The `images` of its stages: `real`, `synthetic`, `both`, `replayed`."""
        return {stage.images for stage in self.stages}

    @property
    def trains_on_real(self) -> bool:
        """Whether a stage learns from real images with their labels."""
        return bool(self.kinds & {"real", "both", "replayed"})

    @property
    def uses_real(self) -> bool:
        """Whether its result depends on the real training images, labelled or not."""
        return self.trains_on_real or self.alignment is not None

    @property
    def uses_synthetic(self) -> bool:
        return bool(self.kinds & {"synthetic", "both", "replayed"})

    @property
    def takes_steps(self) -> bool:
        return any(stage.takes_steps for stage in self.stages)

    @property
    def takes_recipe(self) -> bool:
        """Whether it takes optimiser steps on real images."""
        return self.uses_real and self.takes_steps

    @property
    def mix_ratio(self) -> float | None:
        return next((stage.mix_ratio for stage in self.stages if stage.images == "both"), None)

    @property
    def alignment(self) -> Alignment | None:
        return next((stage.alignment for stage in self.stages if stage.alignment is not None), None)

    @property
    def without_synthetic(self) -> "Method":
        """The method if a guard leaves the synthetic images out: on real images, from the head of a probe.

        A head init that needs no synthetic images stays as it is.
        """
        stages = []
        for stage in self.stages:
            if stage.images != "synthetic":
                head_init = "probe" if stage.head_init == "keep" else stage.head_init
                stages.append(replace(stage, images="real", start=None, head_init=head_init, average=None))
        return replace(self, stages=tuple(stages))

    @property
    def flags(self) -> dict:
        """The row's values for the flags of train_bridged.py that concern the whole method."""
        average = self.stages[-1].average  # records of methods without one have no such entry
        return {
            "head_init": self.stages[-1].head_init,
            "match_steps": any(stage.is_matched for stage in self.stages),
            "mix_ratio": self.mix_ratio,
        } | ({} if average is None else {"average": average})

    def with_flags(self, given: dict) -> "Method":
        """Return the method with the given flags, as name -> value, overriding its row.

        `--head_init` applies to stages that start from another one, `--match_steps` to methods without a stage on
        synthetic images alone, `--mix_ratio` to stages on both kinds, `--bridge_alignment` and its weight to stages on
        synthetic images alone, `--average` to the last stage. The settings of a stage that takes no steps stay.
        """
        stages = []
        for stage in self.stages:
            prefix = "bridge_" if stage.images == "synthetic" else ""
            kept = {name: value for name, value in stage.settings.items() if f"{prefix}{name}" not in given}
            if stage.takes_steps:
                stage = replace(stage, settings=kept)
            if stage.start is not None and "head_init" in given:
                stage = replace(stage, head_init=given["head_init"])
            if "synthetic" not in self.kinds and "match_steps" in given and stage.takes_steps:
                stage = replace(stage, is_matched=given["match_steps"])
            if stage.images == "both" and "mix_ratio" in given:
                stage = replace(stage, mix_ratio=given["mix_ratio"])
            if stage.images == "synthetic" and "bridge_alignment" in given:
                kind = given["bridge_alignment"]
                stage = replace(stage, alignment=None if kind == "none" else Alignment(kind))
            if stage.alignment is not None and "bridge_alignment_weight" in given:
                weighted = replace(stage.alignment, weight=given["bridge_alignment_weight"])
                stage = replace(stage, alignment=weighted)
            stages.append(stage)
        if "average" in given:
            stages[-1] = replace(stages[-1], average=given["average"])
        return replace(self, stages=tuple(stages))


STAGE_1 = Stage("stage1", "synthetic")
STAGE_2 = Stage("stage2", "real", start="stage1")
VANILLA = Stage("vanilla", "real")
MATCHED = replace(VANILLA, is_matched=True)
MIX = Stage("mix", "both", is_matched=True)
NO_MIXUP, MIXUP = {"mixup_alpha": 0.0}, {"mixup_alpha": 0.2}
PROBE = Stage("probe", "real", head_init="probe", settings={"max_steps": 0})
REPLAY = replace(STAGE_2, images="replayed", head_init="keep", settings=MIXUP, guarded_by_probe=True)

METHODS = {
    "bridged": Method(
        "synthetic images with Mixup, then real ones with a fresh head (the paper's Bridged Transfer++)",
        (STAGE_1, STAGE_2),
    ),
    "bridged_keep": Method("bridged with the head of stage 1", (STAGE_1, replace(STAGE_2, head_init="keep"))),
    "bridged_imprint": Method(
        "bridged with a head of class means of features", (STAGE_1, replace(STAGE_2, head_init="imprint"))
    ),
    "bridged_replay": Method(
        "bridged_keep with Mixup 0.2 in both stages and synthetic images among the real ones of stage 2; the more real "
        "images there are, and the less synthetic ones add, the smaller their share in both stages",
        (STAGE_1, REPLAY),
    ),
    "bridged_unguarded": Method(
        "bridged_replay without measuring what the synthetic images add",
        (STAGE_1, replace(REPLAY, guarded_by_probe=False)),
    ),
    "bridged_domain_norm": Method(
        "bridged_replay with separate BatchNorm statistics for real and synthetic images in stage 2",
        (STAGE_1, replace(REPLAY, settings=MIXUP | {"batch_norm": "domain"})),
    ),
    "bridged_adversarial": Method(
        "bridged_keep whose stage 1 also aligns features with those of the real images, unlabelled, by a domain "
        "classifier",
        (replace(STAGE_1, alignment=Alignment("adversarial")), replace(STAGE_2, head_init="keep")),
    ),
    "bridged_coral": Method(
        "bridged_keep whose stage 1 also aligns features with those of the real images, unlabelled, by their "
        "covariances",
        (replace(STAGE_1, alignment=Alignment("coral")), replace(STAGE_2, head_init="keep")),
    ),
    "bridged_head_warmup": Method(
        "bridged with a fresh head that is trained alone in the first half of stage 2",
        (STAGE_1, replace(STAGE_2, settings={"head_warmup_steps": 0.5})),
    ),
    "bridged_no_mixup": Method("bridged without Mixup", (replace(STAGE_1, settings=NO_MIXUP), STAGE_2)),
    "bridged_plain": Method(
        "the paper's plain variant: head of stage 1, no Mixup",
        (replace(STAGE_1, settings=NO_MIXUP), replace(STAGE_2, head_init="keep")),
    ),
    "bridged_recalibrate": Method(
        "bridged with BatchNorm statistics measured on the real images before stage 2",
        (STAGE_1, replace(STAGE_2, settings={"batch_norm": "recalibrate"})),
    ),
    "vanilla": Method("real images only, for the steps of stage 2", (VANILLA,)),
    "vanilla_matched": Method("real images only, for the steps of both stages", (MATCHED,)),
    "vanilla_mixup": Method("vanilla_matched with Mixup 0.2", (replace(MATCHED, settings=MIXUP),)),
    "mix": Method("real and synthetic images in one stage, each once per epoch, for the steps of both stages", (MIX,)),
    "mix_mixup": Method("mix with Mixup 0.2", (replace(MIX, settings=MIXUP),)),
    "mix_balanced": Method(
        "mix with real images repeated to match the number of synthetic ones", (replace(MIX, mix_ratio=1.0),)
    ),
    "synthetic_only": Method("stage 1 alone", (STAGE_1,)),
    "linear_probe": Method(
        "logistic regression on the features of the pretrained network, which is not trained", (PROBE,)
    ),
    "lp_ft": Method(
        "vanilla_mixup from the head of linear_probe (LP-FT)",
        (replace(MATCHED, head_init="probe", settings=MIXUP),),
    ),
    "wise_ft": Method(
        "bridged_keep with the mean of the weights of both stages (WiSE-FT)",
        (STAGE_1, replace(STAGE_2, head_init="keep", average=0.5)),
    ),
    "ema": Method(
        "vanilla_mixup with an exponential moving average of the weights",
        (replace(MATCHED, settings=MIXUP | {"ema_decay": 0.999}),),
    ),
}

DEFAULT_METHOD = "bridged_replay"


def describe_methods() -> str:
    """Return the table as `--help` prints it, one row per line."""
    width = max(map(len, METHODS))
    return "\n".join(["Methods:", "", *(f"    {name:{width}}  {row.description}" for name, row in METHODS.items())])


def stage_names() -> tuple[str, ...]:
    """Return the names of all stages, each after the name of its head warm-up."""
    names = dict.fromkeys(stage.name for method in METHODS.values() for stage in method.stages)
    return tuple(f"{name}{part}" for name in names for part in ("_head", ""))


@dataclass(frozen=True)
class StageSettings:
    """How one stage trains.

    `head_learning_rate_factor` multiplies the learning rate for the head; for `plan_stages`, None means `HEAD_FACTOR`
    for a fresh head and 1 otherwise. `head_warmup_steps` train the head alone first (LP-FT, Kumar et al. 2022): this
    many additional steps or, below 1, this share of `max_steps`. `warmup_steps` below 1 are a share of all steps. None
    for `dropout` or `drop_path_rate` keeps the checkpoint's. `ema_decay`, in (0, 1), is the decay of a moving average
    of the weights; None keeps the weights of the last step. `class_weights` is `balanced`, or None for equal weights.
    """

    max_steps: int
    learning_rate: float
    head_learning_rate_factor: float | None = 1.0
    mixup_alpha: float = 0.0
    batch_norm: str = "frozen"
    label_smoothing_factor: float = 0.0
    augmentation: str = "robust"
    random_flip: bool = True
    head_warmup_steps: float = 0
    freeze_backbone: bool = False
    dropout: float | None = None
    drop_path_rate: float | None = None
    per_device_train_batch_size: int = 32
    weight_decay: float = 0.01
    warmup_steps: float = 0.1
    ema_decay: float | None = None
    class_weights: str | None = None

    def to_dict(self) -> dict:
        """Return the entries for records; newer ones only if set, so records of earlier versions stay the same."""
        later = ("ema_decay", "class_weights")
        return {name: value for name, value in asdict(self).items() if name not in later or value is not None}


@dataclass(frozen=True)
class StagePlan:
    """A stage with its final settings; `images`, `head_init`, `start` and `average` are as in `Stage`.

    `synthetic_share` is the share of each batch if images are replayed. With an `average`, the rest are the weights of
    the stage `averaged_with`.
    """

    name: str
    images: str
    head_init: str
    settings: StageSettings
    start: str | None = None
    synthetic_share: float | None = None
    alignment: Alignment | None = None
    guarded_by_probe: bool = False
    average: float | None = None
    averaged_with: str | None = None

    def to_dict(self) -> dict:
        """Return the entries for records; newer fields only if used, so records of earlier versions stay the same."""
        later = {
            "synthetic_share": None, "alignment": None, "guarded_by_probe": False, "average": None,
            "averaged_with": None,
        }  # fmt: skip
        entries = asdict(self) | {"settings": self.settings.to_dict()}
        return {name: value for name, value in entries.items() if name not in later or value != later[name]}


def plan_stages(
    method: Method, bridge_settings: StageSettings, settings: StageSettings, images_per_class: float | None = None,
    weight: float = 1.0,
) -> list[StagePlan]:  # fmt: skip
    """Return the stages of a method, in order; the last is the result.

    `bridge_settings` are for synthetic images, `settings` for real images and for both kinds together; the settings of
    a row override them. A head warm-up is a separate stage, `<name>_head`. Only the last stage has a moving average. A
    method that replays adds up the steps of both settings and divides them according to the number of real images per
    class and the `weight` of the synthetic ones, in [0, 1], which a guard measures. With weight 0, all steps are on
    real images.
    """
    stages, share = [], None
    if "replayed" in method.kinds:
        share = replayed_share(images_per_class, weight)
        num_steps = bridge_settings.max_steps + settings.max_steps
        num_first = max(1, round(min(share, 0.5) * num_steps)) if share > 0 else 0
        bridge_settings = replace(bridge_settings, max_steps=num_first)
        settings = replace(settings, max_steps=max(1, num_steps - num_first))
        method = method if share > 0 else method.without_synthetic
    for stage in method.stages:
        own = replace(bridge_settings if stage.images == "synthetic" else settings, **stage.settings)
        if share == 0 and own.batch_norm == "domain":  # only one domain is left
            own = replace(own, batch_norm="frozen")
        if stage.is_matched:
            own = replace(own, max_steps=own.max_steps + sum(_split_steps(bridge_settings)))
        if stage is not method.stages[-1]:
            own = replace(own, ema_decay=None)
        if not stage.takes_steps:  # other settings have no effect
            own = StageSettings(0, 0.0, batch_norm=own.batch_norm)
        num_warmup_steps, num_steps = _split_steps(own)
        own = replace(own, max_steps=num_steps, head_warmup_steps=0)
        plan = StagePlan(
            stage.name, stage.images, stage.head_init, own, stage.start,
            share if stage.images == "replayed" or share == 0 else None, stage.alignment, stage.guarded_by_probe,
            average=stage.average, averaged_with=None if stage.average is None else stage.start,
        )  # fmt: skip
        if num_warmup_steps > 0:
            own = replace(own, max_steps=num_warmup_steps, freeze_backbone=True, ema_decay=None)
            # frozen features cannot be aligned
            warmup = replace(
                plan, name=f"{stage.name}_head", settings=own, alignment=None, average=None, averaged_with=None
            )
            stages += [warmup, replace(plan, head_init="keep", start=warmup.name)]
        else:
            stages.append(plan)
    return [_with_head_factor(stage) for stage in stages]


def replayed_share(images_per_class: float, weight: float = 1.0) -> float:
    """Return the share of synthetic images in [0, 1), for a number of real images per class and a weight in [0, 1]."""
    return weight * REPLAY_IMAGES / (weight * REPLAY_IMAGES + images_per_class)


def describe_shares(stages: list[StagePlan], images_per_class: float) -> str:
    """Return in words how a method that replays divides its steps and batches between kinds of images."""
    num_steps = sum(stage.settings.max_steps for stage in stages)
    num_first = sum(stage.settings.max_steps for stage in stages if stage.images == "synthetic")
    images = "image" if images_per_class == 1 else "images"
    real = f"{images_per_class:g} real {images} per class (median)"
    if num_first == 0:
        return f"{real}: all {num_steps} steps on real images"
    return (
        f"{real}: of {num_steps} steps {num_first} on synthetic images alone, then {num_steps - num_first} on batches "
        f"of real images with {percent(stages[-1].synthetic_share)} synthetic ones"
    )


def percent(share: float) -> str:
    """Return a share in [0, 1] as `27 %`."""
    return f"{100 * share:.0f} %"


def _split_steps(settings: StageSettings) -> tuple[int, int]:
    """Return the steps of the head warm-up, and the steps of all weights after it."""
    if settings.head_warmup_steps < 1:
        num_steps = int(settings.head_warmup_steps * settings.max_steps)
        return num_steps, settings.max_steps - num_steps
    return int(settings.head_warmup_steps), settings.max_steps


def with_fresh_head(stage: StagePlan) -> StagePlan:
    """Return the stage with a fresh head instead of its head init."""
    return _with_head_factor(
        replace(stage, head_init="reset", settings=replace(stage.settings, head_learning_rate_factor=None))
    )


def _with_head_factor(stage: StagePlan) -> StagePlan:
    if stage.settings.head_learning_rate_factor is not None:
        return stage
    factor = HEAD_FACTOR if stage.head_init == "reset" else 1.0
    return replace(stage, settings=replace(stage.settings, head_learning_rate_factor=factor))


def steps_per_epoch(num_images: int, images_per_batch: int, accumulation: int = 1, drop_last: bool = False) -> int:
    """Return the optimiser steps of one epoch, with `accumulation` batches per step, over all processes.

    With `drop_last`, an epoch has only whole batches.
    """
    num_batches = num_images // images_per_batch if drop_last else math.ceil(num_images / images_per_batch)
    return math.ceil(num_batches / accumulation)


def mix_indices(num_real: int, num_synthetic: int, ratio: float | None) -> list[int]:
    """Return the rows of one epoch over real images followed by synthetic ones, `ratio` synthetic for each real one.

    Images of the kind with too few for the ratio are repeated; a ratio of None takes each image once.
    """
    num_real_rows, num_synthetic_rows = num_real, num_synthetic
    if ratio is not None:
        num_real_rows = max(num_real, round(num_synthetic / ratio))
        num_synthetic_rows = max(num_synthetic, round(num_real * ratio))
    real_rows = [row % num_real for row in range(num_real_rows)]
    return real_rows + [num_real + row % num_synthetic for row in range(num_synthetic_rows)]


def stage_settings(
    method: Method, flags: dict, num_images: dict[str, int], num_processes: int
) -> tuple[StageSettings, StageSettings]:
    """Return the settings on synthetic and on real images (for mix, on both kinds), with epochs turned into steps.

    `flags` maps the flags of train_bridged.py to values; a `bridge_` flag of a setting for both stages defaults to the
    flag without the prefix. `num_images` counts the images by kind: `real`, `synthetic`, `both`.
    """
    real = {name: flags[name] for name in (*SETTINGS_OF_BOTH_STAGES, *SETTINGS_OF_EACH_STAGE)}
    bridge = {name: flags[f"bridge_{name}"] for name in SETTINGS_OF_EACH_STAGE}
    for name in SETTINGS_OF_BOTH_STAGES:
        value = flags.get(f"bridge_{name}")
        bridge[name] = real[name] if value is None else value
    real["ema_decay"] = flags.get("ema_decay")
    real["class_weights"] = bridge["class_weights"] = flags.get("class_weights")
    kind = "real"
    if "both" in method.kinds and not method.flags["match_steps"]:
        kind = "both"
        real |= {name: bridge[name] for name in ("num_train_epochs", "max_steps")}

    def build(num_train_epochs, max_steps, head_learning_rate, num_images: int, **values) -> StageSettings:
        if max_steps is None or max_steps <= 0:
            images_per_batch = values["per_device_train_batch_size"] * num_processes
            per_epoch = steps_per_epoch(
                num_images, images_per_batch, flags["gradient_accumulation_steps"], flags["dataloader_drop_last"]
            )
            max_steps = max(1, round(num_train_epochs * per_epoch))
        factor = None if head_learning_rate is None else head_learning_rate / values["learning_rate"]
        return StageSettings(max_steps, head_learning_rate_factor=factor, **values)

    return build(num_images=num_images.get("synthetic", 0), **bridge), build(num_images=num_images[kind], **real)


def check_average(method: Method, use_peft: bool) -> None:
    """Check that a method that averages weights can do so.

    Raises:
        UserError: no two stages share their head, or an adapter is trained.
    """
    last = method.stages[-1]
    if last.average is None:
        return
    flag = f"--average {last.average:g} (given, or from --method wise_ft)"
    if last.start is None or last.head_init != "keep":
        raise UserError(
            f"{flag}: needs a second stage that starts from the head of the first; give --method bridged_keep or "
            "--head_init keep."
        )
    if use_peft:
        raise UserError(
            f"{flag}: not possible with --use_peft, as the mean of two adapters is not the adapter of the mean."
        )


def check_stages(
    stages: list[StagePlan], flags: dict, num_images: dict[str, int], num_classes: int, num_processes: int
) -> None:
    """Check, before the first stage trains, the flags that depend on the numbers of images, steps and classes.

    Raises:
        UserError: a stage has no whole batch or only warm-up steps, nothing would be evaluated, or a metric needs more
            classes.
    """
    for stage in stages:
        if stage.settings.max_steps == 0:  # it only initialises its head
            continue
        batch_size, number = stage.settings.per_device_train_batch_size, num_images[stage.images]
        # endless sources have only full batches
        is_endless = stage.images == "replayed" or stage.alignment is not None
        is_endless |= flags["streaming"] and stage.images == "synthetic"
        if flags["dataloader_drop_last"] and not is_endless and number < batch_size * num_processes:
            raise UserError(
                f"--dataloader_drop_last: {stage.name} would take no step: its {number} images are less than one batch "
                f"({batch_size} on each of {num_processes} processes); give a smaller --per_device_train_batch_size."
            )
        warmup_steps, max_steps = stage.settings.warmup_steps, stage.settings.max_steps
        if 1 < max_steps <= warmup_steps:
            raise UserError(
                f"--warmup_steps {warmup_steps:g}: {stage.name} has {max_steps} steps, so the learning rate never "
                "reaches its peak; give fewer warm-up steps, or a share below 1."
            )
    most_steps = max(stage.settings.max_steps for stage in stages)
    if flags["eval_strategy"] == "steps" and flags["eval_delay"] > most_steps:
        raise UserError(
            f"--eval_delay {flags['eval_delay']}: nothing would be evaluated; the longest stage has {most_steps} steps."
        )
    metric = flags["metric_for_best_model"]
    if metric is not None and metric.endswith("top5_accuracy") and num_classes <= 5:
        raise UserError(f"--metric_for_best_model {metric}: needs more than 5 classes, got {num_classes}.")
