"""What was probably meant by a name that there is not."""

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def nearest(name: object, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, for the end of a message, where a known name is near; else nothing.

    Capitals, and dashes for underscores, make no difference; of names that are else the same the first is named.
    """
    spelled = {_plain(one): one for one in reversed(list(known))}
    found = get_close_matches(_plain(str(name)), spelled, n=1)
    return f" Did you mean '{spelled[found[0]]}'?" if found else ""


def folders_beside(path: str) -> list[str]:
    """The folders that lie where one of this path would: candidates for what was meant, should there be none."""
    parent = Path(path).expanduser().parent
    try:
        return [str(other) for other in parent.iterdir() if other.is_dir() and not other.name.startswith(".")]
    except OSError:
        return []


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


class SuggestingParser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest option, command or choice where one is mistyped.

    Python has the like of it for choices from 3.14 on, and for options not at all. A command reads all that stands
    behind it, and so refuses what it does not know itself: with its own usage, and not that of the program.
    """

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            hint = "" if option is None else nearest(option, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(action, f"{error.message}.{nearest(value, action.choices)}") from None
