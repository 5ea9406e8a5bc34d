"""Image classifiers of transformers and timm: check them, load them with a fresh or kept head, save them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from utils.cli.errors import UserError
from utils.cli.processes import warn_once
from utils.cli.records import ALL_RESULTS, BRIDGED_CONFIG, EVAL_RESULTS, RUN_CONFIG
from utils.hub.repositories import Source, open_source
from utils.transfer.image_format import check_image_processor
from utils.transfer.model_parts import batch_norm_modules, head_parameter_names
from utils.transfer.model_parts import reset_head as draw_head

NO_CLASSIFIER = "does not load as an image classifier"
# outputs other than logits that a checkpoint may ask for; they would be gathered for every image
OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
# default peak learning rates of AdamW on real and on synthetic images
LEARNING_RATES = {
    "part": (2e-4, 5e-4),  # an adapter with the head, or the head alone
    "batch_norm": (2e-4, 5e-4),  # all weights of a network with BatchNorm: ResNet, EfficientNet
    "other": (2e-5, 5e-5),  # all weights of others: ViT, Swin, ConvNeXt, hybrids, networks without normalisation
}
LOADED_FILES = ("*.json", "*.safetensors", "*.bin", "*.py")
NOT_LOADED = (ALL_RESULTS, EVAL_RESULTS, BRIDGED_CONFIG, RUN_CONFIG)  # of a classifier that train_bridged.py made
WEIGHTS = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]


def open_classifier(name: str, revision: str | None = None, token: str | None = None) -> Source:
    """Return the source of a classifier, at its current commit, without loading it.

    Raises:
        UserError: `name` is neither a folder nor a repository, has no checkpoint, or cannot be read or reached.
    """
    source = open_source(name, "--model_name_or_path", "model", revision, token)
    source.file("config.json", "a checkpoint of transformers or timm")
    if not source.has_one_of(WEIGHTS):
        raise UserError(f"--model_name_or_path {name}: has no weights; must contain one of {', '.join(WEIGHTS)}.")
    return source


def list_loaded_files(folder: str) -> list[str]:
    """Return the files in a classifier's folder that loading may read."""
    return sorted(
        path.name for pattern in LOADED_FILES for path in Path(folder).glob(pattern) if path.name not in NOT_LOADED
    )


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates on real and on synthetic images, and the reason for them in words."""

    real: float
    synthetic: float
    reason: str


def default_learning_rates(
    name: str, *, use_peft: bool = False, freeze_backbone: bool = False, **hub_options
) -> LearningRates:
    """Return the rates of `LEARNING_RATES` for a checkpoint and for what is trained of it, without loading weights.

    The head's rate is a multiple of them. They are our choice, and the starting point of a search.

    Raises:
        UserError: the checkpoint does not fit an image classifier.

    Source: transformers' image-classification example (ViT) and Swin's fine-tuning (512 images per batch,
        configs/swin/*_22kto1k_finetune.yaml) use 2e-5; ConvNeXt's uses 5e-5, less in lower layers (512 images per
        batch, TRAINING.md).
    """
    if use_peft or freeze_backbone:
        trained = "an adapter and the head are" if use_peft else "the head alone is"
        return LearningRates(*LEARNING_RATES["part"], f"{trained} trained")
    config = _load_config(name, **hub_options)
    config.num_labels = 2  # timm's backbones have none
    with _reading(name, NO_CLASSIFIER, **hub_options):
        model = _build_without_weights(config, **hub_options)
    has_layer_norm = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    if not batch_norm_modules(model):
        kind, why = "other", "has no BatchNorm"
    elif has_layer_norm:
        kind, why = "other", "has LayerNorm as well as BatchNorm"
    else:
        kind, why = "batch_norm", "normalises by BatchNorm"
    architecture = config.architecture if config.model_type == "timm_wrapper" else config.model_type
    return LearningRates(*LEARNING_RATES[kind], f"{architecture} {why}, all its weights are trained")


def load_image_processor(name: str, **hub_options):
    """Return the image processor of a checkpoint.

    Raises:
        UserError: the checkpoint has none, or its output for an image is not `(3, height, width)`.
    """
    with _reading(name, "no usable image processor", **hub_options):
        image_processor = AutoImageProcessor.from_pretrained(name, **hub_options)
    check_image_processor(image_processor, name)
    return image_processor


def load_pretrained(name: str, **hub_options) -> PreTrainedModel | None:
    """Return a checkpoint with its own head, or None for a backbone without one.

    Raises:
        UserError: the checkpoint does not fit an image classifier.
    """
    config = _load_config(name, **hub_options)
    if config.num_labels == 0:  # timm's backbones
        return None
    model, info = _load_weights(name, config, **hub_options)
    return model if not info["missing_keys"] and not info["mismatched_keys"] else None


def load_classifier(
    name: str, class_names: list[str], reset_head: bool, seed: int, *, dropout: float | None = None,
    drop_path_rate: float | None = None, **hub_options,
) -> PreTrainedModel:  # fmt: skip
    """Return a checkpoint as a classifier of `class_names`, with a fresh head drawn from `seed` or with its own.

    Weights are float32, as in training, whatever their dtype in the checkpoint. `dropout` and `drop_path_rate` are in
    [0, 1); None keeps the checkpoint's.

    Raises:
        UserError: the checkpoint does not fit an image classifier, or has no recognizable head or no such dropout.
        AssertionError: the head should be kept and was made for other classes.
    """
    config = _load_config(name, **hub_options)
    assert reset_head or list(config.id2label.values()) == class_names, "a kept head needs the same classes"
    config.num_labels = len(class_names)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {class_name: index for index, class_name in enumerate(class_names)}
    # so the saved classifier's pipeline returns softmax probabilities for any base (except with one class)
    config.problem_type = "single_label_classification" if len(class_names) > 1 else None
    if config.model_type == "timm_wrapper":
        config.label_names = class_names  # else the old names would be saved, and loaded instead of id2label
    for flag, rate in (("dropout", dropout), ("drop_path_rate", drop_path_rate)):
        if rate is not None:
            _set_rate(config, flag, rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for what the checkpoint lacks
        model, info = _load_weights(name, config, dtype=torch.float32, **hub_options)
    head = head_parameter_names(model)
    if not head:
        raise UserError(
            f"--model_name_or_path {name}: no parameter depends on the number of classes, so there is no head to train;"
            " must be an image classifier."
        )
    _check_loaded(name, model, set(info["missing_keys"]) - set(head))
    if reset_head:
        draw_head(model, seed)
    return model


def build_classifier(
    name: str, num_classes: int, device: str | torch.device = "meta", *, dropout: float | None = None,
    drop_path_rate: float | None = None, **hub_options,
) -> PreTrainedModel:  # fmt: skip
    """Return a checkpoint's architecture as a classifier with random float32 weights (none on the meta device).

    Raises:
        UserError: the config cannot be read, is not an image classifier's, or has no such dropout.
    """
    config = _load_config(name, **hub_options)
    config.num_labels = num_classes
    if config.model_type == "timm_wrapper":
        config.label_names = list(map(str, range(num_classes)))
    for flag, rate in (("dropout", dropout), ("drop_path_rate", drop_path_rate)):
        if rate is not None:
            _set_rate(config, flag, rate)
    config.dtype = torch.float32
    with _reading(name, NO_CLASSIFIER, **hub_options):
        return _build_without_weights(config, device, **hub_options)


def _check_loaded(name: str, model: PreTrainedModel, missing: set[str]) -> None:
    """Warn about weights outside the head that a checkpoint lacks, which are random; refuse it if most are missing."""
    if not missing:
        return
    num_all = len(model.state_dict())
    words = f"{len(missing)} of {num_all} weights are not in the checkpoint, such as {min(missing)}"
    if len(missing) > num_all / 2:
        raise UserError(f"--model_name_or_path {name}: {words}; must be a checkpoint of this model.")
    warn_once(f"Warning: --model_name_or_path {name}: {words}; they are initialised at random.")


def _set_rate(config: PreTrainedConfig, flag: str, rate: float) -> None:
    """Set one kind of dropout in the config, so that the saved config says how the model was trained."""
    kind = {"dropout": "dropout", "drop_path_rate": "drop path"}[flag]
    no_such_rate = UserError(f"--{flag} {rate}: {config.name_or_path} has no {kind}; leave the flag out.")
    if config.model_type == "timm_wrapper":
        config.model_args = (config.model_args or {}) | {{"dropout": "drop_rate"}.get(flag, flag): rate}
        try:
            _build_without_weights(config)
        except TypeError:  # not an argument of this architecture
            raise no_such_rate from None
        return
    keys = [key for key in config.to_dict() if _kind_of_rate(key) == flag]
    if not keys:
        raise no_such_rate
    for key in keys:
        old = getattr(config, key)  # some have a rate for each of their stages
        setattr(config, key, [rate] * len(old) if isinstance(old, list) else rate)


def _kind_of_rate(key: str) -> str | None:
    if "drop_path" in key or "drop_connect" in key:
        return "drop_path_rate"
    return "dropout" if "drop" in key and "att" not in key else None  # dropout of attention is a third kind


def _reading(name: str | Path, problem: str, revision: str | None = None, token: str | None = None, **_):
    source = Source(str(name), "--model_name_or_path", "model", revision, token)
    # raised for models that the libraries do not know, and for damaged files
    also = (ValueError, KeyError, AssertionError, AttributeError, TypeError, SafetensorError)
    return source.reading(problem, also=also)


def _load_config(name: str, **hub_options) -> PreTrainedConfig:
    with _reading(name, NO_CLASSIFIER, **hub_options):
        return AutoConfig.from_pretrained(name, **OUTPUTS, **hub_options)


def _build_without_weights(
    config: PreTrainedConfig, device: str | torch.device = "meta", *, revision: str | None = None,
    trust_remote_code: bool = False, **_,
) -> PreTrainedModel:  # fmt: skip
    code = {}
    if trust_remote_code and AutoModelForImageClassification.__name__ in getattr(config, "auto_map", {}):
        code = {"trust_remote_code": True, "code_revision": revision}
    with torch.device(device):  # meta: shapes without memory
        return AutoModelForImageClassification.from_config(config, **code)


def _load_weights(name: str, config: PreTrainedConfig, **hub_options) -> tuple[PreTrainedModel, dict]:
    with _reading(name, NO_CLASSIFIER, **hub_options):
        return AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **hub_options
        )


def save_classifier(model: PreTrainedModel, image_processor, output_dir: str | Path) -> None:
    """Write a checkpoint that `AutoModelForImageClassification` and `pipeline("image-classification")` load."""
    # safetensors takes no channels-last tensors
    model.to(memory_format=torch.contiguous_format).save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
