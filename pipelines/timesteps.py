"""Timesteps of a scheduler, and a rehearsal that shows before the first step whether it can denoise with them."""

import copy
import inspect
import math
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..errors import UsageError
from .noise import NoiseKind, noise_kind

# Of what a rehearsal should remove: the root mean square that may be left, in units of an image in [-1, 1].
_TOLERANCE = 0.1
# Signal that remains at the highest noise level of schedules that leave none, as in diffusers.
_LEAST_SIGNAL = 2**-24
_OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    shape: tuple[int, int, int],
    device: torch.device | str,
    learned_variance: bool = False,
) -> None:
    """Set the timesteps of a scheduler, once a rehearsal has shown that it can denoise with them.

    Args:
        scheduler (`SchedulerMixin`): One that `find_misfit` accepts.
        num_inference_steps (`int`): The number of denoising steps.
        shape (`tuple`): Channels, height and width of the samples.
        device: Of the samples.
        learned_variance (`bool`, *optional*, defaults to `False`): Whether the UNet predicts the variance as well.

    Raises:
        UsageError: with the reason, where the scheduler fails with this number of steps, gives values that are not
            finite, or ends far from the image even with a perfect model.
    """
    check_steps(scheduler, num_inference_steps, shape, learned_variance)
    scheduler.set_timesteps(num_inference_steps, device=device, **_timestep_arguments(scheduler, shape))


def check_steps(
    scheduler: SchedulerMixin, num_inference_steps: int, shape: tuple[int, int, int], learned_variance: bool = False
) -> None:
    """Refuse a number of steps that a scheduler cannot take: see `set_timesteps`."""
    name, timesteps = type(scheduler).__name__, scheduler.config.get("num_train_timesteps")
    most = timesteps if "beta_schedule" in scheduler.config else num_inference_steps
    if not 1 <= num_inference_steps <= most:
        raise UsageError(
            f"num_inference_steps {num_inference_steps} does not fit {name}: give at least 1, and at most as many "
            f"as the model has timesteps ({timesteps})."
        )
    reason = _rehearse(scheduler, num_inference_steps, shape, learned_variance)
    if reason is not None:
        near = _near_numbers(scheduler, num_inference_steps, most)
        fitting = [steps for steps in near if _rehearse(scheduler, steps, shape, learned_variance) is None]
        if not fitting:
            raise UsageError(f"{name} cannot be used here: {reason}. Choose another scheduler.")
        raise UsageError(
            f"num_inference_steps {num_inference_steps} does not fit {name}: {reason}. Take for example one such as "
            f"{fitting[0]}, or another scheduler."
        )


