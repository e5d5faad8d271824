"""Images as a model saw them in training: noised by the scheduler that it was saved with."""

from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin
from torch import Tensor

from .schedulers import find_family, make_scheduler


def make_noising_scheduler(config: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler that noises images for the model of a configuration.

    Raises:
        UsageError: if there is none.
    """
    return make_scheduler(find_family(config).noising, config)


def spread_timesteps(scheduler: SchedulerMixin, count: int) -> Tensor:
    """`count` timesteps, evenly spread over all that a fresh scheduler has, from little noise to much."""
    table = scheduler.timesteps.flip(0)
    return table[[int((number + 0.5) * len(table) / count) for number in range(count)]]


def noise_images(scheduler: SchedulerMixin, images: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """What a network sees at a timestep, which is one of the scheduler's, of images `(B, C, H, W)`."""
    timesteps = timestep.expand(len(images))
    if hasattr(scheduler, "scale_noise"):  # a flow
        return scheduler.scale_noise(images, timesteps, noise)
    noisy = scheduler.add_noise(images, noise, timesteps)
    if not hasattr(scheduler, "precondition_inputs"):
        return noisy
    return scheduler.precondition_inputs(noisy, scheduler.sigmas[scheduler.index_for_timestep(timestep)])
