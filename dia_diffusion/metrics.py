"""Scores of generated images against reference images: FID, KID, precision and recall, on any features."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from .errors import UsageError
from .features import FeatureExtractor

METRICS = ("fid", "kid", "precision", "recall")

_LARGEST_KID_SUBSET = 1000
_KID_SEED = 0
# Distances held at once by `precision_recall`: 128 MiB of doubles.
_DISTANCES_IN_MEMORY = 2**24


def score(
    generated: Iterable[Tensor],
    reference: Iterable[Tensor],
    extractor: FeatureExtractor,
    metrics: Sequence[str] = METRICS,
) -> dict[str, float | int | str | None]:
    """Compares two sets of images, each read once; the same images give the same figures, whatever the batches.

    The features of both sets are kept, as doubles on the CPU. The global random state is neither used nor changed.

    Args:
        generated, reference (`Iterable[Tensor]`): Batches of uint8 images `(B, C, H, W)`, at least 2 images in all.
        extractor (`FeatureExtractor`): The features to compare.
        metrics (`Sequence[str]`, *optional*): Which of `METRICS` to compute; the others are `None`.

    Returns:
        `dict`, ready for JSON: `fid`, `kid_mean`, `kid_std`, `precision`, `recall`, `num_images` (generated ones), and
        `features`, the name of the extractor.

    Raises:
        UsageError: if there is no metric of some name, or there are fewer than 2 images on a side.
    """
    check_metrics(metrics)
    fake = _extract(generated, extractor, "generated")
    real = _extract(reference, extractor, "reference")

    kid_mean, kid_std = kernel_distance(real, fake) if "kid" in metrics else (None, None)
    precision, recall = precision_recall(real, fake) if {"precision", "recall"} & set(metrics) else (None, None)
    return {
        "fid": frechet_distance(real, fake) if "fid" in metrics else None,
        "kid_mean": kid_mean,
        "kid_std": kid_std,
        "precision": precision if "precision" in metrics else None,
        "recall": recall if "recall" in metrics else None,
        "num_images": len(fake),
        "features": extractor.name,
    }


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuses names that are not in `METRICS`; for callers that have work to do before they score."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UsageError(f"there is no metric named '{unknown[0]}'; choose from: {', '.join(METRICS)}.")


def _extract(batches: Iterable[Tensor], extractor: FeatureExtractor, side: str) -> Tensor:
    """Features `(N, F)` of all images, as doubles on the CPU: covariances and KID are differences of large sums."""
    features = [extractor(images).cpu().double() for images in batches]
    count = sum(len(rows) for rows in features)
    if count < 2:
        raise UsageError(f"scores need at least 2 {side} images, but there are {count}.")
    return torch.cat(features)


class _Features(nn.Identity):
    """Stands where torchmetrics expects a network, and passes on features that are already there."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features `(N, F)`, float64 (Heusel et al. 2017,
    arXiv 1706.08500, eq. 6): `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`."""
    # A score is computed by one process, so torchmetrics must not wait for the others.
    fid = FrechetInceptionDistance(_Features(real.shape[1]), sync_on_compute=False)
    # torchmetrics takes the covariance as E[xx] - E[x]E[x], which is exact only near a mean of zero. The distance does
    # not change when both sets move together.
    centre = real.mean(0)
    fid.update(real - centre, real=True)
    fid.update(generated - centre, real=False)
    # Rounding takes the distance of equal sets just below zero.
    return max(fid.compute().item(), 0.0)


def kernel_distance(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """KID of two sets of features `(N, F)`: mean and standard deviation, over 100 random subsets of at most 1,000, of
    the unbiased squared MMD with the kernel `(xy / F + 1)^3` (Bińkowski et al. 2018, arXiv 1801.01401)."""
    subset_size = min(_LARGEST_KID_SUBSET, len(real), len(generated))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        kid = KernelInceptionDistance(_Features(real.shape[1]), subset_size=subset_size, sync_on_compute=False)
    kid.update(real, real=True)
    kid.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators as well: fork_rng restores the CPU alone here.
        torch.default_generator.manual_seed(_KID_SEED)
        mean, std = kid.compute()
    return mean.item(), std.item()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    Precision is the share of generated features within the manifold of the real ones, recall the reverse. A manifold
    is the union of balls around its features, each of which reaches to the k-th nearest other feature of its set.
    Computed in blocks of rows, so that beside copies of the features only some hundreds of megabytes are needed.

    Args:
        real, generated (`Tensor` of shape `(N, F)` and `(M, F)`): Features.
        k (`int`, *optional*, defaults to 3): Which neighbour; the last one in a set that has no more than k features.
    """
    centre = real.mean(0, dtype=torch.double)
    real, generated = real.double() - centre, generated.double() - centre
    # Twins must count as being at distance 0. Distances from matrix products miss that by some 1e-8 of the norm.
    rounding = 1e-7 * max(real.norm(dim=1).max().item(), generated.norm(dim=1).max().item())
    return (
        _share_inside(generated, real, _radii(real, k) + rounding),
        _share_inside(real, generated, _radii(generated, k) + rounding),
    )


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each of N features to its k-th nearest other one, `(N,)`."""
    neighbours = min(k, len(features) - 1) + 1  # each feature is its own nearest
    blocks = features.split(_rows_in_memory(features))
    return torch.cat([torch.cdist(rows, features).topk(neighbours, largest=False).values[:, -1] for rows in blocks])


def _share_inside(features: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the features that lie in at least one ball."""
    blocks = features.split(_rows_in_memory(centres))
    return sum((torch.cdist(rows, centres) <= radii).any(1).sum().item() for rows in blocks) / len(features)


def _rows_in_memory(columns: Tensor) -> int:
    return max(_DISTANCES_IN_MEMORY // len(columns), 1)
