"""Image classifiers of transformers and timm: load with a fresh or a kept head, save so that a pipeline loads them."""

import copy
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from utils.cli.errors import UserError
from utils.hub.repositories import Source, open_source

NO_CLASSIFIER = "does not load as an image classifier"
WEIGHTS = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]


def check_classifier(name: str, revision: str | None = None, token: str | None = None) -> str | None:
    """Return the commit of a classifier (None for a folder) without loading it.

    Raises:
        UserError: `name` is neither a folder nor a repository, or one without a checkpoint; it may not be read, or
            cannot be reached.
    """
    source = open_source(name, "--model_name_or_path", "model", revision, token)
    source.file("config.json", "a checkpoint of transformers or timm")
    if not source.has_one_of(WEIGHTS):
        raise UserError(f"--model_name_or_path {name}: has no weights; one of {', '.join(WEIGHTS)} is wanted.")
    return source.revision


def load_image_processor(name: str, **hub_options):
    """Return the image processor that belongs to a checkpoint.

    Raises:
        UserError: the checkpoint has none.
    """
    with _reading(name, "no usable image processor", **hub_options):
        return AutoImageProcessor.from_pretrained(name, **hub_options)


def load_pretrained(name: str, **hub_options) -> PreTrainedModel | None:
    """Return a checkpoint with its own head, None when it is a backbone without one.

    Raises:
        UserError: the checkpoint does not fit an image classifier.
    """
    config = _load_config(name, **hub_options)
    if config.num_labels == 0:  # timm's backbones
        return None
    model, info = _load_weights(name, config, **hub_options)
    return model if not info["missing_keys"] and not info["mismatched_keys"] else None


def load_classifier(name: str, class_names: list[str], reset_head: bool, seed: int, **hub_options) -> PreTrainedModel:
    """Return a checkpoint as a classifier of `class_names`, with a fresh head drawn from `seed` or with its own.

    Raises:
        UserError: the checkpoint does not fit an image classifier.
        AssertionError: the head should be kept and was made for other classes.
    """
    config = _load_config(name, **hub_options)
    assert reset_head or list(config.id2label.values()) == class_names, "a kept head needs the same classes"
    config.num_labels = len(class_names)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {class_name: index for index, class_name in enumerate(class_names)}
    if config.model_type == "timm_wrapper":
        config.label_names = class_names  # it would save the old names, and load them in place of id2label
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = _load_weights(name, config, **hub_options)
        if reset_head:
            fresh = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
            _reset_parameters(model, set(head_parameter_names(model)) - fresh)
    return model


def _reading(name: str | Path, problem: str, revision: str | None = None, token: str | None = None, **_):
    source = Source(str(name), "--model_name_or_path", "model", revision, token)
    return source.reading(problem, also=(ValueError, KeyError))  # of models that transformers does not know


def _load_config(name: str, **hub_options) -> PreTrainedConfig:
    with _reading(name, NO_CLASSIFIER, **hub_options):
        return AutoConfig.from_pretrained(name, **hub_options)


def _load_weights(name: str, config: PreTrainedConfig, **hub_options) -> tuple[PreTrainedModel, dict]:
    with _reading(name, NO_CLASSIFIER, **hub_options):
        return AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **hub_options
        )


def head_parameter_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters whose shape depends on the number of classes, in the model's order."""
    other_config = copy.deepcopy(model.config)
    other_config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):  # shapes without memory
        other = dict(type(model)(other_config).named_parameters())
    return [name for name, parameter in model.named_parameters() if parameter.shape != other[name].shape]


def _reset_parameters(model: PreTrainedModel, names: set[str]) -> None:
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).fill_(torch.nan)  # what is left of it was not initialised
    for module_name in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(module_name)
        for owner in (module, *module.parameters(recurse=False)):
            # transformers skips what it believes to be loaded
            owner._is_hf_initialized = False
        model._init_weights(module)
    for name in names:
        assert model.get_parameter(name).isfinite().all(), f"{name} was not initialised again"


def save_classifier(model: PreTrainedModel, image_processor, output_dir: str | Path) -> None:
    """Write a checkpoint that `AutoModelForImageClassification` and `pipeline("image-classification")` load."""
    # safetensors takes no channels-last tensors
    model.to(memory_format=torch.contiguous_format).save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
