"""The images of a run: its training images and its held-out ones."""

from typing import Any

import numpy as np

from ..errors import UsageError
from ..options.model import DataOptions
from ..process.output import print_main
from .pixels import PixelDataset, describe_images
from .preparation import BadImageError, prepare_pixels
from .sources import load_dataset_splits

# The seed of --validation_split: runs of all seeds are compared on the same held-out images.
_SPLIT_SEED = 0


def load_pixels(options: DataOptions) -> tuple[PixelDataset, PixelDataset | None]:
    """Return the training images of a run, and the held-out ones or None.

    Raises:
        UsageError: if there is no such data, or an image cannot be used.
    """
    train_split, held_out_split = load_dataset_splits(
        options.dataset_name,
        options.dataset_config_name,
        options.train_data_dir,
        options.cache_dir,
        options.label_column,
        options.class_conditional,
    )
    settings: dict[str, Any] = {
        "image_column": options.image_column,
        "label_column": options.label_column,
        "with_labels": options.class_conditional,
        "on_bad_image": options.on_bad_image,
        "bits": 16 if options.preserve_input_precision else 8,
        "cache_dir": options.cache_dir,
        "num_workers": options.preprocessing_num_workers,
    }
    try:
        data = prepare_pixels(train_split, options.resolution, options.channels, **settings)
        if held_out_split is None:
            return hold_out(data, options.validation_split) if options.validation_split else (data, None)
        if options.validation_split:
            print_main(f"The data set holds out its split '{held_out_split.split}': --validation_split is not used.")
        trained = None if data.class_names is None or data.labels is None else (data.class_names, data.labels.tolist())
        held_out = prepare_pixels(held_out_split, options.resolution, data.channels, **settings, trained=trained)
    except BadImageError as error:
        raise UsageError(f"{error} Or leave such images out: --on_bad_image skip.") from error
    if len(held_out) == 0:
        print_main(f"No images are held out: {'; '.join(held_out.left_out)}.")
        return data, None
    return data, held_out


def hold_out(data: PixelDataset, share: float) -> tuple[PixelDataset, PixelDataset]:
    """Divide images into those for training and those that are held out: at random, each class in proportion.

    The division depends on the number of images and their labels alone. Each class keeps an image for training.

    Args:
        data (`PixelDataset`): The images.
        share (`float`): The share to hold out, between 0 and 1.

    Raises:
        UsageError: if there are too few images.
    """
    labels = np.zeros(len(data), dtype=np.int64) if data.labels is None else data.labels
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(data))
    classes, counts = np.unique(labels, return_counts=True)
    total = max(1, round(share * len(data)))
    # Largest remainders: whole numbers of images, in sum the total.
    exact = total * counts / len(data)
    wanted = np.floor(exact).astype(int)
    wanted[np.argsort(wanted - exact, kind="stable")[: total - wanted.sum()]] += 1
    wanted = np.minimum(wanted, counts - 1)
    if wanted.sum() == 0:
        raise UsageError(f"{len(data)} images are too few to hold some out: give --validation_split 0, or add images.")
    chosen = [order[labels[order] == label][:number] for label, number in zip(classes, wanted, strict=True)]
    held = np.sort(np.concatenate(chosen))
    return data.select(np.setdiff1d(np.arange(len(data)), held)), data.select(held)


def describe_data(options: DataOptions, data: PixelDataset, held_out: PixelDataset | None) -> dict[str, str]:
    """Describe the images of a run, by title."""
    origin = str(options.dataset_name or options.train_data_dir)
    hint = "none. (--validation_split 0.1 holds out a tenth of the training images.)"
    held = hint if held_out is None else describe_images(held_out, origin)
    return {"Data": describe_images(data, origin), "Held out": held}
