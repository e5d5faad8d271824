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

from ..process.output import progress_bar

GROUPS = 20
# The interval takes the roots of twenty matrices of as many rows: a minute for this many.
_LARGEST_INTERVAL = 2048
_SEED = 0


class Gaussian(NamedTuple):
    """Mean `(F,)` and covariance `(F, F)` of features, float64, and the number of images (`None` if unknown)."""

    mean: Tensor
    covariance: Tensor
    num_images: int | None


class Moments:
    """Running sums of features in float64, whose size does not grow with the number of images.

    The first images, up to as many as there are features, are kept as they are: that takes less than the sums.

    Args:
        num_features (`int`): Number of features F. The sums take `8 * groups * F * (F + 1)` bytes.
        groups (`int`, *optional*, defaults to 1): Into how many random groups the images are divided.
    """

    def __init__(self, num_features: int, groups: int = 1):
        self.counts = torch.zeros(groups, dtype=torch.double)
        self.sums = torch.zeros(groups, num_features, dtype=torch.double)
        self.products = torch.zeros(groups, 0, 0, dtype=torch.double)
        # Images relative to the first one, and the group of each.
        self.rows = torch.zeros(0, num_features, dtype=torch.double)
        self.row_groups = torch.zeros(0, dtype=torch.long)
        self.origin = torch.zeros(num_features, dtype=torch.double)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def update(self, features: Tensor) -> None:
        """Add the features `(B, F)` of the next B images."""
        features = features.double()
        if not len(self):
            # Sums of squares lose the digits that the mean takes up, so they are taken around the first image.
            self.origin = features[0].clone()
        features, groups = features - self.origin, self._groups(len(self), len(features))
        self.counts += torch.bincount(groups, minlength=len(self.counts))
        self.sums.index_add_(0, groups, features)
        if not self.products.numel():
            features, groups = torch.cat([self.rows, features]), torch.cat([self.row_groups, groups])
            if len(features) <= features.shape[1]:
                self.rows, self.row_groups = features, groups
                return
            self.rows, self.row_groups = features[:0].clone(), groups[:0].clone()
            self.products = torch.zeros(len(self.counts), *features.shape[1:] * 2, dtype=torch.double)
        for group in groups.unique().tolist():
            rows = features[groups == group]
            self.products[group].addmm_(rows.T, rows)

    def _groups(self, start: int, count: int) -> Tensor:
        """Return the group of each image: a random permutation of the groups for each block of as many images.

        So neither classes that alternate nor files sorted by class gather in one group.
        """
        size = len(self.counts)
        if size == 1:
            return torch.zeros(count, dtype=torch.long)
        runs = range(start // size, (start + count - 1) // size + 1)
        order = np.concatenate([np.random.default_rng((_SEED, run)).permutation(size) for run in runs])
        return torch.from_numpy(order[start % size :][:count])

    def gaussian(self, groups: Sequence[int] | None = None) -> Gaussian:
        """Return the Gaussian of all images, or of those of some groups."""
        weights = torch.ones_like(self.counts)
        if groups is not None:
            weights.zero_()[list(groups)] = 1
        count = weights @ self.counts
        mean = weights @ self.sums / count
        if self.products.numel():
            products = torch.einsum("g,gij->ij", weights, self.products)
        else:
            rows = self.rows[weights[self.row_groups] > 0]
            products = rows.T @ rows
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


class _FewImages:
    """`FrechetDistanceTo` for parts of no more images than there are features: the trace of the root of
    `C1^(1/2) X' X C1^(1/2)` is that of `X C1 X'`, which has a row for each image instead of one for each feature.

    Args:
        distance (`FrechetDistanceTo`): To which Gaussian.
        images (`Moments`): Which still keep their rows.
    """

    def __init__(self, distance: FrechetDistanceTo, images: Moments):
        self.distance, self.images = distance, images
        rooted = images.rows @ distance.root
        self.inner = rooted @ rooted.T
        self.squares = images.rows.square().sum(1)

    def without(self, group: int) -> float:
        """Return the distance of all images but those of this group."""
        kept = self.images.row_groups != group
        mean, reference = self.images.rows[kept].mean(0), self.distance.reference
        inner, count = self.inner[kept][:, kept], int(kept.sum())
        inner = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()
        roots = torch.linalg.eigvalsh(inner / (count - 1)).clamp(min=0).sqrt().sum()
        own = (self.squares[kept].sum() - count * mean.square().sum()) / (count - 1)
        apart = (reference.mean - self.images.origin - mean).square().sum()
        return max((apart + reference.covariance.trace() + own - 2 * roots).item(), 0.0)


class Uncertainty(NamedTuple):
    """A 95% interval `(low, high)` of a Fréchet distance, and the distance for infinitely many images."""

    interval: tuple[float, float]
    infinity: float


def is_uncertainty_too_long(generated: Moments) -> bool:
    """Return whether `frechet_uncertainty` is left out because it would take minutes."""
    return min(generated.sums.shape[1], len(generated)) > _LARGEST_INTERVAL


def frechet_uncertainty(distance: FrechetDistanceTo, generated: Moments) -> Uncertainty | None:
    """Return the interval of a Fréchet distance. None if there are fewer than two images for each group, or if
    it would take minutes: for more than 2,048 features of as many images.

    Each group of images is left out in turn (the jackknife of Quenouille and Tukey, for d images at a time).

    - The interval is the distance plus and minus its standard error times a quantile of Student's t. It covers
      the expected distance of as many images of this model (93 to 99.8% of simulations), not the value of another set
      (85 to 90%, for that value varies too); the reference stays as it is. A bootstrap would not do: its
      samples repeat images, which by itself moves and spreads the distance, many times too much where there are few
      images for the number of features.
    - The distance falls with the number N of generated images, about as 1/N. Infinitely many are reached by a straight
      line in 1/N (Chong and Forsyth 2020, arXiv 1911.07023), here through the distance and the mean of those with a
      group left out. The reference keeps its number, so that a small bias remains; the result may be below zero.
    """
    groups = len(generated.counts)
    if groups < 2 or len(generated) < 2 * groups or is_uncertainty_too_long(generated):
        return None
    if generated.products.numel():
        value = distance(generated.gaussian())

        def without(group: int) -> float:
            return distance(generated.gaussian([other for other in range(groups) if other != group]))

    else:
        without = _FewImages(distance, generated).without
        value = without(-1)  # There is no such group.
    left_out = progress_bar(range(groups), desc="Uncertainty of the Fréchet distance", unit="group", leave=False)
    values = np.array([without(group) for group in left_out])
    error = np.sqrt((groups - 1) * values.var())
    infinity = groups * value - (groups - 1) * values.mean()
    margin = t.ppf(0.975, groups - 1) * error
    return Uncertainty((float(value - margin), float(value + margin)), float(infinity))
