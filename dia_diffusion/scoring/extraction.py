"""Features of many images, by one process or by several that share the work."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ..process import progress_bar
from .features import FeatureExtractor


class Images(Protocol):
    """Images that can be asked for by number, in any order, such as `PixelDataset`."""

    def __len__(self) -> int: ...

    def numbered(self, numbers: range) -> Tensor:
        """These images, uint8 of shape `(B, C, H, W)` on the CPU."""


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
    """Features of all images in order, on the CPU.

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
                _extract(images.numbered, range(at, min(at + batch_size, len(images))), extractor, with_logits)
                for at in mine
            ]
            for extracted in gather_object(batch) if processes > 1 else batch:
                progress.update(len(extracted.features))
                yield extracted


def _extract(
    numbered: Callable[[range], Tensor], numbers: range, extractor: FeatureExtractor, with_logits: bool
) -> Extracted:
    began = time.perf_counter()
    images = numbered(numbers)
    drawn = time.perf_counter()
    features, logits = extractor.classify(images) if with_logits else (extractor(images), None)
    features, logits = features.cpu(), None if logits is None else logits.cpu()
    return Extracted(features, logits, (drawn - began, time.perf_counter() - drawn))
