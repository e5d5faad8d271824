"""Samplers by short names: which fit a model, how they are made for it, and images noised as in training.

diffusers calls its samplers schedulers. A model belongs to a kind of noise (`pipelines/noise.py`), and a kind has a
family of samplers."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor

from ..errors import UsageError, first_line, nearest
from ..pipelines.noise import NoiseKind, noise_kind

Samplers = dict[str, tuple[str, dict[str, Any]]]


class Family(NamedTuple):
    """The samplers for a kind of noise.

    Attributes:
        of_the_model (`tuple[str, ...]`):
            Options that belong to the model, and not to the sampler that was saved with it: the noise that it was
            trained on, what it predicts, the range of its images. All other options of a configuration (orders, types
            of solver, spacings of noise levels) mean something else in other samplers, and are dropped.
        samplers (`dict`): The class of diffusers for each short name, and its options.
        default (`str`): The sampler that pipelines are saved with.
        noising (`str`): The sampler with the finest table of noise levels, to noise images with.
    """

    of_the_model: tuple[str, ...]
    samplers: Samplers
    default: str
    noising: str


# Missing are those for distilled models (LCM, TCD), those that run a diffusion backwards, and DPMSolverSDE, whose noise
# does not come from the generators.
_BETAS: Samplers = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    # Its Runge-Kutta steps need four steps at least, and as many evaluations for each.
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    # Set here, because it would otherwise be set with a warning.
    "dpm_singlestep": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
    "dpm_singlestep_sde": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True},
    ),
    "sa_solver": ("SASolverScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
}
_EDM: Samplers = {
    "euler": ("EDMEulerScheduler", {}),
    "dpm": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_sde": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}
_FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_FLOW: Samplers = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    # Each of its steps but the last evaluates the model twice.
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"} | _FLOW_SIGMAS),
    "dpm_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | _FLOW_SIGMAS),
    "unipc": ("UniPCMultistepScheduler", _FLOW_SIGMAS),
}

FAMILIES = {
    NoiseKind.BETAS: Family(
        tuple(
            "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr "
            "prediction_type variance_type clip_sample clip_sample_range thresholding dynamic_thresholding_ratio "
            "sample_max_value".split()
        ),
        _BETAS,
        default="dpm_sde",
        noising="ddpm",
    ),
    NoiseKind.EDM: Family(
        ("sigma_min", "sigma_max", "sigma_data", "prediction_type", "num_train_timesteps"),
        _EDM,
        default="dpm_sde",
        noising="euler",
    ),
    NoiseKind.FLOW: Family(("num_train_timesteps",), _FLOW, default="dpm_sde", noising="euler"),
}


# Noise schedules that all samplers know by name.
_COMMON_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# The least signal, as in diffusers: noise levels stay finite.
_LAST_SIGNAL = 2**-24


def scheduler_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the samplers that fit a model, from its scheduler's configuration; empty if none is known."""
    family = _find_family(config)
    return [] if family is None else list(family.samplers)


