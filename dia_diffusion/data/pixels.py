"""Images as rows of pixels of one size.

Decoding and resizing happen once. `datasets` keeps the result in its cache as a memory-mapped file, keyed by the
fingerprint of the data and the preprocessing, so that it may be larger than memory and a later run finds it ready.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor

from ..errors import UsageError
from .decoding import DTYPES, GREY_MODES, UNREADABLE, image_to_pixels, open_image, to_pixels, to_unit_range
from .sources import find_image_column, find_label_column

# Part of the cache key: raise it whenever the same image would give other pixels.
_PREPROCESSING_VERSION = 1
_HEADERS_READ_FOR_CHANNELS = 1000


def _middle(row: int) -> tuple[float, float]:
    return 0.5, 0.5


class PixelDataset:
    """Images as uint8 pixels of one size.

    Args:
        rows (`datasets.Dataset`): What `prepare_pixels` made.
        resolution (`int`): Height and width R of the images.
        channels (`int`): Number C of channels, 1 or 3.
        num_classes (`int`, *optional*): Number of classes; `None` without labels.
        bits (`int`, *optional*, defaults to 8): 8 or 16 bits for a pixel.
    """

    def __init__(self, rows: Dataset, resolution: int, channels: int, num_classes: int | None = None, bits: int = 8):
        self.rows = rows.with_format("arrow")
        self.resolution = resolution
        self.channels = channels
        self.num_classes = num_classes
        self.dtype = DTYPES[bits]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Changes with the images, their place and the preprocessing: the name of the prepared rows in the cache."""
        return self.rows._fingerprint

    def digest(self, with_classes: bool = True) -> str:
        """Of the number of images and of up to a thousand of them: the same wherever the data lies.

        Args:
            with_classes (`bool`, *optional*, defaults to `True`): Whether the number of classes counts as well.
        """
        num_classes = self.num_classes if with_classes else None
        digest = hashlib.sha256(str((len(self), self.channels, self.resolution, num_classes)).encode())
        for index in range(0, len(self), -(-len(self) // 1000)):
            digest.update(self.fetch([index])["images"].numpy().tobytes())
        return digest.hexdigest()

    def fetch(self, indices: Sequence[int], crop: Callable[[int], Sequence[float]] = _middle) -> dict[str, Tensor]:
        """Pixels, and labels where there are any, of some images.

        Args:
            indices (`Sequence[int]` of length B): Which images.
            crop (`Callable`, *optional*):
                Called with the row of an image that is not square; says where to cut it, as two numbers from 0 (top,
                left) to 1 (bottom, right). By default in the middle.

        Returns:
            `dict`: `images`, uint8 or uint16 of shape `(B, C, R, R)`, and `labels`, int64 of shape `(B,)`.
        """
        table = self.rows[list(indices)]
        size, channels = self.resolution, self.channels
        images = np.empty((len(indices), channels, size, size), dtype=self.dtype)
        for row, (data, width) in enumerate(
            zip(table["pixels"].to_pylist(), table["width"].to_pylist(), strict=True),
        ):
            image = np.frombuffer(data, dtype=self.dtype).reshape(channels, -1, width)
            if image.shape[1:] != (size, size):
                down, across = crop(row)
                top, left = round(down * (image.shape[1] - size)), round(across * (width - size))
                image = image[:, top : top + size, left : left + size]
            images[row] = image
        batch = {"images": torch.from_numpy(images)}
        if self.num_classes is not None:
            batch["labels"] = torch.tensor(table["label"].to_pylist())
        return batch

    def numbered(self, numbers: range) -> Tensor:
        """These images, uint8 of shape `(B, C, R, R)`."""
        images = self.fetch(numbers)["images"]
        return images if images.dtype == torch.uint8 else to_pixels(to_unit_range(images))


class EndlessShuffle(torch.utils.data.Dataset):
    """The training images in an order without end: a new permutation for each epoch.

    What stands at a position is a function of the seed and the position alone, so that a run can go on from any
    step, and any number of processes can share the positions of a batch.

    Args:
        dataset (`PixelDataset`): The images.
        seed (`int`): Seed of the order and of the crops.
        center_crop (`bool`): Whether images that are not square are cut in the middle or at random.
    """

    def __init__(self, dataset: PixelDataset, seed: int, center_crop: bool):
        self.dataset = dataset
        self.seed = seed
        self.center_crop = center_crop

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        size = len(self.dataset)
        indices = [int(_permutation(self.seed, position // size, size)[position % size]) for position in positions]
        if self.center_crop:
            return self.dataset.fetch(indices)
        return self.dataset.fetch(indices, lambda row: np.random.default_rng((self.seed, 1, positions[row])).random(2))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


def prepare_pixels(
    dataset: Dataset,
    resolution: int,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    with_labels: bool = False,
    on_bad_image: str = "error",
    bits: int = 8,
) -> PixelDataset:
    """Decodes every image of a data set once: the shorter side becomes `resolution` pixels, the rest stays to crop.

    Args:
        dataset (`datasets.Dataset`): Data with a column of images.
        resolution (`int`): Pixels of the shorter side; resized bilinearly with antialiasing, as Pillow does it.
        channels (`int`, *optional*): 1 or 3; by default 3 as soon as one of the first thousand images has colour.
        image_column, label_column (`str`, *optional*): Names of columns, where they cannot be guessed.
        with_labels (`bool`, *optional*, defaults to `False`): Whether to keep the labels.
        on_bad_image (`str`, *optional*, defaults to `"error"`): `error` stops at a broken image, `skip` leaves it out.
        bits (`int`, *optional*, defaults to 8): 16 keeps the precision of images that have 16 bits for a pixel.
    """
    if resolution < 1:
        raise UsageError(f"resolution must be at least 1, but is {resolution}.")
    if channels not in (None, 1, 3):
        raise UsageError(f"channels must be 1 (grey) or 3 (colour), but is {channels}.")
    if on_bad_image not in ("error", "skip"):
        raise UsageError(f"on_bad_image must be 'error' or 'skip', but is '{on_bad_image}'.")
    image_column = find_image_column(dataset, image_column)
    label_column = find_label_column(dataset, label_column) if with_labels else None
    raw = dataset.select_columns([image_column] + ([label_column] if label_column else []))
    raw = raw.cast_column(image_column, datasets.Image(decode=False))
    if channels is None:
        channels = _count_channels(raw, image_column)

    settings = {
        "resolution": resolution,
        "channels": channels,
        "image_column": image_column,
        "label_column": label_column,
        "on_bad_image": on_bad_image,
        "bits": bits,
    }
    features = {"pixels": datasets.Value("large_binary"), "width": datasets.Value("int32")}
    if label_column:
        features["label"] = datasets.Value("int64")
    rows = raw.map(
        _decode_batch,
        batched=True,
        batch_size=100,
        with_indices=True,
        remove_columns=raw.column_names,
        features=datasets.Features(features),
        fn_kwargs=settings,
        new_fingerprint=Hasher.hash((dataset._fingerprint, (*settings.values(), _PREPROCESSING_VERSION))),
        desc="Preparing images",
    )
    if len(rows) == 0:
        raise UsageError("no image could be read.")
    if len(rows) < len(raw):
        print(f"{len(raw) - len(rows)} of {len(raw)} images could not be read and were left out.")
    return PixelDataset(rows, resolution, channels, _count_classes(dataset, label_column, rows), bits)


def prepare_at_own_size(dataset: Dataset) -> PixelDataset:
    """Images as `prepare_pixels` makes them, at the size of the first: generated images all have one size."""
    column = find_image_column(dataset)
    try:
        with open_image(dataset.cast_column(column, datasets.Image(decode=False))[0][column]) as image:
            resolution = min(image.size)
    except UNREADABLE as error:
        raise UsageError(f"the first image cannot be read: {error}.") from error
    return prepare_pixels(dataset, resolution, image_column=column)


def _count_classes(dataset: Dataset, label_column: str | None, rows: Dataset) -> int | None:
    if label_column is None:
        return None
    labels = np.asarray(rows["label"])
    if labels.min() < 0:
        raise UsageError(f"column '{label_column}' has labels below 0, which stand for none: leave those images out.")
    feature = dataset.features[label_column]
    return feature.num_classes if isinstance(feature, datasets.ClassLabel) else int(labels.max()) + 1


def _count_channels(raw: Dataset, image_column: str) -> int:
    for index in range(min(len(raw), _HEADERS_READ_FOR_CHANNELS)):
        try:
            with open_image(raw[index][image_column]) as image:
                if image.mode not in GREY_MODES:
                    return 3
        except UNREADABLE:
            continue
    return 1


def _decode_batch(
    batch: dict[str, list],
    indices: list[int],
    image_column: str,
    label_column: str | None,
    resolution: int,
    channels: int,
    bits: int,
    on_bad_image: str,
) -> dict[str, list]:
    out = {"pixels": [], "width": []} | ({"label": []} if label_column else {})
    for position, (index, encoded) in enumerate(zip(indices, batch[image_column], strict=True)):
        try:
            with open_image(encoded) as image:
                pixels = image_to_pixels(image, resolution, channels, bits)
        except UNREADABLE as error:
            if on_bad_image == "skip":
                continue
            name = f"'{encoded['path']}'" if encoded and encoded.get("path") else "image"
            raise UsageError(
                f"{name} (number {index} of the data set) cannot be read: {error}. "
                "Repair or remove it, or leave out such images with --on_bad_image skip."
            ) from error
        out["pixels"].append(pixels.tobytes())
        out["width"].append(pixels.shape[2])
        if label_column:
            out["label"].append(batch[label_column][position])
    return out
