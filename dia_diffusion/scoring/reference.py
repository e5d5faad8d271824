"""The reference of a score: features of real images, extracted and kept in a cache, or published statistics."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..files import cache_dir, json_digest, replace_file
from ..process.output import progress_bar
from .archives import STATISTICS, UNREADABLE_ARCHIVE, ArchiveImages, array_shapes, unreadable
from .features.extractor import FeatureExtractor
from .frechet import Gaussian, Moments


class Images(Protocol):
    """Images that can be asked for by number, in any order, such as `PixelDataset`."""

    def __len__(self) -> int: ...

    def images_at(self, numbers: range) -> Tensor:
        """Return these images, uint8 of shape `(B, C, H, W)` on the CPU."""


class Extracted(NamedTuple):
    """A batch: features `(B, F)`, logits `(B, K)` or `None`, and the seconds that its images and its features took."""

    features: Tensor
    logits: Tensor | None
    seconds: tuple[float, float]


def extract(
    images: Images,
    extractor: FeatureExtractor,
    batch_size: int,
    description: str,
    with_logits: bool = False,
    state: PartialState | None = None,
) -> Iterator[Extracted]:
    """Yield features of all images in order, on the CPU.

    Args:
        images (`Images`): What to extract features of.
        extractor (`FeatureExtractor`): How.
        batch_size (`int`): Images at a time.
        description (`str`): Label of the progress bar.
        with_logits (`bool`, *optional*, defaults to `False`): Whether logits are wanted as well.
        state (`PartialState`, *optional*):
            With several processes each extracts its share of the batches, each image once, and all get the features of
            all. The batches, and so the figures, are those of one process.
    """
    starts = range(0, len(images), batch_size)
    processes, rank = (state.num_processes, state.process_index) if state is not None else (1, 0)
    with progress_bar(total=len(images), desc=description, unit="img", disable=rank != 0) as progress:
        for first in range(0, len(starts), processes):
            mine = starts[first : first + processes][rank : rank + 1]
            batch = [
                _extract(images.images_at, range(at, min(at + batch_size, len(images))), extractor, with_logits)
                for at in mine
            ]
            for extracted in gather_object(batch) if processes > 1 else batch:
                progress.update(len(extracted.features))
                yield extracted


def _extract(
    images_at: Callable[[range], Tensor], numbers: range, extractor: FeatureExtractor, with_logits: bool
) -> Extracted:
    began = time.perf_counter()
    images = images_at(numbers)
    drawn = time.perf_counter()
    features, logits = extractor.classify(images) if with_logits else (extractor(images), None)
    features, logits = features.cpu(), None if logits is None else logits.cpu()
    return Extracted(features, logits, (drawn - began, time.perf_counter() - drawn))


# Part of the cache key: raise it whenever the same images would give other statistics.
_VERSION = 1
_BATCH_SIZE = 250
# Of how many images the features themselves are kept, as many as papers take for precision and recall: comparing each
# with each takes a time that grows with their square.
MOST_KEPT = 50_000


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Args:
        gaussian (`Gaussian`): Mean and covariance of their features.
        settings (`dict`): Which images these are, and how they were prepared; ready for JSON.
        features (`Tensor` of shape `(N, F)`, *optional*):
            The features themselves, float32, where they were asked for; of at most 50,000 images, spread evenly.
        logits (`Tensor` of shape `(N, K)`, *optional*): Those of a classifier, of the same images, likewise.
    """

    gaussian: Gaussian
    settings: dict[str, Any]
    features: Tensor | None = None
    logits: Tensor | None = None


