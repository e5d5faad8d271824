"""Schedulers by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin

from ..errors import UsageError
from ..pipelines import NoiseKind, noise_kind
from ..suggestions import nearest
from .families import FAMILIES, Family

# Schedules of noise that all samplers can make.
_COMMON_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Of the signal that is left where none should be: as in diffusers, so that noise levels stay finite.
_LAST_SIGNAL = 2**-24


def scheduler_names(config: Mapping[str, Any]) -> list[str]:
    """The names of those that fit the model of a configuration. None where its kind of noise is not known."""
    family = _find_family(config)
    return [] if family is None else list(family.samplers)


def make_scheduler(name: str | None, config: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of this short name, for the model of a configuration, whichever scheduler that was saved by.

    It starts at the highest noise level (`timestep_spacing="trailing"`, Lin et al. 2023, arXiv 2305.08891, section
    3.3), whatever the configuration says. Without a name it is the one that pipelines of this kind are saved with.

    Raises:
        UsageError: for a name that is not one of those for this kind of noise (lists them), for one whose package is
            not installed, and for a model that was trained on another kind.
    """
    family = find_family(config)
    class_name, options = _find_sampler(family, name or family.default)
    scheduler_class = getattr(diffusers, class_name)
    own = inspect.signature(scheduler_class.__init__).parameters
    settings = {key: config[key] for key in family.of_the_model if key in config} | options
    if "timestep_spacing" in own:
        settings["timestep_spacing"] = "trailing"
    settings |= _flow(config, own) if noise_kind(config) == NoiseKind.FLOW else _schedule(config, own)
    try:
        return scheduler_class.from_config(settings)
    except ImportError as error:
        raise UsageError(f"scheduler '{name}' cannot be used here: {str(error).strip().splitlines()[0]}") from error


def find_family(config: Mapping[str, Any]) -> Family:
    """The samplers for the model of a configuration.

    Raises:
        UsageError: if there are none.
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
    fitting = ", ".join(family.samplers)
    if any(name in other.samplers for other in FAMILIES.values()):
        raise UsageError(f"scheduler '{name}' does not fit this model, which has another kind of noise: use {fitting}.")
    raise UsageError(f"unknown scheduler '{name}'. Choose one of: {fitting}.{nearest(name, family.samplers)}")


def _flow(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """How times are shifted towards the noise, which has two names."""
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return {name: shift for name in ("shift", "flow_shift") if name in own}


def _schedule(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule of betas, where a scheduler with these arguments cannot make it from its name."""
    rescaled = config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in own
    if "beta_schedule" not in own or (not rescaled and config["beta_schedule"] in _COMMON_SCHEDULES):
        return {}
    return {"trained_betas": _betas(config), "beta_schedule": "linear", "rescale_betas_zero_snr": False}


def _betas(config: Mapping[str, Any]) -> list[float]:
    """The noise schedule of a configuration as numbers, which every sampler takes."""
    own = inspect.signature(DDPMScheduler.__init__).parameters
    schedule = {key: config[key] for key in FAMILIES[NoiseKind.BETAS].of_the_model if key in own and key in config}
    signal = DDPMScheduler.from_config(schedule | {"variance_type": "fixed_small"}).alphas_cumprod.double()
    signal = torch.cat([torch.ones(1), signal.clamp(min=_LAST_SIGNAL)])
    return (1 - signal[1:] / signal[:-1]).tolist()
