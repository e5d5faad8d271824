"""Argument parsers that suggest the closest known name for a misspelled one."""

import argparse
from collections.abc import Sequence
from typing import Any

from ..errors import nearest


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
