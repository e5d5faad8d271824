"""Scores of generated images against real ones."""

import itertools
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import accelerate
import diffusers
import torch
import torchmetrics
from accelerate import PartialState
from torch import Tensor

from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..files import json_digest
from ..options.commands import check_metric_names
from .features.extractor import FeatureExtractor
from .frechet import GROUPS, FrechetDistanceTo, Moments, frechet_uncertainty, is_uncertainty_too_long
from .images import FolderImages, PipelineImages
from .metrics import FEWEST_FOR_INCEPTION_SCORE, inception_score, kernel_distance, precision_recall
from .reference import Reference, extract, make_reference

DEFAULT_METRICS = ("fid", "kid", "precision", "recall")
_NEED_FEATURES = frozenset({"kid", "precision", "recall"})
# Part of the settings hash: raise it whenever the same features would give other scores.
_DEFINITIONS = {"version": 2, "kid": "cubic kernel, 100 subsets of 1000", "is_splits": 10, "nearest_neighbours": 3}


@dataclass(frozen=True)
class Sample:
    """Features and sums kept of a set of images.

    Args:
        moments (`Moments`): Sums of their features.
        features, logits (`Tensor`, *optional*): All of them, `(N, F)` and `(N, K)`, where a metric needs them.
    """

    moments: Moments
    features: Tensor | None
    logits: Tensor | None


def evaluate(
    generated: PipelineImages | FolderImages,
    reference: PixelDataset | Reference,
    extractor: FeatureExtractor,
    metrics: Sequence[str] = DEFAULT_METRICS,
    held_out: PixelDataset | None = None,
    batch_size: int = 64,
    state: PartialState | None = None,
) -> dict[str, Any] | None:
    """Compare generated images with real ones, in one pass over the generated images.

    The Fréchet distance needs memory for sums only. KID, precision and recall keep the features of both sides, those of
    at most 50,000 reference images, and the Inception Score keeps logits: 4 bytes for each number (`bytes_kept`).

    Args:
        generated (`PipelineImages` or `FolderImages`): What is scored.
        reference (`PixelDataset` or `Reference`): Real images, or their published statistics.
        extractor (`FeatureExtractor`): Features in which images are compared, on the device that computes them.
        metrics (`Sequence[str]`, *optional*): Among `METRICS`.
        held_out (`PixelDataset`, *optional*): Real images that are not in the reference, for the floor.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.
        state (`PartialState`, *optional*): Processes that share the work.

    Returns:
        `dict`, ready for JSON, on the main process, `None` on the others: the scores, `None` for those not asked for:
        `fid`, `fid_interval`, `fid_infinity` (see `frechet_uncertainty`), `kid_mean`, `kid_std`, `is_mean`, `is_std`,
        `precision`, `recall`; `num_images`; `features`, the name of the extractor; `settings_hash`, equal for scores
        that can be compared; `floor`: the same keys for held-out images, or `None`; and `settings`, `origin`,
        `versions`, `seconds`, `bytes_kept` and `warnings`.

    Raises:
        UsageError: for a metric that is unknown, or that these features or this reference do not allow.
    """
    check_metrics(metrics, extractor, reference)
    began = time.perf_counter()
    batches = extract(generated, extractor, batch_size, "Images to score", "is" in metrics, state)
    # The first batch is drawn before the reference is read, so that a pipeline that cannot run fails at once.
    first = next(batches)
    features_wanted = bool(_NEED_FEATURES & set(metrics))
    before = time.perf_counter()
    if not isinstance(reference, Reference):
        reference = make_reference(reference, extractor, features_wanted, state=state)
    held = make_reference(held_out, extractor, True, "is" in metrics, state) if held_out is not None else None
    seconds = {"sampling": 0.0, "features": 0.0, "reference": time.perf_counter() - before}

    main = state is None or state.is_main_process
    moments, features, logits = Moments(extractor.num_features, GROUPS if main else 0), [], []
    for batch in itertools.chain([first], batches):
        if not main:
            continue  # Its share of the images is extracted; the scores are not its work.
        moments.update(batch.features)
        if features_wanted:
            features.append(batch.features)
        if batch.logits is not None:
            logits.append(batch.logits)
        for name, duration in zip(("sampling", "features"), batch.seconds, strict=True):
            seconds[name] += duration / (state.num_processes if state is not None else 1)
    if not main:
        return None

    sample = Sample(moments, torch.cat(features) if features else None, torch.cat(logits) if logits else None)
    before = time.perf_counter()
    distance = FrechetDistanceTo(reference.gaussian) if "fid" in metrics else None
    scores = _score(sample, reference, distance, extractor, generated.settings, metrics)
    floor = _score(_held_out_sample(held), reference, distance, extractor, {}, metrics) if held is not None else None
    if floor is not None:
        del floor["settings"]
    seconds["metrics"] = time.perf_counter() - before
    seconds["total"] = time.perf_counter() - began
    kept = [sample.features, sample.logits, reference.features]
    return scores | {
        "floor": floor,
        "origin": generated.origin,
        "versions": _versions(),
        "seconds": {name: round(duration, 3) for name, duration in seconds.items()},
        "bytes_kept": sum(tensor.nbytes for tensor in kept if tensor is not None),
        "warnings": _warnings(moments, reference.gaussian.num_images, extractor, metrics),
    }