def make_reference(
    data: PixelDataset | ArchiveImages,
    extractor: FeatureExtractor,
    with_features: bool,
    with_logits: bool = False,
    state: PartialState | None = None,
) -> Reference:
    """Return statistics of all images of a data set, from the cache where they are there already.

    They are cached by the fingerprint of the data, which changes with its files and its preparation, and by the
    settings of the extractor, a digest of its weights included.

    Args:
        data (`PixelDataset` or `ArchiveImages`): The images.
        extractor (`FeatureExtractor`): How to see them.
        with_features (`bool`): Whether features are wanted as well (4 bytes for each of F numbers of an image).
        with_logits (`bool`, *optional*, defaults to `False`): Whether the logits of a classifier are wanted as well.
        state (`PartialState`, *optional*): Processes that share the work.
    """
    settings = {"fingerprint": data.fingerprint, "extractor": extractor.settings, "version": _VERSION}
    key = json_digest(settings)[:32]
    kept = f"{'-features' if with_features else ''}{'-logits' if with_logits else ''}"
    is_part = bool(kept) and len(data) > MOST_KEPT
    kept += f"-{MOST_KEPT}" if is_part else ""
    path = cache_dir() / "references" / f"{key}{kept}.safetensors"
    tensors = _read(path)
    # All of them or none: one that found the file a moment later than another would leave that one waiting.
    missing = tensors is None if state is None else any(gather_object([tensors is None]))
    if tensors is None or missing:
        tensors = _compute(data, extractor, with_features, with_logits, state)
        if state is None or state.is_main_process:
            _write(tensors, path)
    gaussian = Gaussian(tensors["mean"], tensors["covariance"], len(data))
    described = {
        "digest": data.digest(with_classes=False),
        "num_images": len(data),
        "resolution": data.resolution,
        "channels": data.channels,
    }
    if is_part:
        described["num_images_kept"] = MOST_KEPT
    return Reference(gaussian, described, tensors.get("features"), tensors.get("logits"))


def _compute(
    data: PixelDataset | ArchiveImages,
    extractor: FeatureExtractor,
    with_features: bool,
    with_logits: bool,
    state: PartialState | None,
) -> dict[str, Tensor]:
    if len(data) < 2:
        raise UsageError(f"scores need at least 2 reference images, but there are {len(data)}.")
    moments, features, logits = Moments(extractor.num_features), [], []
    count = min(len(data), MOST_KEPT)
    rows = torch.arange(count) * len(data) // count
    for batch in extract(data, extractor, _BATCH_SIZE, "Reference images", with_logits, state):
        first = len(moments)
        moments.update(batch.features)
        chosen = rows[(rows >= first) & (rows < len(moments))] - first
        if with_features:
            features.append(batch.features[chosen])
        if batch.logits is not None:
            logits.append(batch.logits[chosen])
    tensors = moments.gaussian()._asdict()
    del tensors["num_images"]
    kept = {"features": features, "logits": logits}
    return tensors | {name: torch.cat(batches) for name, batches in kept.items() if batches}


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError):
        # Absent or broken: compute it again.
        return None


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the cache; where it cannot be written that costs time only, and must not end the run."""
    try:
        replace_file(path, lambda place: safetensors.torch.save_file(tensors, place))
    except (OSError, SafetensorError) as error:
        print(f"The statistics of the reference are not kept for the next time: {error}")


def read_published(path: Path, extractor: FeatureExtractor) -> Reference:
    """Read published statistics: an `.npz` file with `mu` and `sigma`, as those of pytorch-fid, ADM and EDM.

    Raises:
        UsageError: if the file holds no such statistics, or those of other features.
    """
    names = array_shapes(path)
    if not set(STATISTICS) <= set(names):
        raise UsageError(
            f"'{path}' holds neither statistics ('mu' and 'sigma') nor images ('arr_0'), only: "
            f"{', '.join(names) or 'nothing'}. Save its arrays under these names."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[key] for key in STATISTICS]
    except UNREADABLE_ARCHIVE as error:
        raise unreadable(path, error) from error
    if not all(array.dtype.kind in "fiu" for array in arrays):
        kinds = " and ".join(str(array.dtype) for array in arrays)
        raise UsageError(f"'mu' and 'sigma' of '{path}' must hold real numbers, but are {kinds}.")
    # Some tools keep a dimension for the batch.
    mean, covariance = (torch.from_numpy(array.astype(np.float64).squeeze()) for array in arrays)
    count = extractor.num_features
    if mean.shape != (count,):
        raise UsageError(
            f"'{path}' holds statistics of {mean.numel()} features, but '{extractor.name}' has {count}. "
            "Name the features that it was made with: --features."
        )
    if covariance.shape != (count, count):
        raise UsageError(f"'sigma' of '{path}' must be of shape {(count, count)}, but is {tuple(covariance.shape)}.")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UsageError(f"'{path}' holds values that are not finite.")
    variances = torch.linalg.eigvalsh(covariance)
    if not torch.allclose(covariance, covariance.T, 1e-3, 1e-3 * covariance.abs().max().item()) or (
        variances[0] < -1e-3 * variances[-1].abs()
    ):
        raise UsageError(f"'sigma' of '{path}' is no covariance: it is not symmetric, or has negative variances.")
    digest = hashlib.sha256(mean.numpy().tobytes() + covariance.numpy().tobytes()).hexdigest()
    return Reference(Gaussian(mean, covariance, None), {"digest": digest, "num_images": None})
