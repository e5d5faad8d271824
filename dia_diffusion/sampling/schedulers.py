"""Schedulers by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin

from ..errors import UsageError
from ..suggestions import nearest

# What belongs to the model, and not to the sampler that was saved with it: the noise that it was trained on, what it
# predicts, and the range of its images. All else that a configuration holds (orders, types of solver, spacings of noise
# levels) has other values and meanings in other samplers, and is left to the one that is named.
_OF_THE_MODEL = (
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr prediction_type "
    "variance_type clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value"
).split()
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
# Schedules of noise that all samplers can make.
_COMMON_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Of the signal that is left where none should be: as in diffusers, so that noise levels stay finite.
_LAST_SIGNAL = 2**-24


# Short names. Missing are those for distilled models (LCM, TCD), those that run a diffusion backwards, EDM's and flow
# matching, which need another training, and DPMSolverSDE, whose noise does not come from the generators.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
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
DEFAULT_SCHEDULER = "dpm_sde"


def scheduler_names() -> list[str]:
    """The names that there are."""
    return list(SCHEDULERS)


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of this short name, for the model of a configuration, whichever scheduler that was saved by.

    It starts at the highest noise level (`timestep_spacing="trailing"`, Lin et al. 2023, arXiv 2305.08891, section
    3.3), whatever the configuration says.

    Raises:
        UsageError: for an unknown name (lists those known), for one whose package is not installed, and for a model
            that was not trained on the noise of such schedulers.
    """
    if name not in SCHEDULERS:
        raise UsageError(
            f"unknown scheduler '{name}'. Choose one of: {', '.join(SCHEDULERS)}.{nearest(name, SCHEDULERS)}"
        )
    known = "beta_schedule" in config and config.get("prediction_type") in _PREDICTIONS
    if not known or config.get("use_flow_sigmas"):
        raise UsageError(
            f"scheduler '{name}' does not fit this model: its own ({config.get('_class_name', 'unknown')}) has another "
            "kind of noise. Leave the scheduler out to use its own."
        )
    class_name, options = SCHEDULERS[name]
    scheduler_class = getattr(diffusers, class_name)
    own = inspect.signature(scheduler_class.__init__).parameters
    settings = {key: config[key] for key in _OF_THE_MODEL if key in config} | options
    if "timestep_spacing" in own:
        settings["timestep_spacing"] = "trailing"
    rescaled = config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in own
    if rescaled or config["beta_schedule"] not in _COMMON_SCHEDULES:
        settings |= {"trained_betas": _betas(config), "beta_schedule": "linear", "rescale_betas_zero_snr": False}
    try:
        return scheduler_class.from_config(settings)
    except ImportError as error:
        raise UsageError(f"scheduler '{name}' cannot be used here: {str(error).strip().splitlines()[0]}") from error


def _betas(config: Mapping[str, Any]) -> list[float]:
    """The noise schedule of a configuration as numbers, which every sampler takes."""
    own = inspect.signature(DDPMScheduler.__init__).parameters
    schedule = {key: config[key] for key in _OF_THE_MODEL if key in own and key in config}
    signal = DDPMScheduler.from_config(schedule | {"variance_type": "fixed_small"}).alphas_cumprod.double()
    signal = torch.cat([torch.ones(1), signal.clamp(min=_LAST_SIGNAL)])
    return (1 - signal[1:] / signal[:-1]).tolist()
