"""The randomness of a step, as a function of the seed and the step."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..randomness import step_seed
from .objectives import Objective


class StepDraws(NamedTuple):
    """What is random about a batch of B images."""

    levels: Tensor  # how far each is noised, as its objective has it, (B,)
    noise: Tensor  # (B, C, H, W), standard normal
    flips: Tensor  # bool (B,)
    label_drops: Tensor  # uniform in [0, 1), (B,)

    def rows(self, rows: slice) -> "StepDraws":
        return StepDraws(*(values[rows] for values in self))


def draw_step(
    seed: int, step: int, shape: tuple[int, int, int, int], objective: Objective, device: torch.device | str
) -> StepDraws:
    """Draws for the whole global batch `(B, C, H, W)` of a step, of which each process takes its rows."""
    generator = torch.Generator(device).manual_seed(step_seed(seed, step))
    arguments = {"generator": generator, "device": device}
    return StepDraws(
        objective.draw_levels(shape[0], **arguments),
        torch.randn(shape, **arguments),
        torch.rand(shape[:1], **arguments) < 0.5,
        torch.rand(shape[:1], **arguments),
    )
