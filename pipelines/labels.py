"""Class labels of images: names or numbers, one for all images or one for each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, nearest

# How a class is named that stands for none: the images of a class-conditional model without a class.
NO_CLASS = "none"
_SHOWN = 20


def class_number(label: Any, null_class: int, names: Sequence[str] | None = None) -> int:
    """Return the number of a class from its name, or from its number where no class has that for its name.

    Args:
        label (`str` or `int`): A name, a number as a number or a text, or `none`.
        null_class (`int`): The number of classes, which stands for none.
        names (sequence of `str`, *optional*): The names of the classes in the order of their numbers.

    Raises:
        UsageError: if there is no such class.
    """
    names = list(names or [])
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        if label == NO_CLASS:
            return null_class
        if not label.removeprefix("-").isdecimal():
            raise UsageError(
                f"the model has no class named '{label}'; {_known(null_class, names)}.{nearest(label, names)}"
            )
        label = int(label)
    if isinstance(label, bool) or not hasattr(label, "__index__"):
        raise UsageError(f"a class label is a whole number or the name of a class, but {label!r} is neither.")
    number = label.__index__()
    if not 0 <= number <= null_class:
        raise UsageError(
            f"class_labels must lie between 0 and {null_class}, where {null_class} means no class, but one is {number}."
        )
    return number


def make_labels(labels: Any, batch_size: int, null_class: int, names: Sequence[str] | None = None) -> Tensor:
    """Return the numbers of the classes of a batch, int64 of shape `(batch_size,)`.

    Args:
        labels: A label as `class_number` takes it, for all images, or a sequence, array or tensor of one for each.

    Raises:
        UsageError: if they are not as many as images, or one is not the label of a class.
    """
    if isinstance(labels, Tensor) or hasattr(labels, "tolist"):
        labels = labels.tolist()
    if isinstance(labels, str) or not isinstance(labels, Sequence | range):
        return torch.full((batch_size,), class_number(labels, null_class, names))
    if any(isinstance(label, Sequence) and not isinstance(label, str) for label in labels):
        raise UsageError(f"class_labels must be one label for each image, but {labels!r} is a list of lists.")
    if len(labels) != batch_size:
        raise UsageError(f"{len(labels)} class_labels were given for a batch of {batch_size} images.")
    return torch.tensor([class_number(label, null_class, names) for label in labels])


def _known(null_class: int, names: Sequence[str]) -> str:
    if not names:
        return f"its classes are the numbers 0 to {null_class - 1}"
    return f"its classes are: {', '.join(names[:_SHOWN])}{', ...' if names[_SHOWN:] else ''}"
