"""The numbers that an option may be, wherever it stands: a flag, a line of YAML, an argument."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import UsageError


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
