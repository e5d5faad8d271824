"""What the attention maps of a model have in common."""

from .command import analyze

__all__ = ["analyze"]
