"""What all objectives have in common: noise for images, and what the network should say of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn


class Lesson(NamedTuple):
    """B noised images as the network sees them, and what it is to answer.

    Attributes:
        sample (`Tensor` of shape `(B, C, H, W)`), timesteps (`Tensor` of shape `(B,)`): The network's input.
        target (`Tensor` of shape `(B, C, H, W)`): Its output, if it were perfect.
        weights (`Tensor` of shape `(B,)`, *optional*): What the squared errors count, by default 1.
    """

    sample: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor | None = None


class Objective(ABC):
    """How images are noised for a network, and what it learns to say of them.

    Subclasses are dataclasses: their fields are the options of training that belong to them, with their defaults.
    A *level* is how far an image is noised, in the objective's own measure; B images have levels `(B,)`.

    Attributes:
        title (`str`): What it is, and where it comes from.
        num_timesteps (`int`, *optional*): How many levels there are; `None` where they are continuous.
        scheduler (`SchedulerMixin`): Made for such a network. Its configuration says all of the noise that samplers
            need to know, and the pipeline's own sampler is made from it.
    """

    title: ClassVar[str]
    num_timesteps: int | None = None

    @property
    @abstractmethod
    def scheduler(self) -> SchedulerMixin: ...

    @classmethod
    def option_names(cls) -> list[str]:
        return [item.name for item in fields(cls)]

    def describe(self) -> str:
        """What is used, for people."""
        options = [f"{name} {getattr(self, name)}" for name in self.option_names()]
        return f"{self.title}: {', '.join(options)}"

    def fitted(self, measure_std: Callable[[], float]) -> "Objective":
        """The objective for images of this standard deviation, which is only measured where it counts."""
        return self

    @abstractmethod
    def levels_at(self, places: Tensor) -> Tensor:
        """The levels below which these shares, in (0, 1), of those in training lie: the inverse of their distribution
        function."""

    def draw_levels(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Levels for training, `(count,)`."""
        # Not 0, where a distribution may have no end.
        return self.levels_at(torch.rand(count, generator=generator, device=device).clamp(min=2**-25))

    @abstractmethod
    def lesson(self, images: Tensor, noise: Tensor, levels: Tensor) -> Lesson:
        """Noises images `(B, C, H, W)` of about [-1, 1] with standard normal `noise` to their levels."""

    def loss(
        self, network: nn.Module, images: Tensor, noise: Tensor, levels: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The mean squared error of the network's answers, weighted, averaged over the batch: a scalar.

        Args:
            network: Called as a `UNet2DModel`, with labels `(B,)` if it is class-conditional.
            images, noise, levels: See `lesson`.
        """
        sample, timesteps, target, weights = self.lesson(images, noise, levels)
        prediction: Any = network(sample, timesteps, labels).sample.float()
        if weights is None:
            return nn.functional.mse_loss(prediction, target)
        return (weights * (prediction - target).square().mean((1, 2, 3))).mean()
