"""Real architectures of transformers and timm at tiny size, with random weights."""

import transformers

SQUARE, SHORTEST_EDGE = {"height": 32, "width": 32}, {"shortest_edge": 32}
TRANSFORMER = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CONVOLUTIONAL = {"hidden_sizes": [8, 16], "depths": [1, 1]}
# a family of transformers, its sizes, its image processor and the input size; with the usual range of initial weights,
# so few channels would pass on nothing of an image
NATIVE = {
    "vit": ("ViT", TRANSFORMER | {"num_hidden_layers": 1, "intermediate_size": 16}, "ViT", SQUARE),
    "resnet": ("ResNet", CONVOLUTIONAL | {"embedding_size": 8, "layer_type": "basic"}, "ConvNext", SHORTEST_EDGE),
    "convnext": ("ConvNext", CONVOLUTIONAL | {"num_stages": 2}, "ConvNext", SHORTEST_EDGE),
    "swin": (
        "Swin",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
        "ViT",
        SQUARE,
    ),
    "efficientnet": (
        "EfficientNet",
        {
            "image_size": 32, "hidden_dim": 128, "in_channels": [8, 8], "out_channels": [8, 8], "kernel_sizes": [3, 3],
            "strides": [1, 1], "num_block_repeats": [2, 2], "expand_ratios": [1, 2], "depthwise_padding": [],
            "width_coefficient": 0.1, "depth_coefficient": 1.0, "initializer_range": 0.7,
        },
        "EfficientNet",
        SQUARE,
    ),
    "dinov2": ("Dinov2", TRANSFORMER | {"num_hidden_layers": 2, "mlp_ratio": 1}, "Bit", SHORTEST_EDGE),
}  # fmt: skip
# timm's name and options that make it small; transformers has no classifier with a DINOv3 backbone
TIMM = {
    "timm": ("test_efficientnet", None),
    "timm_resnet": ("resnet10t", {"channels": [8, 8, 16, 16]}),
    "timm_vit": ("test_vit", {"embed_dim": 16, "depth": 2, "img_size": 32}),
    "timm_dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32}),
}

# the head module of each architecture
HEADS = {
    "vit": "classifier", "resnet": "classifier.1", "convnext": "classifier", "swin": "classifier",
    "efficientnet": "classifier", "dinov2": "classifier", "timm": "timm_model.classifier",
    "timm_resnet": "timm_model.fc", "timm_vit": "timm_model.head", "timm_dinov3": "timm_model.head",
}  # fmt: skip


def save_timm(folder, architecture: str, model_args: dict | None) -> None:
    pretrained_cfg = {
        "input_size": [3, 32, 32], "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
    }  # fmt: skip
    config = transformers.TimmWrapperConfig(
        architecture=architecture, pretrained_cfg=pretrained_cfg, model_args=model_args, num_labels=7,
        initializer_range=0.15,
    )  # fmt: skip
    transformers.TimmWrapperForImageClassification(config).save_pretrained(folder)


def save_native(folder, family: str, sizes: dict, processor: str, settings: dict) -> None:
    config = getattr(transformers, f"{family}Config")(**sizes, num_labels=7)
    getattr(transformers, f"{family}ForImageClassification")(config).save_pretrained(folder)
    getattr(transformers, f"{processor}ImageProcessor")(**settings).save_pretrained(folder)


def save_architecture(folder, name: str) -> None:
    """Write a checkpoint with seven classes and its image processor."""
    if name in TIMM:
        save_timm(folder, *TIMM[name])
    else:
        *model, size = NATIVE[name]
        save_native(folder, *model, {"size": size, "crop_size": SQUARE})
