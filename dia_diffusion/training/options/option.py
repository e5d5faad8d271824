"""An option: its type, its range, its default and its explanation in one line."""

from dataclasses import field
from typing import Annotated, Any, get_type_hints

from ...ranges import COUNT, NATURAL, Range
from ..values import PATH, read_value

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
