"""The training items of a stage, by the kind of its images."""

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from utils.transfer.alignment import AlignedImages, AlignedItems, StreamedAlignedItems
from utils.transfer.augmentation import StreamedTrainImages, TrainImages, TrainItems
from utils.transfer.methods import StageSettings
from utils.transfer.replay import ImagePair, ReplayedImages, ReplayedItems, StreamedReplayedItems


def training_items(
    images: Dataset | IterableDataset | ImagePair, items: TrainItems, settings: StageSettings, args: TrainingArguments
) -> torch.utils.data.Dataset:
    """Return the dataset of a stage's training items; its length and order depend on the kind of images."""
    processes, batch_size = (args.world_size, args.process_index), settings.per_device_train_batch_size
    # per optimiser step: the same images for any number of processes and accumulated batches
    images_per_step = batch_size * args.world_size * args.gradient_accumulation_steps
    if isinstance(images, IterableDataset):
        return StreamedTrainImages(images, items, args.seed, *processes)
    if isinstance(images, AlignedImages) and images.is_streamed:
        return StreamedAlignedItems(images, items, args.seed, *processes)
    if isinstance(images, AlignedImages):
        return AlignedItems(images, items, args.seed, images_per_step * settings.max_steps)
    if isinstance(images, ReplayedImages) and images.is_streamed:
        return StreamedReplayedItems(images, items, args.seed, batch_size, *processes)
    if isinstance(images, ReplayedImages):
        return ReplayedItems(images, items, args.seed, images_per_step, settings.max_steps)
    return TrainImages(images, items, args.seed)
