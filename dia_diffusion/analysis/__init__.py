"""What the attention maps of a model have in common."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    command="analyze",
    similarity="VIEWS channel_correlations describe",
)
