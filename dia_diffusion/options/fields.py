"""The numbers that an option may be, wherever it stands: a flag, a line of YAML, an argument.

Values of options, as they stand in files and on the command line, brought to their types.

An option: its type, its range, its default and its explanation in one line."""

import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ..errors import UsageError, nearest


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, or `above` one and `below` another. Never infinite, never NaN."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def broken_by(self, value: float) -> str | None:
        """The bound that a number does not keep, in words."""
        bounds = {
            f"at least {self.least}": self.least is None or value >= self.least,
            f"at most {self.most}": self.most is None or value <= self.most,
            f"above {self.above}": self.above is None or value > self.above,
            f"below {self.below}": self.below is None or value < self.below,
        }
        return next((words for words, kept in bounds.items() if not kept), None)


COUNT = Range(least=1)
NATURAL = Range(least=0)
# What torch takes as a seed.
SEED = Range(least=0, most=2**64 - 1)


def to_number(name: str, value: Any, kind: type, within: Range) -> Any:
    """A number of this kind, `int` or `float`, from a number or from text.

    YAML takes numbers without a point, such as 1e-3, for text, and 1.0e+4 for a fraction.

    Raises:
        UsageError: if it is no number, or not within the range.
    """
    number = _read(value, kind)
    if number is None:
        article = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} must be {article}, but is '{value}'.")
    broken = within.broken_by(number)
    if broken is not None:
        raise UsageError(f"{name} must be {broken}, but is {value}.")
    return number


def number_type(kind: type, within: Range) -> Callable[[str], Any]:
    """The `type` of a flag of argparse."""

    def parse(text: str) -> Any:
        try:
            return to_number("it", text, kind, within)
        except UsageError as error:
            raise ArgumentTypeError(str(error)) from error

    return parse


def _read(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        if kind is int and not isinstance(value, float):
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


# Marks text that says where something lies.
PATH = "path"
_NO_LIMITS = Range()


def read_value(name: str, value: Any, hint: Any) -> Any:
    """A value as the type of its option wants it, in which numbers may have a `Range`, and paths are marked.

    Raises:
        UsageError: if it is of another type, or not within its range.
    """
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if NoneType in get_args(hint):
        if value is None:
            return None
        hint = kinds[0]
    if value is None:
        raise UsageError(f"{name} has no value.")
    if get_origin(hint) is dict:
        return read_mapping(name, value)
    if get_origin(hint) is Literal:
        return _read_choice(name, value, get_args(hint))
    if get_origin(hint) in (list, tuple):
        if not isinstance(value, list | tuple) or not value:
            raise UsageError(f"{name} must be a list, for example [32, 64], but is '{value}'.")
        return [read_value(name, item, get_args(hint)[0]) for item in value]
    kind, mark = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    if kind in (int, float):
        return to_number(name, value, kind, mark or _NO_LIMITS)
    if not isinstance(value, kind):
        words = {bool: "true or false", str: "text (put it in quotes)"}[kind]
        raise UsageError(f"{name} must be {words}, but is '{value}'.")
    return os.path.expanduser(value) if mark == PATH else value  # noqa: PTH111 (Path would change Hub ids)


def _read_choice(name: str, value: Any, choices: tuple) -> Any:
    if value is False and "no" in choices:
        return "no"  # What YAML makes of a plain no.
    if isinstance(value, bool) or value not in choices:
        raise UsageError(
            f"{name} must be one of {', '.join(map(str, choices))}, but is '{value}'."
            f"{nearest(value, map(str, choices))}"
        )
    return value


def read_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping as it stands in a file, or as the text of a flag."""
    try:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        parsed = value
    if not isinstance(parsed, dict):
        raise UsageError(f"{name} must be a mapping, for example '{{norm_num_groups: 8}}', but is '{value}'.")
    return parsed


# What options may be: each number has its range.
Count = Annotated[int, COUNT]
Natural = Annotated[int, NATURAL]
Share = Annotated[float, Range(least=0, most=1)]
# Where something lies: `~` is the home of the user.
Location = Annotated[str, PATH]


def option(default: Any, text: str, **flag: Any) -> Any:
    """A field, its explanation, and what argparse should know about its flag besides."""
    return field(default=default, metadata={"help": text, **flag})


class Options:
    """A part of the description, which brings its values to the types of its fields, and refuses those that are not
    within their ranges."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            setattr(self, name, read_value(name, getattr(self, name), hint))