def _timestep_arguments(scheduler: SchedulerMixin, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return `mu`, where the scheduler shifts its times by the size of the image: linear in the number of pixels
    between two known points, as diffusers' pipelines for flows have it (Esser et al. 2024, arXiv 2403.03206)."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting") or "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
        return {}
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return {"mu": low + (high - low) * (shape[1] * shape[2] - least) / (most - least)}


def _near_numbers(scheduler: SchedulerMixin, steps: int, most: int) -> list[int]:
    """Return numbers of steps to advise instead, the nearest first; dividers of all timesteps come before others."""
    timesteps = scheduler.config.get("num_train_timesteps") or 1000
    dividers = [number for number in range(1, timesteps + 1) if timesteps % number == 0]
    if scheduler.config.get("timestep_spacing") == "trailing":
        dividers = [number for number in dividers if number <= steps][::-1] + dividers
    others = [number for offset in range(1, 9) for number in (steps + offset, steps - offset)]
    tried = (dividers[:3] if steps > 60 else []) + others + [10, 25, 50, 100]
    return [number for number in dict.fromkeys(tried) if 1 <= number <= max(most, 100 * (most == steps))]


@torch.no_grad()
def _rehearse(scheduler: SchedulerMixin, steps: int, shape: tuple[int, int, int], learned_variance: bool) -> str | None:
    """Return why a scheduler does not denoise with this number of steps, or `None`.

    It denoises a few pixels with the answers of a perfect model of one grey image. Whatever the order of a solver and
    however few its steps, it then ends at that image: the noise, and the image, are the same at all steps.
    """
    # A copy: some schedulers count their steps, or keep the predictions of earlier ones.
    scheduler = copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(scheduler.step).parameters
    arguments = {"generator": generator} if "generator" in accepted else {}
    try:
        with torch.random.fork_rng(devices=[]):
            scheduler.set_timesteps(steps, device="cpu", **_timestep_arguments(scheduler, shape))
            if reason := _find_uneven_steps(scheduler, steps):
                return reason
            sample = torch.randn(1, shape[0], 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
            for timestep in scheduler.timesteps:
                scale = getattr(scheduler, "scale_model_input", None)
                model_input = sample if scale is None else scale(sample, timestep)
                answer = _answer_for_grey(scheduler, model_input, float(timestep))
                if learned_variance:
                    answer = torch.cat([answer, torch.zeros_like(answer)], dim=1)
                sample = scheduler.step(answer, timestep, sample, **arguments).prev_sample
    except Exception as error:  # Whatever diffusers, numpy or torch do.
        return _explain(scheduler, steps, error)
    if sample.shape[1] != shape[0]:
        return f"it takes the variance that the UNet predicts for further channels of {shape[0]}"
    left = sample.square().mean().sqrt().item()
    if not math.isfinite(left):
        return "its own arithmetic gives values that are not finite, whatever the model" + _options_in_words(scheduler)
    # Schedulers from images to noise end where these begin.
    backwards = scheduler.timesteps[-1] > scheduler.timesteps[0]
    if not backwards and left > max(_TOLERANCE, 2 * _last_level(scheduler)):
        return "it would leave noise in the image, even of a perfect model" + _options_in_words(scheduler)
    return None


def _answer_for_grey(scheduler: SchedulerMixin, model_input: Tensor, timestep: float) -> Tensor:
    """Return what a perfect model of the image 0 predicts: the sample is its noise alone, and tells how much it is."""
    config, kind = scheduler.config, noise_kind(scheduler.config)
    if kind == NoiseKind.FLOW:
        return model_input / max(timestep / config.num_train_timesteps, 1e-6)
    if kind == NoiseKind.EDM:
        # F = (D - c_skip x) / c_out with D = 0, at the input c_in x (Karras et al. 2022, table 1).
        sign = 1 if config.prediction_type == "v_prediction" else -1
        return model_input * sign * config.sigma_data / math.exp(4 * timestep)
    signal = _signal_at(scheduler, timestep)
    noise = math.sqrt(1 - signal)
    factors = {"epsilon": 1 / noise, "v_prediction": math.sqrt(signal) / noise, "sample": 0.0}
    return model_input * factors[config.prediction_type]


def _signal_at(scheduler: SchedulerMixin, timestep: float) -> float:
    """Return the squared share of the image in a sample; between two timesteps log sigma is linear."""
    if scheduler.config.get("timestep_type") == "continuous":
        return 1 / (1 + math.exp(8 * timestep))
    table = scheduler.alphas_cumprod
    place = min(max(timestep, 0.0), len(table) - 1.0)
    lower = int(place)
    signals = [min(max(float(table[i]), _LEAST_SIGNAL), 1 - 1e-7) for i in (lower, min(lower + 1, len(table) - 1))]
    logs = [math.log(1 / signal - 1) for signal in signals]
    return 1 / (1 + math.exp(logs[0] + (place - lower) * (logs[1] - logs[0])))


def _last_level(scheduler: SchedulerMixin) -> float:
    """Return the lowest noise level of training, which some schedulers end at."""
    if noise_kind(scheduler.config) != NoiseKind.BETAS or scheduler.config.get("timestep_type") == "continuous":
        return 0.0
    return math.sqrt(1 - _signal_at(scheduler, 0.0))


def _explain(scheduler: SchedulerMixin, steps: int, error: Exception) -> str:
    """Return the reason of a failure in words, and what the scheduler was set to where that has to do with it."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    options = _options_in_words(scheduler)
    if scheduler.config.get("shift_terminal") and steps == 1:
        return f"shift_terminal {scheduler.config['shift_terminal']} sets the last of several times, and 1 step has one"
    if "NaN" in text:
        return f"its own arithmetic gives values that are not finite, whatever the model{options}"
    if isinstance(error, NotImplementedError) or "prediction_type" in text:
        return text
    if options:
        return f"its noise levels do not fit its own table of timesteps{options} ({type(error).__name__}: {text})"
    return text if isinstance(error, ValueError) and text else f"diffusers fails ({type(error).__name__}: {text})"


def _options_in_words(scheduler: SchedulerMixin) -> str:
    config = scheduler.config
    found = [name for name in _OTHER_SIGMAS if config.get(name)]
    spacing = config.get("timestep_spacing", "trailing")
    found += [f"timestep_spacing '{spacing}'"] if spacing != "trailing" else []
    return f" with {' and '.join(found)}" if found else ""


def _find_uneven_steps(scheduler: SchedulerMixin, steps: int) -> str | None:
    """Return why the steps of a scheduler would not lead from each timestep to the next, or `None`."""
    if scheduler.config.get("timestep_spacing") != "trailing":
        return None
    stride = scheduler.config.num_train_timesteps / steps
    if scheduler.timesteps.min() < 0:
        return "rounding makes it go on below the last timestep"
    if type(scheduler).__name__ in ("DDIMScheduler", "PNDMScheduler") and int(stride) < 0.95 * stride:
        # They go down by the same whole number each time.
        return f"it goes down by {int(stride)} timesteps where the next one is {stride:.2f} below"
    return None
