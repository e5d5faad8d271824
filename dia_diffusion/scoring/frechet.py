"""Fréchet distance of Gaussians, with its uncertainty, from running sums: no features are kept.

The sums are kept for several random groups of images apart: what the distance would be without some of the images
follows from the sums of the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor
from tqdm.auto import tqdm

GROUPS = 20
_SEED = 0


class Gaussian(NamedTuple):
    """Mean `(F,)` and covariance `(F, F)` of features, float64, and of how many images (`None` if unknown)."""

    mean: Tensor
    covariance: Tensor
    count: int | None


class Moments:
    """Running sums of features in float64, whose size does not grow with the number of images.

    Args:
        num_features (`int`): Number of features F. The sums take `8 * groups * F * (F + 1)` bytes.
        groups (`int`, *optional*, defaults to 1): Into how many random groups the images are divided.
    """

    def __init__(self, num_features: int, groups: int = 1):
        self.counts = torch.zeros(groups, dtype=torch.double)
        self.sums = torch.zeros(groups, num_features, dtype=torch.double)
        self.products = torch.zeros(groups, num_features, num_features, dtype=torch.double)
        self.origin: Tensor | None = None

    def __len__(self) -> int:
        return int(self.counts.sum())

    def update(self, features: Tensor) -> None:
        """Adds the features `(B, F)` of the next B images."""
        features = features.double()
        if self.origin is None:
            # Sums of squares lose the digits that the mean takes up, so they are taken around the first image.
            self.origin = features[0].clone()
        features = features - self.origin
        groups = self._groups(len(self), len(features))
        for group in groups.unique().tolist():
            rows = features[groups == group]
            self.counts[group] += len(rows)
            self.sums[group] += rows.sum(0)
            self.products[group].addmm_(rows.T, rows)

    def _groups(self, start: int, count: int) -> Tensor:
        """Group of each image: anew at random for each run of as many images as there are groups, so that neither
        classes that come in turn nor files in order of their class gather in one group."""
        size = len(self.counts)
        if size == 1:
            return torch.zeros(count, dtype=torch.long)
        runs = range(start // size, (start + count - 1) // size + 1)
        order = np.concatenate([np.random.default_rng((_SEED, run)).permutation(size) for run in runs])
        return torch.from_numpy(order[start % size :][:count])

    def gaussian(self, groups: Sequence[int] | None = None) -> Gaussian:
        """The Gaussian of all images, or of those of some groups."""
        weights = torch.ones_like(self.counts)
        if groups is not None:
            weights.zero_()[list(groups)] = 1
        count = weights @ self.counts
        mean = weights @ self.sums / count
        products = torch.einsum("g,gij->ij", weights, self.products)
        covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean + self.origin, covariance, int(count))


class FrechetDistanceTo:
    """Fréchet distance to a Gaussian (Heusel et al. 2017, arXiv 1706.08500, eq. 6):
    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`. What depends on the reference alone is computed once.

    Args:
        reference (`Gaussian`): What others are compared with.
    """

    def __init__(self, reference: Gaussian):
        self.reference = reference
        values, vectors = torch.linalg.eigh(reference.covariance)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def __call__(self, generated: Gaussian) -> float:
        # The root of C1 C2 has the trace of the root of the symmetric C1^(1/2) C2 C1^(1/2).
        values = torch.linalg.eigvalsh(self.root @ generated.covariance @ self.root)
        spread = self.reference.covariance.trace() + generated.covariance.trace() - 2 * values.clamp(min=0).sqrt().sum()
        # Rounding takes the distance of equal sets just below zero.
        return max(((self.reference.mean - generated.mean).square().sum() + spread).item(), 0.0)


class Uncertainty(NamedTuple):
    """What `frechet_uncertainty` finds: a 95% interval `(low, high)`, and the distance for infinitely many images."""

    interval: tuple[float, float]
    infinity: float


def frechet_distance(reference: Gaussian, generated: Gaussian) -> float:
    """See `FrechetDistanceTo`."""
    return FrechetDistanceTo(reference)(generated)


def frechet_uncertainty(reference: Gaussian, generated: Moments) -> Uncertainty | None:
    """How far a Fréchet distance can be trusted; `None` where there are not two images for each group.

    Each group of images is left out in turn (the jackknife of Quenouille and Tukey, for d images at a time).

    - The interval is the distance plus and minus its standard error times a quantile of Student's t. It says how much
      another set of as many generated images would differ; the reference stays as it is. A bootstrap would not do: its
      samples repeat images, which by itself moves and spreads the distance, many times too much where there are few
      images for the number of features.
    - The distance falls with the number N of generated images, about as 1/N. Infinitely many are reached by a straight
      line in 1/N (Chong and Forsyth 2020, arXiv 1911.07023), here through the distance and the mean of those with a
      group left out. The reference keeps its number, so that a small bias remains; the result may be below zero.
    """
    groups = len(generated.counts)
    if groups < 2 or len(generated) < 2 * groups:
        return None
    distance = FrechetDistanceTo(reference)
    value = distance(generated.gaussian())
    left_out = tqdm(range(groups), desc="Uncertainty of the Fréchet distance", unit="group", leave=False)
    values = np.array([distance(generated.gaussian([g for g in range(groups) if g != out])) for out in left_out])
    error = np.sqrt((groups - 1) * values.var())
    infinity = groups * value - (groups - 1) * values.mean()
    margin = t.ppf(0.975, groups - 1) * error
    return Uncertainty((float(value - margin), float(value + margin)), float(infinity))
