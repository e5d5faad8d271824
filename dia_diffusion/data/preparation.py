"""From a data set to rows of pixels.

Decoding and resizing happen once. `datasets` keeps the result in its cache as a memory-mapped file, keyed by the
contents of the data and the preprocessing, so that it may be larger than memory and a later run finds it ready.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from datasets.fingerprint import Hasher
from filelock import FileLock

from ..errors import UsageError, first_line
from ..process.signals import forks_end_with_parent
from ..process.startup import available_cores
from .cache import cache_place, find_in_cache, hash_files
from .columns import find_image_column, find_label_column, name_classes, read_labels
from .decoding import DTYPES, GREY_MODES, PICTURES, UNREADABLE, image_to_pixels, on_white, open_header, open_image
from .pixels import PixelDataset, list_names

# Part of the cache key: raise it whenever the same image would give other pixels.
_PREPROCESSING_VERSION = 3
# The least number of images for which a further process is started.
_IMAGES_A_PROCESS = 1000
# The bytes that a process gathers before it writes.
_BYTES_A_WRITE = 2**26
_ROWS = "rows.arrow"
# The columns of prepared images: pixels, and properties of their files.
_FEATURES = datasets.Features(
    pixels=datasets.Value("large_binary"),
    width=datasets.Value("int32"),
    height=datasets.Value("int32"),
    label=datasets.Value("int64"),
    kind=datasets.Value("string"),
    file_width=datasets.Value("int32"),
    file_height=datasets.Value("int32"),
    transparent=datasets.Value("bool"),
    pictures=datasets.Value("int32"),
)


class BadImageError(UsageError):
    """An image cannot be used: it cannot be read, or has no label."""


def prepare_pixels(
    dataset: Dataset,
    resolution: int,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    with_labels: bool = False,
    on_bad_image: str = "error",
    bits: int = 8,
    trained: tuple[Sequence[str], Sequence[int]] | None = None,
    cache_dir: str | None = None,
    num_workers: int | None = None,
) -> PixelDataset:
    """Decode every image of a data set once: the shorter side becomes `resolution` pixels, the rest stays to crop.

    Args:
        dataset (`datasets.Dataset`): Data with a column of images.
        resolution (`int`): Pixels of the shorter side; resized bilinearly with antialiasing, as Pillow does it.
        channels (`int`, *optional*): 1 or 3; by default 3 as soon as one of the images has colour.
        image_column, label_column (`str`, *optional*): Names of columns, where they cannot be guessed.
        with_labels (`bool`, *optional*, defaults to `False`):
            Whether to keep the labels. Classes are those that occur, and text counts as names of classes.
        on_bad_image (`str`, *optional*, defaults to `"error"`):
            `error` stops at a broken image or one without a label, `skip` leaves it out.
        bits (`int`, *optional*, defaults to 8): 16 keeps the precision of images that have 16 bits for a pixel.
        trained (`tuple`, *optional*):
            The class names that a model knows and the numbers of those that it was trained on: images have the
            numbers that it knows their classes by, and others are left out.
        cache_dir (`str`, *optional*): Where prepared images are kept; by default in the cache of `datasets`.
        num_workers (`int`, *optional*):
            Processes that decode, by default one for each core, and at most one for each thousand images. The rows and
            their fingerprint are the same whatever their number.
    """
    if resolution < 1:
        raise UsageError(f"resolution must be at least 1, but is {resolution}.")
    if channels not in (None, 1, 3):
        raise UsageError(f"channels must be 1 (grey) or 3 (colour), but is {channels}.")
    if on_bad_image not in ("error", "skip"):
        raise UsageError(f"on_bad_image must be 'error' or 'skip', but is '{on_bad_image}'.")
    image_column = find_image_column(dataset, image_column)
    label_column = find_label_column(dataset, label_column) if with_labels else None
    if label_column:
        dataset = name_classes(dataset, label_column)
    raw = dataset.select_columns([image_column] + ([label_column] if label_column else []))
    raw = raw.cast_column(image_column, datasets.Image(decode=False))
    settings = {
        "resolution": resolution,
        "channels": channels,
        "image_column": image_column,
        "label_column": label_column,
        "on_bad_image": on_bad_image,
        "bits": bits,
    }
    content = hash_files(_files_of(raw, image_column))
    name = Hasher.hash((dataset._fingerprint, content, (*settings.values(), _PREPROCESSING_VERSION)))
    place = find_in_cache(cache_dir, "dia_pixels", name) / _ROWS
    if not _is_ready(place):
        place = cache_place(cache_dir, "dia_pixels", name) / _ROWS
    with _only_one_at(place):
        if channels is None and not _is_ready(place):
            channels = settings["channels"] = _count_channels(raw, image_column)
        rows = _decode(raw, settings, name, place, num_workers)
    left_out = []
    if len(rows) < len(raw):
        left_out.append(f"{len(raw) - len(rows)} of {len(raw)} images could not be read and were left out")
    labels, class_names = None, None
    if label_column:
        labels, class_names, absent = read_labels(rows, dataset.features[label_column], trained)
        if absent:
            left_out.append(
                f"{len(absent)} of {len(absent) + len(np.unique(labels[labels >= 0]))} classes have no training image"
                f" and are left out: {list_names(absent, numbered=False)}"
            )
        known = labels >= 0
        if not known.all():
            why = f"{np.sum(~known)} of {len(known)} images have no label in column '{label_column}' (empty or below 0)"
            if trained is not None:
                why += " or one that no training image has"
            elif on_bad_image == "error":
                raise BadImageError(f"{why}.")
            left_out.append(f"{why}, and were left out")
            rows, labels = rows.select(np.flatnonzero(known)), labels[known]
    if len(rows) == 0 and trained is None:
        raise UsageError(f"no image could be used: {'; '.join(left_out) or 'the data set is empty'}.")
    if channels is None:
        first = rows[0]
        channels = len(first["pixels"]) // (first["width"] * first["height"] * np.dtype(DTYPES[bits]).itemsize)
    return PixelDataset(rows, resolution, channels, labels, class_names, bits, left_out)


def prepare_at_own_size(dataset: Dataset) -> PixelDataset:
    """Prepare images at the size of the first: generated images all have one size."""
    column = find_image_column(dataset)
    try:
        with open_image(dataset.cast_column(column, datasets.Image(decode=False))[0][column]) as image:
            resolution = min(image.size)
    except UNREADABLE as error:
        raise UsageError(f"the first image cannot be read: {error}.") from error
    return prepare_pixels(dataset, resolution, image_column=column)


@contextmanager
def _only_one_at(place: Path) -> Iterator[None]:
    """Let one of several runs that start together prepare the images, and the others find them ready.

    Removes the unfinished files of a killed run.
    """
    if _is_ready(place):
        yield
        return
    with FileLock(place.with_suffix(".lock")):
        for stale in place.parent.glob("tmp*"):
            stale.unlink()
        yield


def _is_ready(place: Path) -> bool:
    """Tell whether the rows are there: in one file, or in as many as there were processes."""
    parts = [path.stem.rpartition("_of_")[2] for path in place.parent.glob(f"{place.stem}_*_of_*.arrow")]
    return place.exists() or any(parts.count(number) == int(number) for number in parts)


def _decode(raw: Dataset, settings: dict[str, Any], name: str, place: Path, num_workers: int | None) -> Dataset:
    """Return the prepared rows, from the cache if they are there."""
    workers = min(num_workers or available_cores(), max(len(raw) // _IMAGES_A_PROCESS, 1))
    row_bytes = settings["resolution"] ** 2 * 3 * (settings["bits"] // 8)
    try:
        with forks_end_with_parent():
            return raw.map(
                _decode_batch,
                batched=True,
                batch_size=100,
                # By default a thousand rows, which are gigabytes where images are large.
                writer_batch_size=min(max(_BYTES_A_WRITE // row_bytes, 1), 1000),
                with_indices=True,
                remove_columns=raw.column_names,
                features=_FEATURES,
                fn_kwargs=settings | {"started_by": os.getpid()},
                new_fingerprint=name,
                cache_file_name=str(place),
                desc="Preparing images",
                num_proc=workers if workers > 1 else None,
            )
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            # `datasets` raises this for Ctrl-C while its processes run.
            raise KeyboardInterrupt from error
        if isinstance(error, OSError):
            raise UsageError(
                f"cannot keep prepared images in '{place.parent}': {first_line(error)}. Make room there, or name "
                "another folder with --cache_dir or HF_DATASETS_CACHE."
            ) from error
        if "abruptly died" not in str(error):
            raise
        raise UsageError(
            f"one of {workers} processes that decoded images was killed, perhaps for want of memory: use fewer "
            "(--preprocessing_num_workers 1). What the others finished is kept."
        ) from error


def _files_of(raw: Dataset, image_column: str) -> list[str]:
    """List the files that the data set points to, where it does not hold the images themselves."""
    files = []
    for chunk in raw.data.column(image_column).chunks:
        outside = pc.is_null(pc.struct_field(chunk, "bytes"))
        files += pc.drop_null(pc.struct_field(chunk, "path").filter(outside)).to_pylist()
    # Images in archives came from the Hub and do not change.
    return [path for path in files if "://" not in path or Path(path).exists()]


def _count_channels(raw: Dataset, image_column: str) -> int:
    # Headers say which mode an image has, and the first one of colour decides.
    for row in raw:
        try:
            with open_header(row[image_column]) as image:
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
    started_by: int,
) -> dict[str, list]:
    if os.getpid() != started_by:
        # Ctrl-C is for the process that started this one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    out: dict[str, list] = {name: [] for name in _FEATURES}
    for position, (index, encoded) in enumerate(zip(indices, batch[image_column], strict=True)):
        try:
            with open_image(encoded) as image:
                about = f"{image.format or 'unknown'} {image.mode}", *image.size
                pictures = image.info[PICTURES]
                opaque, transparent = on_white(image)
                pixels = image_to_pixels(opaque, resolution, channels, bits)
        except UNREADABLE as error:
            if on_bad_image == "skip":
                continue
            name = f"'{encoded['path']}'" if encoded and encoded.get("path") else "image"
            reason = str(error) or type(error).__name__
            raise BadImageError(
                f"{name} (number {index} of the data set) cannot be read: {reason}. Repair or remove it."
            ) from error
        label = batch[label_column][position] if label_column else None
        values = (pixels.tobytes(), pixels.shape[2], pixels.shape[1], -1 if label is None else label)
        for name, value in zip(_FEATURES, (*values, *about, transparent, pictures), strict=True):
            out[name].append(value)
    return out
