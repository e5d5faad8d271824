"""EDM (Karras et al. 2022, arXiv 2206.00364): levels are the standard deviation of the noise, sigma."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from ...errors import UsageError
from .objective import Lesson, Objective


@dataclass(frozen=True)
class EDM(Objective):
    """Denoises `x = y + sigma n` through preconditioning: `D(x) = c_skip x + c_out F(c_in x, c_noise)` (eq. 7).

    The coefficients are those of table 1. The loss `1 / c_out² |D(x) - y|²` (eq. 8, with the table's weighting) is the
    plain squared error of the network F, whose target then has unit variance at every level. `ln(sigma)` is normally
    distributed in training, with mean `p_mean` and standard deviation `p_std`.
    """

    title = "EDM (arXiv 2206.00364)"

    sigma_data: float | None = None
    p_mean: float = -1.2
    p_std: float = 1.2

    def fitted(self, measure_std: Callable[[], float]) -> "EDM":
        if self.sigma_data is not None:
            return self
        # Rounded, so that what it is does not hang on the order in which a version of torch adds.
        sigma_data = float(f"{measure_std():.4g}")
        if sigma_data < 1e-3:
            raise UsageError("all images are one even colour, so that their sigma_data would be 0: give --sigma_data.")
        return replace(self, sigma_data=sigma_data)

    @cached_property
    def scheduler(self) -> EDMEulerScheduler:
        return EDMEulerScheduler(sigma_data=self.sigma_data)

    def levels_at(self, places: Tensor) -> Tensor:
        return (self.p_mean + self.p_std * torch.special.ndtri(places)).exp()

    def lesson(self, images: Tensor, noise: Tensor, levels: Tensor) -> Lesson:
        sigma, data = levels.view(-1, 1, 1, 1), self.sigma_data
        sample = self.scheduler.precondition_inputs(images + sigma * noise, sigma)
        # (y - c_skip x) / c_out, with what cancels at low levels taken out.
        target = (sigma * images - data**2 * noise) / (data * (sigma**2 + data**2).sqrt())
        return Lesson(sample, self.scheduler.precondition_noise(levels), target)
