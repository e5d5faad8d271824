"""Types of the examples' flags. What a flag cannot take is refused before the work begins."""

from argparse import ArgumentTypeError
from pathlib import Path

from dia_diffusion.options.fields import COUNT, NATURAL, Range, number_type

count = number_type(int, COUNT)
whole = number_type(int, NATURAL)
natural = number_type(float, NATURAL)
# What NumPy takes as a seed, too.
seed = number_type(int, Range(least=0, most=2**32 - 1))


def folder(text: str) -> Path:
    """Return the path of a folder that exists or can be made."""
    path = Path(text).expanduser()
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ArgumentTypeError(f"'{nearest}' is a file, and a folder is needed there: choose another.")
    return path
