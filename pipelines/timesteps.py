"""Timesteps of a scheduler, where it can step from each of them to the next."""

import torch
from diffusers import SchedulerMixin

from ..errors import UsageError


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str) -> None:
    """As `scheduler.set_timesteps`.

    Raises:
        UsageError: for a number of steps with which the scheduler fails, or, in silence, does not step as it says.
    """
    config = scheduler.config
    name, timesteps = type(scheduler).__name__, config.get("num_train_timesteps")
    most = timesteps if "beta_schedule" in config else num_inference_steps
    if not 1 <= num_inference_steps <= most:
        raise UsageError(
            f"num_inference_steps {num_inference_steps} does not fit {name}: give at least 1, and at most as many "
            f"as the model has timesteps ({timesteps})."
        )
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
    except (ValueError, IndexError) as error:
        raise UsageError(f"num_inference_steps {num_inference_steps} does not fit {name}: {error}") from error
    if config.get("timestep_spacing") == "trailing":
        _check_trailing(scheduler, num_inference_steps)


def _check_trailing(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Refuses numbers of steps with which diffusers would not step from each timestep to the next."""
    name, timesteps = type(scheduler).__name__, scheduler.config.num_train_timesteps
    stride = timesteps / num_inference_steps
    if scheduler.timesteps.min() < 0:
        reason = "rounding makes it go on below the last timestep"
    elif name in ("DDIMScheduler", "PNDMScheduler") and int(stride) < 0.95 * stride:
        # They go down by the same whole number each time.
        reason = f"it goes down by {int(stride)} timesteps where the next one is {stride:.2f} below"
    else:
        return
    near = next(steps for steps in range(num_inference_steps, 0, -1) if timesteps % steps == 0)
    raise UsageError(
        f"num_inference_steps {num_inference_steps} does not fit {name}: {reason}. Take a number that divides "
        f"{timesteps}, such as {near}, or another scheduler."
    )
