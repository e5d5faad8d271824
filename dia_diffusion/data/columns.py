"""Which columns of a data set hold the images and the classes.

Classes: their numbers, and their names."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from ..errors import UsageError, nearest

_DEFAULT_IMAGE_COLUMNS = ("image", "img")
_DEFAULT_LABEL_COLUMNS = ("label", "labels", "fine_label")


def find_image_column(dataset: Dataset, name: str | None = None) -> str:
    """The column that holds the images: the one named, `image` or `img`, or else the first of type `Image`."""
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    candidates = [name] if name is not None else [c for c in _DEFAULT_IMAGE_COLUMNS if c in images] + images
    if candidates and candidates[0] in images:
        return candidates[0]
    wanted = f"'{name}' is not a column of images" if name is not None else "the data set has no column of images"
    columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in dataset.features.items())
    if images:
        advice = f"Name one of type Image with --image_column: {', '.join(images)}."
    else:
        advice = "Bytes and paths become images with dataset.cast_column(name, datasets.Image()), then save_to_disk."
    raise UsageError(f"{wanted}. Its columns are: {columns}. {advice}{nearest(name, images)}")


def find_label_column(dataset: Dataset, name: str | None = None) -> str:
    """The column that holds the classes: the one named, `label`, or else the first of type `ClassLabel`."""
    if name is not None and name not in dataset.features:
        raise UsageError(
            f"the data set has no column '{name}', only: {', '.join(dataset.features)}."
            f"{nearest(name, dataset.features)}"
        )
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


_MOST_CLASSES_WITHOUT_NAMES = 10_000


def read_labels(
    rows: Dataset, feature: object, trained: tuple[Sequence[str], Sequence[int]] | None = None
) -> tuple[np.ndarray, list[str]]:
    """The label of each image, -1 for those without one, and the names of the classes.

    Args:
        rows (`datasets.Dataset`): Has a column `label`.
        feature (`datasets.ClassLabel` or another): The type of the labels where they come from.
        trained (`tuple`, *optional*):
            The class names that a model knows, whose numbers count then, and the labels of its training images: a class
            that none of these has is none.
    """
    labels = np.asarray(rows.with_format("numpy")["label"][:] if len(rows) else [], dtype=np.int64)
    own = feature.names if isinstance(feature, datasets.ClassLabel) else _numbered(labels)
    names, seen = (own, range(len(own))) if trained is None else (list(trained[0]), set(np.unique(trained[1]).tolist()))
    numbers = {name: number for number, name in enumerate(names)}
    known = {label: numbers[name] for label, name in enumerate(own) if numbers.get(name) in seen}
    found, places = np.unique(labels, return_inverse=True)
    return np.array([known.get(label, -1) for label in found.tolist()], dtype=np.int64)[places], names


def _numbered(labels: np.ndarray) -> list[str]:
    count = int(labels.max(initial=-1)) + 1
    if count > max(_MOST_CLASSES_WITHOUT_NAMES, 10 * len(np.unique(labels))):
        raise UsageError(f"labels go up to {count - 1}, which is no number of a class: number the classes from 0.")
    return [str(number) for number in range(count)]
