"""Timesteps of a scheduler, and a rehearsal that shows before the first step whether it can denoise with them."""

import copy
import inspect
import math
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..errors import UsageError, first_line
from .noise import NoiseKind, noise_kind

# A rehearsal samples from two distributions of pixels in [-1, 1]: one grey, and Gaussian ones around it.
_GREY, _WIDTHS = 0.5, (0.0, 0.5)
# The root mean square error of the grey, and the contrast in multiples of the Gaussian's, that it may end with.
_TOLERANCE, _MOST_CONTRAST = 0.1, 2.5
# The least signal, squared, so that models without any at the highest noise level have a finite one.
_LEAST_SIGNAL = 1e-12
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
        fitting = next((steps for steps in near if _rehearse(scheduler, steps, shape, learned_variance) is None), None)
        if fitting is None:
            raise UsageError(f"{name} cannot be used here: {reason}. Choose another scheduler.")
        raise UsageError(
            f"num_inference_steps {num_inference_steps} does not fit {name}: {reason}. Take a number such as "
            f"{fitting}, or another scheduler."
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
    return [number for number in dict.fromkeys(tried) if 2 <= number <= max(most, 100 * (most == steps))]


@torch.no_grad()
def _rehearse(scheduler: SchedulerMixin, steps: int, shape: tuple[int, int, int], learned_variance: bool) -> str | None:
    """Return why a scheduler does not denoise with this number of steps, or `None`.

    It samples a few pixels with perfect models of two distributions. One grey is the exact end of every solver, however
    few its steps, for the image and its noise are the same at all steps. Gaussian pixels end with less contrast after
    few steps, and with much more where a solver is not stable.
    """
    # A copy: some schedulers count their steps, or keep the predictions of earlier ones.
    scheduler = copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(scheduler.step).parameters
    arguments = {"generator": generator} if "generator" in accepted else {}
    betas, wanted = getattr(scheduler, "betas", None), scheduler.config.get("num_train_timesteps")
    if isinstance(betas, Tensor) and len(betas) != wanted:
        return f"it has {len(betas)} betas for {wanted} timesteps"
    try:
        with torch.random.fork_rng(devices=[]):
            scheduler.set_timesteps(steps, device="cpu", **_timestep_arguments(scheduler, shape))
            if reason := _find_uneven_steps(scheduler, steps):
                return reason
            noise = torch.randn(2, shape[0], 8, 8, generator=generator)
            sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
            for timestep in scheduler.timesteps:
                scale = getattr(scheduler, "scale_model_input", None)
                model_input = sample if scale is None else scale(sample, timestep)
                prediction = _perfect_prediction(scheduler, model_input, float(timestep))
                if learned_variance:
                    prediction = torch.cat([prediction, torch.zeros_like(prediction)], dim=1)
                sample = scheduler.step(prediction, timestep, sample, **arguments).prev_sample
    except Exception as error:  # Whatever diffusers, numpy or torch do.
        return _explain(scheduler, steps, error)
    if sample.shape[1] != shape[0]:
        return f"it takes the variance that the UNet predicts for further channels of {shape[0]}"
    if not sample.isfinite().all():
        return "its own arithmetic gives values that are not finite, whatever the model" + _options_in_words(scheduler)
    if "Inverse" in type(scheduler).__name__:
        return None
    if scheduler.timesteps[-1] > scheduler.timesteps[0]:
        return "it leads from images to noise" + _options_in_words(scheduler)
    missed = (sample[0] - _GREY).square().mean().sqrt().item()
    contrast = sample[1].std().item() / _WIDTHS[1]
    if missed > max(_TOLERANCE, 2 * _last_level(scheduler)):
        return "it would miss the image even with a perfect model" + _options_in_words(scheduler)
    if contrast > _MOST_CONTRAST:
        return f"it overshoots: images have {contrast:.1f} times their contrast even with a perfect model"
    return None


def _perfect_prediction(scheduler: SchedulerMixin, model_input: Tensor, timestep: float) -> Tensor:
    """Return the prediction of a perfect model, for pixels of mean m and standard deviation s.

    From a sample x = a y + b n it tells n = b d and y = m + a s² d, where d = (x - a m) / (a² s² + b²).
    """
    config, kind = scheduler.config, noise_kind(scheduler.config)
    width = torch.tensor(_WIDTHS).view(-1, 1, 1, 1)
    if kind == NoiseKind.FLOW:
        noise = max(timestep / config.num_train_timesteps, 1e-6)
        signal = 1 - noise
    elif kind == NoiseKind.EDM:
        signal, noise = 1.0, math.exp(4 * timestep)
        model_input = model_input * math.hypot(noise, config.sigma_data)
    else:
        squared = _signal_at(scheduler, timestep)
        signal, noise = math.sqrt(squared), math.sqrt(1 - squared)
    deviation = (model_input - signal * _GREY) / (signal**2 * width**2 + noise**2)
    drawn, image = noise * deviation, _GREY + signal * width**2 * deviation
    if kind == NoiseKind.FLOW:
        return drawn - image
    if kind == NoiseKind.EDM:
        # Preconditioning (Karras et al. 2022, table 1): F = (D - c_skip x) / c_out.
        data, total = config.sigma_data, noise**2 + config.sigma_data**2
        sign = -1 if config.prediction_type == "v_prediction" else 1
        return sign * (image - data**2 / total * model_input) * math.sqrt(total) / (noise * data)
    return {"epsilon": drawn, "v_prediction": signal * drawn - noise * image, "sample": image}[config.prediction_type]


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
    text = first_line(error)
    options = _options_in_words(scheduler)
    if scheduler.config.get("shift_terminal") and steps == 1:
        return f"shift_terminal {scheduler.config['shift_terminal']} sets the last of several times, and 1 step has one"
    if "NaN" in text:
        return f"its own arithmetic gives values that are not finite, whatever the model{options}"
    if isinstance(error, NotImplementedError) or "prediction_type" in text:
        return text
    if options and isinstance(error, IndexError | AssertionError):
        return f"its noise levels do not fit its own table of timesteps{options} ({type(error).__name__}: {text})"
    if isinstance(error, TypeError) and str(scheduler.config.get("variance_type")).startswith("learned"):
        return (
            f"it takes the variance (variance_type '{scheduler.config.variance_type}'), which the UNet does not predict"
        )
    return text if isinstance(error, ValueError) else f"diffusers fails ({type(error).__name__}: {text})"


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
