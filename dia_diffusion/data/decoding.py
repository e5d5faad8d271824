"""From image files to pixels, and from pixels to what a model sees and back."""

from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

_DEEP_MODES = ("I", "I;16", "I;16B")
# Modes of Pillow that hold no colour.
GREY_MODES = frozenset({"1", "L", "LA", "F", *_DEEP_MODES})
# What Pillow's many decoders raise at a broken file, and this module at one that it cannot use.
UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
DTYPES = {8: np.uint8, 16: np.uint16}


def open_image(encoded: dict[str, Any] | None) -> Image.Image:
    """Decodes a cell of an image column, as `datasets` stores it: `bytes` or a `path`.

    Raises:
        One of `UNREADABLE`: if it cannot be read.
    """
    if encoded is None:
        raise ValueError("the cell is empty")
    # Orientation tags are applied here as well.
    return datasets.Image().decode_example(encoded)


def image_to_pixels(image: Image.Image, resolution: int, channels: int, bits: int = 8) -> np.ndarray:
    """Pixels of one image: uint8 or uint16 of shape `(channels, H, W)`, of which the shorter side is `resolution`.

    Sixteen-bit grey is scaled to eight bits, which Pillow's own conversion would clip; alpha is dropped; of an
    animation the first picture counts.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image with 8 or 16 bits")
    short = min(image.size)
    size = tuple(max(resolution, round(side * resolution / short)) for side in image.size)
    if image.mode in _DEEP_MODES:
        # Pillow resizes deep images only as floats.
        deep = Image.fromarray(np.asarray(image).astype(np.float32).clip(0, 65535))
        resized = np.asarray(deep.resize(size, Image.Resampling.BILINEAR) if size != image.size else deep)
        pixels = np.repeat(resized[None], channels, axis=0) / (1 if bits == 16 else 257)
        return np.rint(pixels).astype(DTYPES[bits])
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR) if size != image.size else image)
    pixels = pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return pixels if bits == 8 else pixels.astype(np.uint16) * 257


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 or uint16 pixels to floats in [-1, 1], the range that diffusion models see."""
    return images.float() / (torch.iinfo(images.dtype).max / 2) - 1


def to_pixels(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 pixels, rounded; the inverse of `to_unit_range`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
