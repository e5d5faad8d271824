"""Columns of a data set: the images, and the classes with their numbers and names."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..errors import UsageError, nearest
from .decoding import UNREADABLE, open_header

_DEFAULT_IMAGE_COLUMNS = ("image", "img")
# `cls` is the name in WebDataset.
_DEFAULT_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
_NO_CLASSES = "Name a column of classes with --label_column, or train without --class_conditional."


def recognise_images(dataset: Dataset) -> Dataset:
    """Return a data set whose columns of image files have the type `Image`.

    pandas and others write image files as bytes, or as structs of `bytes` and `path`, without the type that `datasets`
    adds. Several columns of images that complete each other become one, `image`: a WebDataset has a column for each
    ending of file names.
    """
    for name, feature in dataset.features.items():
        if _holds_bytes(feature) and _is_image(dataset, name):
            dataset = dataset.cast_column(name, datasets.Image())
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(images) < 2 or set(images) & set(_DEFAULT_IMAGE_COLUMNS):
        return dataset
    columns = dataset.select_columns(images).with_format("arrow")[:]
    filled = np.stack([_filled(columns[name]) for name in images])
    if filled.sum(axis=0).max(initial=0) > 1:
        return dataset
    for name in images:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    features = {name: feature for name, feature in dataset.features.items() if name not in images}
    joined = dataset.map(
        _join,
        batched=True,
        fn_kwargs={"columns": images},
        remove_columns=images,
        features=datasets.Features(features | {"image": datasets.Image(decode=False)}),
        desc="Joining columns of images",
    )
    return joined.cast_column("image", datasets.Image())


def _filled(column: pa.ChunkedArray) -> np.ndarray:
    fields = [pc.is_valid(pc.struct_field(column, name)) for name in ("bytes", "path")]
    return np.asarray(pc.or_(*fields))


def _join(batch: dict[str, list], columns: list[str]) -> dict[str, list]:
    rows = zip(*(batch[name] for name in columns), strict=True)
    full = [[cell for cell in cells if cell and (cell["bytes"] is not None or cell["path"])] for cells in rows]
    return {"image": [cells[0] if cells else None for cells in full]}


def _holds_bytes(feature: Any) -> bool:
    struct = feature if isinstance(feature, dict) else {}
    kind = struct.get("bytes") if {"bytes"} <= struct.keys() <= {"bytes", "path"} else feature
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _is_image(dataset: Dataset, column: str) -> bool:
    """Tell whether the first cell of a column that is not empty holds an image file."""
    for row in dataset.select_columns([column]).with_format(None):
        cell = row[column] if isinstance(row[column], dict) else {"bytes": row[column]}
        if cell.get("bytes"):
            try:
                with open_header({"path": None} | cell):
                    return True
            except UNREADABLE:
                return False
    return False


def find_image_column(dataset: Dataset, name: str | None = None) -> str:
    """Return the column of the images: the one named, `image` or `img`, or else the first of type `Image`.

    Raises:
        UsageError: if there is none.
    """
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
    """Return the column of the classes: the one named, `label`, or else the first of type `ClassLabel`.

    Raises:
        UsageError: if there is none, or it holds neither integers nor text.
    """
    if name is not None and name not in dataset.features:
        raise UsageError(
            f"the data set has no column '{name}', only: {', '.join(dataset.features)}."
            f"{nearest(name, dataset.features)}"
        )
    classes = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    candidates = [name] if name else [c for c in _DEFAULT_LABEL_COLUMNS if c in dataset.features] + classes
    if not candidates:
        raise UsageError(
            f"the data set has no labels to condition on; its columns are: {', '.join(dataset.features)}. {_NO_CLASSES}"
        )
    feature = dataset.features[candidates[0]]
    is_number = _dtype(feature).startswith(("int", "uint", "float"))
    if not (isinstance(feature, datasets.ClassLabel) or is_number or _is_text(feature)):
        raise UsageError(
            f"column '{candidates[0]}' holds no classes (whole numbers or text) but {feature}. {_NO_CLASSES}"
        )
    return candidates[0]


def name_classes(dataset: Dataset, column: str) -> Dataset:
    """Return a data set whose label column has the type `ClassLabel`: texts and whole numbers are names of classes.

    Numbers below 0, NaN, with which pandas marks empty cells, and empty text are no labels.

    Raises:
        UsageError: for numbers that are not whole.
    """
    if isinstance(dataset.features[column], datasets.ClassLabel):
        return dataset
    values = dataset.with_format(None)[column][:]
    if _is_text(dataset.features[column]):
        values = [None if value is None or not str(value).strip() else value for value in values]
    else:
        values = [None if value is None or not value >= 0 else value for value in values]
        broken = next((value for value in values if value is not None and not float(value).is_integer()), None)
        if broken is not None:
            raise UsageError(f"column '{column}' holds no classes (whole numbers or text), but {broken}. {_NO_CLASSES}")
        values = [None if value is None else int(value) for value in values]
    found = {value: str(value) for value in set(values) if value is not None}
    names = sort_class_names(set(found.values()))
    numbers = {name: number for number, name in enumerate(names)}
    labels = [None if value is None else numbers[found[value]] for value in values]
    # A ClassLabel of `datasets` needs names.
    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    return dataset.remove_columns(column).add_column(column, labels, feature=feature)


def sort_class_names(names: set[str]) -> list[str]:
    """Sort class names as numbers where all of them are numbers, otherwise as text."""
    return sorted(names, key=lambda name: (int(name), name)) if all(map(str.isdecimal, names)) else sorted(names)


def _is_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string", "bool")


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


def read_labels(
    rows: Dataset, feature: object, trained: tuple[Sequence[str], Sequence[int]] | None = None
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the class of each image, the names of the classes, and the names of classes without an image.

    Classes are those that occur, because a model cannot learn another one.

    Args:
        rows (`datasets.Dataset`): Has a column `label`.
        feature (`datasets.ClassLabel` or another): The type of the labels: see `name_classes`.
        trained (`tuple`, *optional*):
            The class names of a model, whose numbers count then, and the labels of its training images. A label that
            none of these has becomes -1.

    Returns:
        `tuple`: int64 numbers of shape `(N,)`, -1 for an image without a label, and the two lists of names.
    """
    labels = np.asarray(rows.with_format("numpy")["label"][:] if len(rows) else [], dtype=np.int64)
    found, indices = np.unique(labels, return_inverse=True)
    own = list(feature.names) if isinstance(feature, datasets.ClassLabel) else []
    occurring = [own[label] for label in found.tolist() if label >= 0]
    absent = [] if trained else sorted(set(own) - set(occurring), key=own.index)
    names = list(trained[0]) if trained else occurring
    seen = set(np.unique(trained[1]).tolist()) if trained else set(range(len(names)))
    known = {name: number for number, name in enumerate(names) if number in seen}
    classes = [known.get(own[label], -1) if label >= 0 else -1 for label in found.tolist()]
    return np.array(classes, dtype=np.int64)[indices.reshape(-1)], names, absent
