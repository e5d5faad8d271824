"""Checks of the arguments of a pipeline: numbers, generators, and class labels, one for all images or one for each."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, nearest

# How a class is named that stands for none: the images of a class-conditional model without a class.
NO_CLASS = "none"
_SHOWN = 20


def check_whole(name: str, value: object) -> None:
    """Refuse an argument of this name that is no whole number of at least 1.

    Raises:
        UsageError: with the value.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{name} must be a whole number, but is {value!r}.")
    if value.__index__() < 1:
        raise UsageError(f"{name} must be at least 1, but is {value}.")


def check_finite(name: str, value: object) -> None:
    """Refuse an argument of this name that is no finite number.

    Raises:
        UsageError: with the value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} must be a number, but is {value!r}.")
    if not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, but is {value}.")


def check_generator(generator: object, batch_size: int) -> None:
    """Refuse what is neither a generator nor a list with one for each image.

    Raises:
        UsageError: with what to give.
    """
    if isinstance(generator, list) and len(generator) != batch_size:
        raise UsageError(f"{len(generator)} generators were given for a batch of {batch_size} images.")
    each = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(item, torch.Generator) for item in each):
        raise UsageError(
            f"generator must be a torch.Generator or a list of them, but is {generator!r}: give for example "
            "torch.Generator().manual_seed(0)."
        )


def returned_latents(returned: Any, latents: Tensor) -> Tensor:
    """Return the latents that a callback returned, or the same ones if it returned none.

    Raises:
        UsageError: if it returned something else, or another shape.
    """
    if not isinstance(returned, dict | None):
        raise UsageError(f"callback_on_step_end must return a dict, but returned {type(returned).__name__}.")
    changed = (returned or {}).get("latents", latents)
    if not isinstance(changed, Tensor):
        raise UsageError(
            f"callback_on_step_end must return latents as a tensor, but returned {type(changed).__name__}."
        )
    if changed.shape != latents.shape:
        raise UsageError(f"callback_on_step_end returned latents of another shape, {tuple(changed.shape)}.")
    return changed.to(latents.dtype)


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
    if isinstance(labels, str | bytes) or not isinstance(labels, Sequence | range):
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
