"""Scores that need the features of all images at once: KID, Inception Score, precision and recall."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

_LARGEST_KID_SUBSET = 1000
_SPLITS = 10
# Ten for each part: a part of n images has a score of n at most.
FEWEST_FOR_INCEPTION_SCORE = 10 * _SPLITS
_SEED = 0
# Distances held at once by `precision_recall`: 128 MiB of doubles.
_DISTANCES_IN_MEMORY = 2**24


def kernel_distance(real: Tensor, generated: Tensor) -> tuple[float, float | None]:
    """Return the Kernel Inception Distance of two sets of features `(N, F)`: mean and standard deviation.

    It is the unbiased squared MMD with the kernel `(xy / F + 1)^3` over 100 random subsets of at most 1,000 features
    (Bińkowski et al. 2018, arXiv 1801.01401). Two sets of the same size, at most 1,000, have one subset only, and so no
    standard deviation.
    """
    subset_size = min(_LARGEST_KID_SUBSET, len(real), len(generated))
    with _without_warning():
        # A score is computed by one process, so torchmetrics must not wait for the others.
        kid = KernelInceptionDistance(nn.Identity(), subset_size=subset_size, sync_on_compute=False)
    # Doubles, because KID is a small difference of large sums.
    kid.update(real.double(), real=True)
    kid.update(generated.double(), real=False)
    mean, std = _with_fixed_seed(kid)
    return mean.item(), None if len(real) == len(generated) == subset_size else std.item()


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Return the Inception Score of the logits `(N, K)` of generated images, from 1 to K: mean and standard deviation.

    It is `exp(mean KL(p(y|x) || p(y)))` over 10 random parts (Salimans et al. 2016, arXiv 1606.03498).
    """
    with _without_warning():
        score = InceptionScore(nn.Identity(), splits=min(_SPLITS, len(logits)), sync_on_compute=False)
    score.update(logits.double())
    mean, std = _with_fixed_seed(score)
    return mean.item(), std.item()


@contextmanager
def _without_warning() -> Iterator[None]:
    """Silence torchmetrics' warning that it keeps features: `evaluate` prints their size instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _with_fixed_seed(metric: KernelInceptionDistance | InceptionScore) -> tuple[Tensor, Tensor]:
    """Compute a metric of random parts with a fixed seed; leave the global random state as it is."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators as well: fork_rng restores the CPU alone here.
        torch.default_generator.manual_seed(_SEED)
        return metric.compute()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

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
    """Return the distance of each of N features to its k-th nearest other one, `(N,)`."""
    neighbours = min(k, len(features) - 1) + 1  # each feature is its own nearest
    blocks = features.split(_rows_in_memory(features))
    return torch.cat([torch.cdist(rows, features).topk(neighbours, largest=False).values[:, -1] for rows in blocks])


def _share_inside(features: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of the features that lie in at least one ball."""
    blocks = features.split(_rows_in_memory(centres))
    return sum((torch.cdist(rows, centres) <= radii).any(1).sum().item() for rows in blocks) / len(features)


def _rows_in_memory(columns: Tensor) -> int:
    return max(_DISTANCES_IN_MEMORY // len(columns), 1)
