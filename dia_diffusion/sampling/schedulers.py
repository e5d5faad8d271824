"""Schedulers by name."""

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from ..errors import UsageError

# Short names. Missing are those for distilled models (LCM, TCD), those that run a diffusion backwards, EDM's and flow
# matching, which need another training, and DPMSolverSDE, whose noise does not come from the generators.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm_singlestep": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_singlestep_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "sa_solver": ("SASolverScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
}
DEFAULT_SCHEDULER = "dpm_sde"


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of this short name, with the noise schedule and the prediction type of a configuration.

    Raises:
        UsageError: for an unknown name (lists those known), and for one whose package is not installed.
    """
    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler '{name}'. Choose one of: {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    # Of a configuration that was never saved, `from_config` takes only the values that differ from the defaults of
    # *its* scheduler; the defaults of another are other betas.
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    try:
        return getattr(diffusers, class_name).from_config(config, **options)
    except ImportError as error:
        raise UsageError(f"scheduler '{name}' cannot be used here: {str(error).strip().splitlines()[0]}") from error
