"""The images of a run: its training images and its held-out ones."""

import datasets
import numpy as np

from ..options.model import DataOptions
from ..process.output import print_main
from .columns import find_label_column
from .pixels import PixelDataset, describe_images, list_names
from .preparation import prepare_pixels
from .sources import load_dataset_splits


def load_pixels(options: DataOptions) -> tuple[PixelDataset, PixelDataset | None]:
    """The training images of a run, and the held-out ones if there are any."""
    train_split, held_out_split = load_dataset_splits(
        options.dataset_name,
        options.dataset_config_name,
        options.train_data_dir,
        options.cache_dir,
        options.label_column,
        options.class_conditional,
    )
    settings = {
        "image_column": options.image_column,
        "label_column": options.label_column,
        "with_labels": options.class_conditional,
        "on_bad_image": options.on_bad_image,
        "bits": 16 if options.preserve_input_precision else 8,
        "cache_dir": options.cache_dir,
        "num_workers": options.preprocessing_num_workers,
    }
    data = prepare_pixels(train_split, options.resolution, options.channels, **settings)
    if options.class_conditional:
        column = find_label_column(train_split, options.label_column)
        _note_untrained_classes(data, isinstance(train_split.features[column], datasets.ClassLabel))
    if held_out_split is None:
        return data, None
    trained = None if data.class_names is None else (data.class_names, data.labels)
    held_out = prepare_pixels(held_out_split, options.resolution, data.channels, **settings, trained=trained)
    if len(held_out) == 0:
        print_main(f"No images are held out: {'; '.join(held_out.left_out)}.")
        return data, None
    return data, held_out


def _note_untrained_classes(data: PixelDataset, named: bool) -> None:
    """Say which classes have no training image. A model cannot learn them.

    Args:
        named (`bool`): Whether classes have names. Such classes are left out, and the others numbered anew. Classes
            that are numbers only keep theirs.
    """
    assert data.labels is not None
    assert data.class_names is not None
    trained, labels = np.unique(data.labels, return_inverse=True)
    missing = [name for number, name in enumerate(data.class_names) if number not in set(trained.tolist())]
    if missing:
        data.left_out.append(
            f"{len(missing)} of {len(data.class_names)} classes have no training image"
            f"{' and are left out' if named else ''}: {list_names(missing, numbered=False)}"
        )
        if named:
            data.class_names, data.labels = [data.class_names[number] for number in trained], labels.astype(np.int64)


def describe_data(options: DataOptions, data: PixelDataset, held_out: PixelDataset | None) -> str:
    """What a run says at its start about the images it uses."""
    origin = options.dataset_name or options.train_data_dir
    held = "none." if held_out is None else describe_images(held_out, origin)
    return f"Training images: {describe_images(data, origin)}\nHeld-out images: {held}"
