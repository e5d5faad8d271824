"""Images as rows of pixels of one size, their order in training, and the line that describes them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from .decoding import DTYPES, to_pixels, to_unit_range


def _middle(row: int) -> tuple[float, float]:
    return 0.5, 0.5


class PixelDataset:
    """Images as uint8 pixels of one size.

    Args:
        rows (`datasets.Dataset`): What `prepare_pixels` made.
        resolution (`int`): Height and width R of the images.
        channels (`int`): Number C of channels, 1 or 3.
        labels (`np.ndarray` of shape `(N,)`, *optional*): Their classes, int64.
        class_names (`list[str]`, *optional*): The names of the classes, in the order of their numbers.
        bits (`int`, *optional*, defaults to 8): 8 or 16 bits for a pixel.
        left_out (`list[str]`, *optional*): Sentences on images that were left out.
    """

    def __init__(
        self,
        rows: Dataset,
        resolution: int,
        channels: int,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        bits: int = 8,
        left_out: Sequence[str] = (),
    ):
        self.prepared = rows
        self.rows = rows.select_columns(["pixels", "width"]).with_format("arrow")
        self.resolution = resolution
        self.channels = channels
        self.labels = labels
        self.class_names = class_names
        self.dtype = DTYPES[bits]
        self.left_out = list(left_out)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def pixels(self) -> "PixelDataset":
        """Return the images in pixels: for pixels themselves, for latents the images that were encoded."""
        return self

    @property
    def num_classes(self) -> int | None:
        """The number of classes; `None` without labels."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def id2label(self) -> dict[int, str] | None:
        """The name of each class by its number; `None` without labels."""
        return None if self.class_names is None else dict(enumerate(self.class_names))

    @property
    def fingerprint(self) -> str:
        """The name of the prepared rows in the cache: it changes with the images, their place and the preprocessing."""
        return self.prepared._fingerprint

    def digest(self, with_classes: bool = True, with_labels: bool = True) -> str:
        """Return the SHA-256 of the number of images, of up to a thousand of them and of all labels, wherever they lie.

        Args:
            with_classes (`bool`, *optional*, defaults to `True`): Whether labels and their number count as well.
            with_labels (`bool`, *optional*, defaults to `True`): `False` for the digest of older versions.
        """
        num_classes = self.num_classes if with_classes else None
        digest = hashlib.sha256(str((len(self), self.channels, self.resolution, num_classes)).encode())
        for index in range(0, len(self), -(-len(self) // 1000)):
            digest.update(self.fetch([index])["images"].numpy().tobytes())
        if self.labels is not None and with_classes and with_labels:
            digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        return digest.hexdigest()

    def select(self, indices: np.ndarray) -> "PixelDataset":
        """Return some of the images, with the same classes."""
        labels = None if self.labels is None else self.labels[indices]
        bits = 8 * np.dtype(self.dtype).itemsize
        rows = self.prepared.select(indices)
        return PixelDataset(rows, self.resolution, self.channels, labels, self.class_names, bits, self.left_out)

    def fetch(self, indices: Sequence[int], crop: Callable[[int], Sequence[float]] = _middle) -> dict[str, Tensor]:
        """Return the pixels of some images, and their labels where there are any.

        Args:
            indices (`Sequence[int]` of length B): Which images.
            crop (`Callable`, *optional*):
                Called with the row of an image that is not square; returns the position of the cut, as two numbers
                from 0 (top, left) to 1 (bottom, right). By default the middle.

        Returns:
            `dict`: `images`, uint8 or uint16 of shape `(B, C, R, R)`, and `labels`, int64 of shape `(B,)`.
        """
        table = self.rows[list(indices)]
        size, channels = self.resolution, self.channels
        images = np.empty((len(indices), channels, size, size), dtype=self.dtype)
        for row, (data, width) in enumerate(zip(table["pixels"].to_pylist(), table["width"].to_pylist(), strict=True)):
            image = np.frombuffer(data, dtype=self.dtype).reshape(channels, -1, width)
            if image.shape[1:] != (size, size):
                down, across = crop(row)
                top, left = round(down * (image.shape[1] - size)), round(across * (width - size))
                image = image[:, top : top + size, left : left + size]
            images[row] = image
        batch = {"images": torch.from_numpy(images)}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[list(indices)])
        return batch

    def draw(self, seed: int, step: int, count: int, device: torch.device | str = "cpu") -> None:
        """Draw nothing: the model's input is the image itself. (Latents are drawn from their posterior.)"""

    def model_inputs(
        self, batch: Mapping[str, Tensor], flips: Tensor | None = None, draws: Tensor | None = None
    ) -> Tensor:
        """Return the input of a diffusion model: floats in [-1, 1] of shape `(B, C, R, R)`.

        Args:
            batch (`dict`): From `fetch`, on any device.
            flips (bool `Tensor` of shape `(B,)`, *optional*): Marks images to flip horizontally.
            draws (`Tensor`, *optional*): Has no meaning here.
        """
        images = to_unit_range(batch["images"])
        return images if flips is None else torch.where(flips[:, None, None, None], images.flip(-1), images)

    def images_at(self, numbers: range) -> Tensor:
        """Return images by their numbers: uint8 of shape `(B, C, R, R)`."""
        images = self.fetch(numbers)["images"]
        return images if images.dtype == torch.uint8 else to_pixels(to_unit_range(images))


class EndlessShuffle(torch.utils.data.Dataset):
    """The training images in an endless order: a new permutation for each epoch.

    The image at a position depends on the seed and the position alone, so that a run can be resumed at any step, and
    any number of processes can share the positions of a batch.

    Args:
        dataset (`PixelDataset`, or another with its `fetch`): The images.
        seed (`int`): Seed of the order and of the crops.
        center_crop (`bool`): Whether images that are not square are cut in the middle or at random.
    """

    def __init__(self, dataset: Any, seed: int, center_crop: bool):
        self.dataset = dataset
        self.seed = seed
        self.center_crop = center_crop

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        size = len(self.dataset)
        epochs, places = np.divmod(np.asarray(positions), size)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = _permutation(self.seed, int(epoch), size)[places[now]]
        indices = places.tolist()
        if self.center_crop:
            return self.dataset.fetch(indices)
        return self.dataset.fetch(
            indices, lambda row: np.random.default_rng((self.seed, 1, positions[row])).random(2).tolist()
        )


# A batch may reach into the next epoch.
@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of the images in an epoch, int64: 8 bytes an image."""
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


_MOST_NAMES = 20


def describe_images(pixels: PixelDataset, origin: str) -> str:
    """Describe images in a line: their number, origin, sizes, kinds, use and classes, and what is left out of them.

    Args:
        pixels (`PixelDataset`): The images.
        origin (`str`): The data set or the folder.
    """
    about = pixels.prepared.select_columns(
        ["kind", "file_width", "file_height", "transparent", "pictures"]
    ).with_format("arrow")[:]
    split = pixels.prepared.split
    widths, heights = pc.min_max(about["file_width"]).as_py(), pc.min_max(about["file_height"]).as_py()
    low, high = (f"{widths[bound]}x{heights[bound]}" for bound in ("min", "max"))
    counts = pc.value_counts(about["kind"]).to_pylist()
    kinds = [(one["values"], one["counts"]) for one in sorted(counts, key=lambda one: -one["counts"])]
    named = ", ".join(kind if len(kinds) == 1 else f"{count:,} {kind}" for kind, count in kinds)
    colour = "grey" if pixels.channels == 1 else "colour"
    lines = [
        f"{len(pixels):,} images of '{origin}'{f', split {split}' if split else ''}: "
        f"{low if low == high else f'from {low} to {high}'} pixels, {named}; "
        f"taken as {pixels.resolution}x{pixels.resolution} in {colour}"
    ]
    transparent = pc.sum(about["transparent"]).as_py()
    if transparent:
        lines.append(f"{transparent:,} of them are transparent: they lie on white")
    unused = pc.sum(about["pictures"]).as_py() - len(pixels)
    if unused:
        files = pc.sum(pc.greater(about["pictures"], 1)).as_py()
        lines.append(f"{unused:,} more pages or frames of {files:,} of the files are not used, only the first of each")
    lines += pixels.left_out
    if pixels.class_names is not None:
        lines.append(f"{len(pixels.class_names)} classes: {list_names(pixels.class_names)}")
    return "; ".join(lines) + "."


def list_names(names: list[str], numbered: bool = True) -> str:
    """Join the names of classes, all or the first twenty, with their numbers where those differ from the names."""
    shown = [
        name if name == str(number) or not numbered else f"{number} {name}"
        for number, name in enumerate(names[:_MOST_NAMES])
    ]
    return ", ".join(shown) + (", ..." if names[_MOST_NAMES:] else "")
