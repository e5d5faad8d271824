"""Samples in an `.npz` file, as the tools of ADM and EDM write them: `arr_0`, uint8 of shape `(N, H, W, C)`.

An array of another name is read where no other has the dimensions of images, and so is the array of an `.npy` file.
Channels may come first, as torch has them.
"""

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.decoding import image_to_pixels
from ..errors import UsageError, first_line
from ..files import file_digest

SAMPLES = "arr_0"
STATISTICS = ("mu", "sigma")
# zipfile and numpy raise these for truncated, broken and other files.
UNREADABLE_ARCHIVE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
    OverflowError,
)
_BLOCK = 2**20
# How an `.npy` file begins, and the name of its array here.
_MAGIC, _SINGLE = b"\x93NUMPY", "the array"


def array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the names of the arrays in an `.npz` file, or the one of an `.npy` file, and their shapes.

    Raises:
        UsageError: if it cannot be read.
    """
    with _readable(path):
        if _is_single(path):
            with path.open("rb") as file:
                return {_SINGLE: _read_header(file)[0]}
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): _read_header(archive.open(name))[0] for name in names}


def samples_name(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the name of the array of images: `arr_0`, or the only one that is there or has their dimensions."""
    if SAMPLES in shapes or set(shapes) & set(STATISTICS):
        return SAMPLES if SAMPLES in shapes else None
    found = list(shapes) if len(shapes) == 1 else [name for name, shape in shapes.items() if len(shape) in (3, 4)]
    return found[0] if len(found) == 1 else None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Explain in words why a file of arrays cannot be read."""
    try:
        yield
    except UNREADABLE_ARCHIVE as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UsageError:
    """Return the error for a file of arrays that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return UsageError(f"'{path}' cannot be read: there is no such file.")
    return UsageError(
        f"'{path}' is not a readable file of arrays: {first_line(error)}. If it was downloaded, download it again."
    )


def _is_single(path: Path) -> bool:
    """Tell whether a file is an `.npy` file: by its content, and by its name where it is no zip file either."""
    with path.open("rb") as file:
        begin = file.read(len(_MAGIC))
    return begin == _MAGIC or (path.suffix.lower() == ".npy" and not begin.startswith(b"PK"))


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read shape, whether the order is Fortran's, and type, and leave the file where the numbers begin."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class ArchiveImages:
    """Images that lie in an `.npz` or `.npy` file; they are mapped into memory where the file is not compressed.

    Args:
        path (`Path`): The file.
        resolution (`int`, *optional*): Pixels of the shorter side; by default as they are. Resized as those of
            `prepare_pixels`.

    Raises:
        UsageError: if it cannot be read, or holds something else.
    """

    def __init__(self, path: Path, resolution: int | None = None):
        shapes = array_shapes(path)
        name = samples_name(shapes)
        if name is None:
            raise UsageError(f"'{path}' holds no images ('{SAMPLES}'), only: {', '.join(shapes) or 'nothing'}.")
        with _readable(path):
            self.array, self.fingerprint = _map(path, name)
        shape = self.array.shape
        if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
            # Channels first, as in torch.
            self.array = self.array.transpose(0, 2, 3, 1)
            shape = self.array.shape
        # Three dimensions, the last of them channels, are one picture.
        known = shape[2] > 4 if len(shape) == 3 else len(shape) == 4 and shape[3] in (1, 3)
        if self.array.dtype != np.uint8 or not known or 0 in shape:
            raise UsageError(
                f"'{name}' of '{path}' must hold images, uint8 of shape (N, H, W, 1 or 3), but is "
                f"{self.array.dtype} of shape {shape}. Store pixels as whole numbers from 0 to 255."
            )
        self.channels = shape[3] if len(shape) == 4 else 1
        self.resolution = min(shape[1:3]) if resolution is None else resolution
        self.fingerprint += f"-{self.resolution}"

    def __len__(self) -> int:
        return len(self.array)

    def images_at(self, numbers: range) -> Tensor:
        """Return these images, uint8 of shape `(B, C, R, R)`: the middle of those that are not square."""
        rows = np.asarray(self.array[numbers.start : numbers.stop : numbers.step])
        pixels = rows.reshape(*rows.shape[:3], self.channels).transpose(0, 3, 1, 2)
        if min(pixels.shape[2:]) != self.resolution:
            resized = [image_to_pixels(Image.fromarray(row.squeeze()), self.resolution, self.channels) for row in rows]
            pixels = np.stack(resized)
        top, left = (round(0.5 * (side - self.resolution)) for side in pixels.shape[2:])
        cut = pixels[:, :, top : top + self.resolution, left : left + self.resolution]
        return torch.from_numpy(np.array(cut, order="C"))

    def digest(self, with_classes: bool = True) -> str:
        """Return the digest that a `PixelDataset` of these images has."""
        digest = hashlib.sha256(str((len(self), self.channels, self.resolution, None)).encode())
        for index in range(0, len(self), -(-len(self) // 1000)):
            digest.update(self.images_at(range(index, index + 1)).numpy().tobytes())
        return digest.hexdigest()


def _map(path: Path, name: str) -> tuple[np.ndarray, str]:
    """Return the array and the digest of its bytes, which are all read once: a file that lacks some is noticed here."""
    if _is_single(path):
        with path.open("rb") as file:
            return _map_array(file), file_digest(path)
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            while block := member.read(_BLOCK):
                digest.update(block)
    if info.compress_type != zipfile.ZIP_STORED:
        with np.load(path, allow_pickle=False) as file:
            return file[name], digest.hexdigest()
    with path.open("rb") as file:
        # The local header of the member, whose name and extra field may be of other lengths than in the directory.
        file.seek(info.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        return _map_array(file), digest.hexdigest()


def _map_array(file: Any) -> np.ndarray:
    """Map the array into memory whose header comes next in a file."""
    shape, fortran, dtype = _read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")
