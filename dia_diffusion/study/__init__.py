"""Variants of a model, each trained from several seeds, and what their differences are worth."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    command="Cluster run_study",
    report="compare",
)