def check_metrics(
    metrics: Sequence[str], extractor: FeatureExtractor, reference: PixelDataset | Reference | None = None
) -> None:
    """Refuse metrics that are unknown, or that these features or this reference do not allow."""
    check_metric_names(metrics)
    if "is" in metrics and extractor.num_classes is None:
        raise UsageError(f"the Inception Score needs a classifier, and the features '{extractor.name}' have none.")
    impossible = sorted(_NEED_FEATURES & set(metrics))
    if isinstance(reference, Reference) and reference.features is None and impossible:
        raise UsageError(
            f"{', '.join(impossible)} need the reference images, but only their published mean and covariance are "
            "there. Use --metrics fid, or name the images."
        )


def _score(
    sample: Sample,
    reference: Reference,
    distance: FrechetDistanceTo | None,
    extractor: FeatureExtractor,
    sampling: dict[str, Any],
    metrics: Sequence[str],
) -> dict[str, Any]:
    settings = {
        "num_images": len(sample.moments),
        "features": extractor.settings,
        "reference": reference.settings,
        "sampling": sampling,
        "definitions": _DEFINITIONS,
    }
    scores: dict[str, Any] = dict.fromkeys(
        "fid fid_interval fid_infinity kid_mean kid_std is_mean is_std precision recall".split()
    )
    if "fid" in metrics:
        scores["fid"] = distance(sample.moments.gaussian())
        uncertainty = frechet_uncertainty(distance, sample.moments)
        if uncertainty is not None:
            scores["fid_interval"], scores["fid_infinity"] = list(uncertainty.interval), uncertainty.infinity
    if "kid" in metrics:
        scores["kid_mean"], scores["kid_std"] = kernel_distance(reference.features, sample.features)
    if "is" in metrics and len(sample.moments) >= FEWEST_FOR_INCEPTION_SCORE:
        scores["is_mean"], scores["is_std"] = inception_score(sample.logits)
    if {"precision", "recall"} & set(metrics):
        both = dict(zip(("precision", "recall"), precision_recall(reference.features, sample.features), strict=True))
        scores |= {name: value for name, value in both.items() if name in metrics}
    return scores | {
        "num_images": len(sample.moments),
        "features": extractor.name,
        "settings_hash": json_digest(settings)[:12],
        "settings": settings,
    }


def _held_out_sample(held: Reference) -> Sample:
    moments = Moments(held.features.shape[1], GROUPS)
    moments.update(held.features)
    return Sample(moments, held.features, held.logits)


def _versions() -> dict[str, str]:
    modules = (torch, torchmetrics, diffusers, accelerate)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


def _warnings(moments: Moments, real: int | None, extractor: FeatureExtractor, metrics: Sequence[str]) -> list[str]:
    """Return warnings about too few generated or real images."""
    count, features, found = len(moments), extractor.num_features, []
    if "fid" in metrics:
        found += [
            f"{number} {kind}images are too few for the covariance of {features} features: most of the Fréchet "
            "distance is then bias, and it can be compared with scores of as many images only."
            for number, kind in ((count, ""), (real, "reference "))
            if number is not None and number <= features
        ]
        if is_uncertainty_too_long(moments):
            found.append(f"the interval of the Fréchet distance would take minutes with {features} features: left out.")
    if "is" in metrics and count < FEWEST_FOR_INCEPTION_SCORE:
        found.append(
            f"{count} images are too few for an Inception Score, which takes the mean of ten parts and cannot be more "
            f"than there are images in a part: left out. It needs {FEWEST_FOR_INCEPTION_SCORE} at least."
        )
    return found
