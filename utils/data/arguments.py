"""The flags that name the labelled real images."""

from dataclasses import dataclass, field


@dataclass
class RealDataArguments:
    """The labelled real images."""

    _argument_group_name = "real images"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Real image set: a data set id on the Hub, or a local folder: class folders, alone or within "
            "folders called train, valid, test; data files; what save_to_disk wrote."
        },
    )
    train_dir: str | None = field(
        default=None,
        metadata={"help": "In place of --dataset_name: a folder with a subfolder of images for each class."},
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Held-out images in class folders: the test part; needs --train_dir."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the data set on the Hub."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with the images; found by its type when not given."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the labels; found by its type when not given."}
    )
    train_split: str = field(
        default="train", metadata={"help": "Split with the training images, or a slice such as 'train[:80%%]'."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split or slice for validation (default: validation, valid, dev or val; else carved off)."},
    )
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split or slice for the test, such as 'train[80%%:]' (default: test, testing, eval or evaluation; "
            "else that of validation; else a tenth, carved off)."
        },
    )
    train_val_split: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training images, above 0 and below 1, carved off where no split is for validation."
        },
    )
    num_shots: int | None = field(
        default=None, metadata={"help": "Use this many training images per class; all of them when not given."}
    )
    few_shot_seed: int = field(
        default=0, metadata={"help": "Which images the shots are; the K-shot images are among the K+1-shot ones."}
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Use at most so many training images, as many of each class; all when not given."},
    )
    random_flip: bool = field(
        default=True,
        metadata={"help": "Train on mirrored images too; false where left is not right (text, signs, arrows)."},
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave damaged images out and count them (default: an error)."}
    )
