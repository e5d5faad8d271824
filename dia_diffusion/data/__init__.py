"""Images to learn from and to compare with: data sets, decoding, rows of pixels, and pictures of many."""

from .decoding import UNREADABLE, to_unit_range
from .embedded import EMBEDDED
from .grid import image_grid
from .pixels import EndlessShuffle, PixelDataset, prepare_at_own_size, prepare_pixels
from .sources import DIGITS, load_dataset_splits, load_images

__all__ = [
    "DIGITS",
    "EMBEDDED",
    "UNREADABLE",
    "EndlessShuffle",
    "PixelDataset",
    "image_grid",
    "load_dataset_splits",
    "load_images",
    "prepare_at_own_size",
    "prepare_pixels",
    "to_unit_range",
]