def make_scheduler(name: str | None, config: Mapping[str, Any]) -> SchedulerMixin:
    """Return the sampler of this short name, or of this class of diffusers, for a model.

    It is made from the configuration of any scheduler that was saved with the model.

    It starts at the highest noise level (`timestep_spacing="trailing"`, Lin et al. 2023, arXiv 2305.08891, section
    3.3), whatever the configuration says. Without a name it is the sampler that pipelines of this kind are saved with.

    Raises:
        UsageError: for a name that this kind of noise does not have (lists those that it has), for a sampler whose
            package is not installed, and for a model of an unknown kind of noise.
    """
    family = find_family(config)
    class_name, options = _find_sampler(family, family.default if name is None else name)
    scheduler_class = getattr(diffusers, class_name)
    own = inspect.signature(scheduler_class.__init__).parameters
    settings = {key: config[key] for key in family.of_the_model if key in config} | options
    if "timestep_spacing" in own:
        settings["timestep_spacing"] = "trailing"
    settings |= _flow(config, own) if noise_kind(config) == NoiseKind.FLOW else _schedule(config, own)
    try:
        return scheduler_class.from_config(settings)
    except ImportError as error:
        raise UsageError(f"scheduler '{name}' cannot be used here: {first_line(error)}.") from error


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the samplers that fit a model, from its scheduler's configuration.

    Raises:
        UsageError: if no sampler is known for its kind of noise.
    """
    family = _find_family(config)
    if family is None:
        raise UsageError(
            f"no scheduler but its own ({config.get('_class_name', 'unknown')}) is known to fit this model, which has "
            "another kind of noise: leave the scheduler out."
        )
    return family


def _find_family(config: Mapping[str, Any]) -> Family | None:
    kind = noise_kind(config)
    return None if kind == NoiseKind.BETAS and "beta_schedule" not in config else FAMILIES.get(kind)


def _find_sampler(family: Family, name: str) -> tuple[str, dict[str, Any]]:
    if name in family.samplers:
        return family.samplers[name]
    for sampler in family.samplers.values():
        if name == sampler[0]:
            return sampler
    fitting = ", ".join(family.samplers)
    if any(name in (short, kind) for other in FAMILIES.values() for short, (kind, _) in other.samplers.items()):
        raise UsageError(f"scheduler '{name}' does not fit this model, which has another kind of noise: use {fitting}.")
    raise UsageError(f"unknown scheduler '{name}'. Choose one of: {fitting}.{nearest(name, family.samplers)}")


def _flow(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the timestep shift of a flow scheduler, which has two names in diffusers."""
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return {name: shift for name in ("shift", "flow_shift") if name in own}


def _schedule(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the betas as numbers, where a scheduler with these arguments cannot make them from the schedule's name."""
    rescaled = config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in own
    if "beta_schedule" not in own or (not rescaled and config["beta_schedule"] in _COMMON_SCHEDULES):
        return {}
    return {"trained_betas": _betas(config), "beta_schedule": "linear", "rescale_betas_zero_snr": False}


def _betas(config: Mapping[str, Any]) -> list[float]:
    """Return the betas of a configuration's noise schedule."""
    own = inspect.signature(DDPMScheduler.__init__).parameters
    schedule = {key: config[key] for key in FAMILIES[NoiseKind.BETAS].of_the_model if key in own and key in config}
    signal = DDPMScheduler.from_config(schedule | {"variance_type": "fixed_small"}).alphas_cumprod.double()
    signal = torch.cat([torch.ones(1), signal.clamp(min=_LAST_SIGNAL)])
    return (1 - signal[1:] / signal[:-1]).tolist()


def make_noising_scheduler(config: Mapping[str, Any]) -> SchedulerMixin:
    """Return the scheduler that noises images as in the training of a model, from its scheduler's configuration.

    Raises:
        UsageError: if its kind of noise is not known.
    """
    return make_scheduler(find_family(config).noising, config)


def spread_timesteps(scheduler: SchedulerMixin, count: int) -> Tensor:
    """Return `count` timesteps, evenly spread over all of a fresh scheduler, from little noise to much.

    Raises:
        UsageError: if there are fewer.
    """
    table = scheduler.timesteps.flip(0)
    if count > len(table):
        raise UsageError(f"the model has {len(table)} timesteps, fewer than the {count} asked for: ask for fewer.")
    return table[[int((number + 0.5) * len(table) / count) for number in range(count)]]


def noise_images(scheduler: SchedulerMixin, images: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Return the network's input for images `(B, C, H, W)` at one of the scheduler's timesteps."""
    timesteps = timestep.expand(len(images))
    if hasattr(scheduler, "scale_noise"):  # a flow
        return scheduler.scale_noise(images, timesteps, noise)
    noisy = scheduler.add_noise(images, noise, timesteps)
    if not hasattr(scheduler, "precondition_inputs"):
        return noisy
    return scheduler.precondition_inputs(noisy, scheduler.sigmas[scheduler.index_for_timestep(timestep)])
