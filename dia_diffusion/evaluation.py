"""Scores of a pipeline: how far its images are from the training images."""

import itertools
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from .features import FeatureExtractor
from .metrics import METRICS, score
from .pixels import PixelDataset
from .sampling import sample_images

_REFERENCE_BATCH_SIZE = 256


def evaluate(
    pipeline: DiffusionPipeline,
    train: PixelDataset,
    held_out: PixelDataset | None,
    extractor: FeatureExtractor,
    metrics: Sequence[str] = METRICS,
    num_images: int = 2000,
    steps: int = 25,
    seed: int = 0,
    batch_size: int = 64,
    guidance_scale: float = 1.0,
) -> dict[str, Any]:
    """Generates images and compares their features with those of the training images.

    Args:
        pipeline (`DiffusionPipeline`): What is scored.
        train, held_out (`PixelDataset`): The reference, and images that were not trained on, if there are any.
        extractor (`FeatureExtractor`): Features in which images are compared.
        metrics (sequence of `str`): Among `fid`, `kid`, `precision`, `recall`.
        num_images, steps, seed, batch_size, guidance_scale: As for `sample_images`.

    Returns:
        `dict`: `fid`, `kid_mean`, `kid_std`, `precision`, `recall`, `num_images`, `features`, and `floor`: the same
        keys for held-out against training images, the best that a model can hope for; `None` without held-out images.
    """
    images = sample_images(pipeline, num_images, steps, seed, batch_size, guidance_scale=guidance_scale)
    # The first batch is drawn before the reference is read, so that a pipeline that cannot run fails at once.
    first = next(images)
    scores = score(itertools.chain([first], images), train.batches(_REFERENCE_BATCH_SIZE), extractor, metrics)
    floor = None
    if held_out is not None:
        floor = score(held_out.batches(_REFERENCE_BATCH_SIZE), train.batches(_REFERENCE_BATCH_SIZE), extractor, metrics)
    return scores | {"floor": floor}


def format_scores(scores: dict[str, Any]) -> str:
    """A table of the scores with the floor beside them, for the terminal and the model card (Markdown)."""
    floor = scores.get("floor") or {}
    rows = [
        f"| {name} | {_figure(scores[name])} | {_figure(floor.get(name))} |"
        for name in ("fid", "kid_mean", "kid_std", "precision", "recall", "num_images")
    ]
    head = f"| features: {scores['features']} | generated | floor (held-out images) |"
    return "\n".join([head, "|---|---:|---:|", *rows])


def _figure(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
