"""Types and ranges of options, and the conversion of values from flags, YAML files and Python to them."""

import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import UsageError, nearest


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, or `above` one and `below` another; never infinite, never NaN."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def violation(self, value: float) -> str | None:
        """Return the bound that a number violates, such as "at least 1", or `None`."""
        bounds = {
            f"at least {self.least}": self.least is None or value >= self.least,
            f"at most {self.most}": self.most is None or value <= self.most,
            f"above {self.above}": self.above is None or value > self.above,
            f"below {self.below}": self.below is None or value < self.below,
        }
        return next((words for words, kept in bounds.items() if not kept), None)


COUNT = Range(least=1)
NATURAL = Range(least=0)
# The range of torch's seeds.
SEED = Range(least=0, most=2**64 - 1)

# Marks of types: a path, in which `~` is the home; names separated by commas; a name that may be a number.
PATH = "path"
NAMES = "names"
LABEL = "label"
# Words for truth values, as transformers' HfArgumentParser reads them.
TRUTH = {word: word in ("yes", "true", "t", "y", "1") for word in "yes true t y 1 no false f n 0".split()}

Count = Annotated[int, COUNT]
Natural = Annotated[int, NATURAL]
Share = Annotated[float, Range(least=0, most=1)]
Location = Annotated[str, PATH]
File = Annotated[Path, PATH]
Names = Annotated[list[str], NAMES]
Label = Annotated[str, LABEL]


def option(default: Any = MISSING, text: str = "", *, aliases: tuple[str, ...] = (), **about: Any) -> Any:
    """Return a field of a dataclass of options.

    Args:
        default: Its default; without one the option is positional on the command line.
        text (`str`): Its help.
        aliases (`tuple[str, ...]`): Other names for it, on the command line, in files and in Python.
        about: `group` of the help that it stands in, if not that of its class; `shown`, the default to print in the
            help where `None` stands for another; `metavar`.
    """
    return field(default=default, metadata={"help": text, "aliases": aliases, **about})


@dataclass
class Options:
    """Base of the dataclasses of options: converts values to the types of their fields and checks their ranges.

    Attributes:
        group (`str`): Heading of the options in the help.
    """

    group: ClassVar[str] = "options"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if get_origin(hint) is not ClassVar:
                setattr(self, name, convert(name, getattr(self, name), hint))


def convert(name: str, value: Any, hint: Any) -> Any:
    """Return a value as the type of its option.

    Args:
        name (`str`): The option, for messages.
        value: As it stands in a file, on the command line or in Python.
        hint: A type, perhaps `Annotated` with a `Range` or a mark, or a union with `None`.

    Raises:
        UsageError: if the value has another type or lies out of its range.
    """
    if value is None:
        if NoneType in get_args(hint):
            return None
        raise UsageError(f"{name} has no value.")
    # Scalars, arrays and tensors of numpy and torch.
    value = value.tolist() if hasattr(value, "tolist") else value
    kind, mark = unwrap(hint)
    if mark == LABEL:
        return _convert_labels(name, value)
    if mark == NAMES:
        words = value.split(",") if isinstance(value, str) else value
        value = [word.strip() for word in words if str(word).strip()] if isinstance(words, list | tuple) else value
    if get_origin(kind) is dict:
        return convert_mapping(name, value)
    if get_origin(kind) is Literal:
        return _convert_choice(name, value, get_args(kind))
    if get_origin(kind) in (list, tuple):
        if not isinstance(value, list | tuple) or not (value or mark == NAMES):
            raise UsageError(f"{name} must be a list, for example [32, 64], but is '{value}'.")
        return [convert(name, item, get_args(kind)[0]) for item in value]
    if kind in (int, float):
        return to_number(name, value, kind, mark or Range())
    if isinstance(value, os.PathLike) and mark == PATH:
        value = os.fspath(value)
    if kind is bool:
        value = TRUTH.get(str(value).lower(), value)
    if value == "" and (mark == PATH or kind is str):
        # An unset variable of a shell; as a path it would be the present folder.
        raise UsageError(f"{name} is empty: give a value, or leave the option out.")
    if not isinstance(value, str if kind is Path else kind):
        words = "true or false" if kind is bool else "text (put it in quotes)"
        shown = f"'{value}'" if isinstance(value, str | Real | list | tuple) else f"of type {type(value).__name__}"
        raise UsageError(f"{name} must be {words}, but is {shown}.")
    # Path.expanduser would change Hub ids, and fails for a user that does not exist.
    value = os.path.expanduser(value) if mark == PATH else value  # noqa: PTH111
    return Path(value) if kind is Path else value


def unwrap(hint: Any) -> tuple[Any, Any]:
    """Return the plain type of an option and its `Range` or mark (else `None`). Of a union, its first type counts."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    return get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)


def _convert_labels(name: str, value: Any) -> str | list[str]:
    """Return a label as text, or several, one for each image in turn, as a list."""
    labels = list(value) if isinstance(value, list | tuple | range) else [value]
    for label in labels or [value]:
        if isinstance(label, bool) or not isinstance(label, str | Integral) or label == "":
            raise UsageError(f"{name} must be the name or the number of a class, or a list of them, but is {value!r}.")
    return str(labels[0]) if len(labels) == 1 else [str(label) for label in labels]


def _convert_choice(name: str, value: Any, choices: tuple) -> Any:
    if value is False and "no" in choices:
        return "no"  # YAML reads a plain no as false.
    found = [choice for choice in choices if str(choice) == str(value)]
    if not found:
        raise UsageError(
            f"{name} must be one of {', '.join(map(str, choices))}, but is '{value}'."
            f"{nearest(value, map(str, choices))}"
        )
    return found[0]


def convert_mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a mapping from one, or from the text of a flag, which is YAML or JSON.

    Raises:
        UsageError: if it is no mapping.
    """
    try:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        parsed = value
    if not isinstance(parsed, dict):
        raise UsageError(f"{name} must be a mapping, for example '{{norm_num_groups: 8}}', but is '{value}'.")
    return parsed


def to_number(name: str, value: Any, kind: type, within: Range) -> Any:
    """Return an `int` or a `float` from a number or from text.

    YAML takes numbers without a point, such as 1e-3, for text, and 1.0e+4 for a fraction.

    Raises:
        UsageError: if it is no number or lies out of the range.
    """
    number = _number(value, kind)
    if number is None:
        article = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} must be {article}, but is '{value}'.")
    broken = within.violation(number)
    if broken is not None:
        raise UsageError(f"{name} must be {broken}, but is {number}.")
    return number


def number_type(kind: type, within: Range) -> Callable[[str], Any]:
    """Return the `type` of a flag of argparse that takes such numbers."""

    def parse(text: str) -> Any:
        try:
            return to_number("it", text, kind, within)
        except UsageError as error:
            raise ArgumentTypeError(str(error)) from error

    return parse


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real | str):
        return None
    try:
        if kind is int and isinstance(value, Integral | str):
            return int(value)
    except ValueError:
        pass  # 1e3
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        return None
    return kind(number)
