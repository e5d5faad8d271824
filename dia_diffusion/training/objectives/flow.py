"""Flow matching on straight paths (rectified flow: Liu et al. 2022, arXiv 2209.03003): levels are times in (0, 1)."""

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .objective import Lesson, Objective


@dataclass(frozen=True)
class Flow(Objective):
    """Predicts the velocity `n - y` on the path `(1 - t) y + t n` from an image y to noise n.

    With `weighting_scheme="logit_normal"` the logit of the time is normally distributed (Esser et al. 2024, arXiv
    2403.03206, eq. 19), with mean `logit_mean` and standard deviation `logit_std`; with `"none"` the time is uniform.
    """

    title = "flow matching (rectified flow, arXiv 2209.03003)"

    weighting_scheme: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    @cached_property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler()

    def levels_at(self, places: Tensor) -> Tensor:
        if self.weighting_scheme == "none":
            return places
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(places))

    def lesson(self, images: Tensor, noise: Tensor, levels: Tensor) -> Lesson:
        time = levels.view(-1, 1, 1, 1)
        timesteps = levels * self.scheduler.config.num_train_timesteps
        return Lesson((1 - time) * images + time * noise, timesteps, noise - images)
