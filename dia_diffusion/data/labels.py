"""Classes: their numbers, and their names."""

from collections.abc import Sequence

import datasets
import numpy as np
from datasets import Dataset

from ..errors import UsageError

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
