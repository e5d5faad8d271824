"""Generated images by number: from a pipeline as they are asked for, or from files."""

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from ..data.columns import find_image_column, find_label_column
from ..data.decoding import UNREADABLE
from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..files import LOCK, check_output_folder, replace_file, to_json, weights_digest, write_json
from ..sampling.generation import check_sampling, sample_batch
from .archives import ArchiveImages

_RECORD = "settings.json"
# The tag of EXIF that says how a picture is turned, and where that swaps height and width.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
# Multiples of it, modulo 1, fill [0, 1) evenly, however many there are.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class PipelineImages:
    """Images that a pipeline generates; image i is the same whatever the batches and the number of images.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline, or any unconditional pipeline of diffusers.
        num_images, steps, seed (`int`): How many images, denoising steps, and the seed.
        guidance_scale (`float`, *optional*, defaults to 1.0): Strength of guidance, by a guide or classifier-free.
        class_shares (sequence of `float`, *optional*):
            How often a class-conditional pipeline draws each class; by default it takes its classes in turn.
        folder (`Path`, *optional*):
            Where to write each image as a PNG file. Images that are there already are read instead of generated.

    Raises:
        UsageError: if the folder holds images of other settings.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        num_images: int,
        steps: int,
        seed: int = 0,
        guidance_scale: float = 1.0,
        folder: Path | None = None,
        class_shares: Sequence[float] | None = None,
    ):
        if num_images < 2:
            raise UsageError(f"scores need at least 2 generated images, but num_images is {num_images}.")
        check_sampling(pipeline, steps)
        self.pipeline = pipeline
        self.num_images = num_images
        self.steps = steps
        self.seed = seed
        self.guidance_scale = guidance_scale
        self.folder = folder
        # Classes that are drawn equally often are taken in turn.
        self.class_shares = list(class_shares) if class_shares and len(set(class_shares)) > 1 else None
        if folder is not None:
            self._adopt(folder)

    def __len__(self) -> int:
        return self.num_images

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that must be equal for generated images to be comparable, ready for JSON."""
        scheduler = self.pipeline.scheduler
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        settings = {
            "scheduler": type(scheduler).__name__,
            "scheduler_config": json.loads(json.dumps(config, default=str)),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }
        if self.guidance_scale != 1.0 and getattr(self.pipeline, "guide", None) is not None:
            settings["guidance"] = "guide"
        # Scores with classes in turn have no such key, as before there was a choice.
        return settings if self.class_shares is None else settings | {"class_shares": self.class_shares}

    @property
    def origin(self) -> dict[str, Any]:
        """Return where these images come from, ready for JSON."""
        weights = {
            f"{name}.{key}": tensor
            for name, component in self.pipeline.components.items()
            if isinstance(component, nn.Module)
            for key, tensor in component.state_dict().items()
        }
        return {"pipeline": type(self.pipeline).__name__, "weights": weights_digest(weights), "seed": self.seed}

    def images_at(self, numbers: range) -> Tensor:
        """Return these images, uint8 of shape `(B, C, R, R)` on the CPU: the middle of those that are not square, as
        `PixelDataset` cuts real ones."""
        images = self._whole(numbers)
        size = min(images.shape[2:])
        top, left = (round(0.5 * (side - size)) for side in images.shape[2:])
        return images[:, :, top : top + size, left : left + size]

    def _whole(self, numbers: range) -> Tensor:
        paths = [self.folder / f"{number:06d}.png" for number in numbers] if self.folder is not None else []
        if paths and all(path.is_file() for path in paths):
            try:
                return torch.stack([_read(path) for path in paths])
            except UNREADABLE:
                pass  # A broken file is written anew.
        labels = None if self.class_shares is None else draw_classes(self.class_shares, numbers, self.seed)
        images = sample_batch(self.pipeline, numbers, self.steps, self.seed, labels, self.guidance_scale)
        for path, image in zip(paths, images, strict=False):
            picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
            replace_file(path, partial(picture.save, format="PNG"))
        return images

    def _adopt(self, folder: Path) -> None:
        """Refuse a folder with images of another model or other settings, and record those of this one."""
        # As JSON gives them back when they are read.
        mine = json.loads(to_json({"sampling": self.settings, "origin": self.origin}))
        record = folder / _RECORD
        if record.is_file():
            if json.loads(to_json(_load(record))) != mine:
                raise UsageError(f"'{folder}' holds images of another model or other settings; choose another.")
            return
        if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise UsageError(f"'{folder}' is not empty and has no {_RECORD} of earlier scoring; choose another folder.")
        check_output_folder(folder)
        write_json(record, mine)


