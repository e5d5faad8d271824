"""The doors of packages: what they show to others, imported when it is first asked for."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def open_door(package: str, **shown: str) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package that shows, of each of its modules, the names listed here.

    torch, diffusers and datasets take seconds to import; a command should wait only for those that it needs.
    """
    places = {name: module for module, names in shown.items() for name in names.split()}

    def find(name: str) -> Any:
        if name in places:
            return getattr(import_module(f"{package}.{places[name]}"), name)
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return find, sorted(places)
