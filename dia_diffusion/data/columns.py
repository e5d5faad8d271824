"""Which columns of a data set hold the images and the classes."""

from typing import Any

import datasets
from datasets import Dataset

from ..errors import UsageError
from ..suggestions import nearest

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
