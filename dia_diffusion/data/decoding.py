"""Decode image files to pixels, and convert pixels to a model's input and back."""

from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
# Modes of Pillow that hold no colour.
GREY_MODES = frozenset({"1", "L", "LA", "La", "F", *_DEEP_MODES})
# Pillow's many decoders raise anything at a broken file: struct.error, KeyError, zlib.error, MemoryError and more.
UNREADABLE = (Exception,)
PICTURES = "pictures"
DTYPES = {8: np.uint8, 16: np.uint16}
# Formats whose 16-bit grey is known to be unsigned, and those whose "I" is such grey.
_DEEP_FORMATS = {None, "PNG", "TIFF", "PPM", "JPEG2000"}
_DEEP_IN_32_BITS = {"PNG", "PPM"}
_MOST_PIXELS = 1 << 28
# The transposition that undoes each orientation tag (Exif 2.32, 4.6.4).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


LFS_POINTER = "it is a pointer of Git LFS and not the file itself: fetch that with git lfs pull"


def is_lfs_pointer(file: str | Path) -> bool:
    """Tell whether a file holds the text that Git leaves where Git LFS did not fetch the file."""
    with Path(file).open("rb") as stream:
        return stream.read(26) == b"version https://git-lfs.gi"


def open_header(encoded: dict[str, Any] | None) -> Image.Image:
    """Open a cell of an image column, as `datasets` stores it (`bytes` or a `path`), without decoding its pixels.

    Raises:
        One of `UNREADABLE`: if it cannot be read.
    """
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise ValueError("the cell is empty")
    if encoded["bytes"] is not None:
        return _open(BytesIO(encoded["bytes"]))
    if "://" in encoded["path"] and not Path(encoded["path"]).exists():
        # A path inside of an archive, as in data sets of the Hub.
        with fsspec.open(encoded["path"], "rb") as file:
            return _open(BytesIO(file.read()))
    return _open(encoded["path"])


def _open(file: Any) -> Image.Image:
    # Pillow refuses more than 179 megapixels, and warns from 89 on.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        pointer = isinstance(file, str) and is_lfs_pointer(file)
        raise ValueError(LFS_POINTER if pointer else "it is not an image of a kind that Pillow reads") from error
    finally:
        Image.MAX_IMAGE_PIXELS = before
    if image.width * image.height > _MOST_PIXELS:
        size, most = f"{image.width}x{image.height}", f"{_MOST_PIXELS // 10**6}"
        image.close()
        raise ValueError(f"it has {size} pixels, more than {most} million: make it smaller")
    return image


def open_image(encoded: dict[str, Any] | None) -> Image.Image:
    """Open an image as `open_header` does, decode it, and turn it as its orientation tag says.

    The number of its pages or frames, of which the first counts, is in `info["pictures"]`.

    Raises:
        One of `UNREADABLE`: if it cannot be read.
    """
    with open_header(encoded) as image:
        pictures = _count_pictures(image)
        layout = str(getattr(image, "tile", ""))
        image.load()
        image = _scale_to_mode(image, layout)
    image.info[PICTURES] = pictures
    if image.mode == "I" and image.format not in _DEEP_IN_32_BITS:
        raise ValueError("32-bit integer pixels have no known range; save the image with 8 or 16 bits")
    if image.mode in _DEEP_MODES and image.format not in _DEEP_FORMATS:
        raise ValueError(f"16-bit pixels of {image.format} have no known range; save the image as PNG")
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Broken metadata says nothing about the pixels.
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def _count_pictures(image: Image.Image) -> int:
    # The second picture of a photograph (MPO) is a preview of the first.
    if image.format == "MPO":
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:
        # Broken later frames do not matter: the first one is used.
        return 1


def _scale_to_mode(image: Image.Image, layout: str) -> Image.Image:
    """Scale values that Pillow leaves in the range of the file to the range of the image's mode.

    Args:
        image (`PIL.Image.Image`), layout (`str`): The image, and how its file held the pixels (`image.tile`).
    """
    key = image.info.get("transparency")
    if "'L;2'" in layout and isinstance(key, int):
        image.info["transparency"] = key * 85
    elif "'L;4'" in layout and isinstance(key, int):
        image.info["transparency"] = key * 17
    elif "RGB;16" in layout and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif "'I;12'" in layout:
        scaled = Image.fromarray((np.asarray(image).astype(np.uint32) * 65535 // 4095).astype(np.uint16))
        scaled.format, scaled.info = image.format, image.info
        return scaled
    return image


def on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an image composited on white where it is transparent, and whether it was transparent anywhere."""
    if not image.has_transparency_data:
        return image, False
    if image.mode in _DEEP_MODES:
        pixels = np.asarray(image)
        clear = pixels == image.info["transparency"]
        white = Image.fromarray(np.where(clear, 65535, pixels).astype(np.uint16))
        return white, bool(clear.any())
    has_colour = image.mode not in GREY_MODES
    # Pillow converts premultiplied grey (La) to LA only.
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    transparent = bool(np.asarray(image.getchannel("A")).min() < 255)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB" if has_colour else "L"), transparent


def image_to_pixels(image: Image.Image, resolution: int, channels: int, bits: int = 8) -> np.ndarray:
    """Return the pixels of one image: uint8 or uint16 of shape `(channels, H, W)`, the shorter side `resolution`.

    Sixteen-bit grey is scaled to eight bits, which Pillow's own conversion would clip. Transparent pixels lie on white.
    The first picture of an animation counts.

    Raises:
        ValueError: for an image without pixels or without a known range of values, or one that is too long.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image with 8 or 16 bits")
    short = min(image.size)
    if short == 0:
        raise ValueError("the image has no pixels")
    width, height = (max(resolution, round(side * resolution / short)) for side in image.size)
    size = (width, height)
    if width * height > _MOST_PIXELS:
        raise ValueError(f"it is too long for its width: {width}x{height} pixels at resolution {resolution}")
    image, _ = on_white(image)
    if image.mode in _DEEP_MODES:
        # Pillow resizes deep images only as floats.
        deep = Image.fromarray(np.asarray(image).astype(np.float32).clip(0, 65535))
        resized = np.asarray(deep.resize(size, Image.Resampling.BILINEAR) if size != image.size else deep)
        pixels = np.repeat(resized[None], channels, axis=0) / (1 if bits == 16 else 257)
        return np.rint(pixels).astype(DTYPES[bits])
    if channels == 1 and image.mode == "LAB":
        # Pillow converts this mode to colour only.
        image = image.convert("RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR) if size != image.size else image)
    pixels = pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return pixels if bits == 8 else pixels.astype(np.uint16) * 257


def to_unit_range(images: Tensor) -> Tensor:
    """Convert uint8 or uint16 pixels to floats in [-1, 1], the range of a diffusion model's input."""
    return images.float() / (torch.iinfo(images.dtype).max / 2) - 1


def to_pixels(images: Tensor) -> Tensor:
    """Round floats in [-1, 1] to uint8 pixels: the inverse of `to_unit_range`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