def draw_classes(shares: Sequence[float], numbers: Sequence[int], seed: int) -> list[int]:
    """Return the class of each image number: evenly spread points, moved by the seed, through the inverse CDF.

    A class depends on the number of its image alone, and among any N images each class comes up about as often as its
    share says, more exactly than by independent draws.

    Args:
        shares (sequence of `float`): How often each class is to come up; together 1.
        numbers (sequence of `int`), seed (`int`): Which images of which seed.
    """
    points = (np.random.default_rng(seed).random() + np.asarray(numbers) * _GOLDEN_RATIO) % 1
    edges = np.cumsum(shares) / np.sum(shares)
    return np.searchsorted(edges, points, side="right").tolist()


def shares_of_labels(labels: np.ndarray | None, num_classes: int | None) -> list[float] | None:
    """Return the share of each class among labels, or None without labels.

    Args:
        labels (`np.ndarray` of shape `(N,)`, *optional*): Class numbers.
        num_classes (`int`, *optional*): How many classes there are.
    """
    if labels is None or not num_classes or not len(labels):
        return None
    return (np.bincount(labels, minlength=num_classes) / len(labels)).tolist()


def shares_in_dataset(dataset: Dataset, names: Sequence[str] | None, num_classes: int) -> list[float] | None:
    """Return the share of each class of a model among the labels of a data set, or None where it has no such labels.

    Args:
        dataset (`datasets.Dataset`): The images with their labels.
        names (sequence of `str`, *optional*): Of the classes of the model; by default the names in the data.
        num_classes (`int`): How many classes the model has.
    """
    try:
        column = find_label_column(dataset)
    except UsageError:
        return None
    feature = dataset.features[column]
    own = feature.names if isinstance(feature, datasets.ClassLabel) else None
    counted = Counter(
        own[label] if own and label >= 0 else str(label) for label in dataset[column] if label is not None
    )
    counts = [counted[name] for name in names or own or map(str, range(num_classes))]
    if len(counts) != num_classes or not sum(counts):
        return None
    return [count / sum(counts) for count in counts]


class FolderImages:
    """Images that lie in files already.

    Args:
        pixels (`PixelDataset` or `ArchiveImages`): What `prepare_pixels` made of them, or an `.npz` file.
    """

    def __init__(self, pixels: PixelDataset | ArchiveImages):
        if len(pixels) < 2:
            raise UsageError(f"scores need at least 2 generated images, but there are {len(pixels)}.")
        self.images_at = pixels.images_at
        self.pixels = pixels
        self._count = len(pixels)
        self.origin = {"digest": pixels.digest(with_classes=False)}
        self.settings: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._count


def check_one_size(dataset: Dataset) -> None:
    """Refuse generated images of several sizes: the scores would depend on which of them comes first.

    Raises:
        UsageError: with two of the sizes, and the names of two files.
    """
    first, column = None, find_image_column(dataset)
    images = dataset.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for number, cell in enumerate(images):
        encoded = cell[column]
        try:
            with Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]) as image:
                size = image.size[::-1] if image.getexif().get(_ORIENTATION) in _TURNED else image.size
        except UNREADABLE:
            continue  # The error names the file when it is decoded.
        name = encoded["path"] or f"image {number}"
        first = first or (size, name)
        if size != first[0]:
            (one, other), names = (" x ".join(map(str, each)) for each in (first[0], size)), (first[1], name)
            raise UsageError(
                f"the images to score have several sizes: '{names[0]}' is {one}, '{names[1]}' is {other}. Images of a "
                "model have one size: resize them as they are meant to be seen, or score each size by itself."
            )


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _load(record: Path) -> Any:
    try:
        return json.loads(record.read_text())
    except ValueError:
        return None  # A broken record belongs to no earlier scoring.
