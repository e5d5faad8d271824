"""Values of options, as they stand in files and on the command line, brought to their types."""

import os
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from ..errors import UsageError
from ..ranges import Range, to_number
from ..suggestions import nearest

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
