"""Kinds of noise, and which schedulers of diffusers are for which."""

import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any

from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# Options of these schedulers alone; others that have them are for distilled models, or count time in another way.
WITHOUT_OTHERS = {
    "sigma_schedule": (EDMEulerScheduler, EDMDPMSolverMultistepScheduler),
    "shift": (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler),
}


class NoiseKind(str, Enum):
    """The kind of noise that a UNet was trained on; its value is a scheduler for it.

    It is a string, so that members of two copies of this module are equal: diffusers runs the code that a pipeline
    brings along once for each pipeline.
    """

    BETAS = "DDIMScheduler"
    EDM = "EDMEulerScheduler"
    FLOW = "FlowMatchEulerDiscreteScheduler"

    @property
    def words(self) -> str:
        """Return how to name such a UNet in a sentence."""
        return {
            NoiseKind.BETAS: "a UNet that predicts noise, sample or velocity",
            NoiseKind.EDM: "a UNet with EDM's preconditioning",
            NoiseKind.FLOW: "a UNet that predicts the velocity of a flow",
        }[self]


def noise_kind(config: Mapping[str, Any]) -> NoiseKind | None:
    """Return the kind of noise that the configuration of a scheduler is for, or `None` for any other."""
    prediction, flow_sigmas = config.get("prediction_type"), config.get("use_flow_sigmas")
    if "sigma_data" in config:
        return NoiseKind.EDM if "sigma_schedule" in config else None
    if (prediction is None and "shift" in config) or (prediction == "flow_prediction" and flow_sigmas):
        return NoiseKind.FLOW
    return NoiseKind.BETAS if prediction in PREDICTION_TYPES and not flow_sigmas else None


def find_misfit(scheduler: SchedulerMixin, trained: NoiseKind | None = None) -> str | None:
    """Return why a scheduler would not denoise with a UNet of this kind of noise, or of any, or `None` if it fits."""
    accepted = inspect.signature(type(scheduler).__init__).parameters
    # `from_config` also keeps options that the class does not have: they come from the scheduler it was made from.
    own, before = (
        {name: value for name, value in scheduler.config.items() if (name in accepted) == known}
        for known in (True, False)
    )
    kind = noise_kind(own)
    if kind is None:
        return _explain_no_kind(own)
    if any(name in own and not isinstance(scheduler, known) for name, known in WITHOUT_OTHERS.items()):
        return "it is for models of another kind"
    if before.get("use_flow_sigmas") or "shift" in before:
        return None if kind == NoiseKind.FLOW else "it does not follow the flow of the configuration it came from"
    if "sigma_data" in before:
        return "it does not follow the preconditioning of the configuration it came from"
    if "beta_schedule" in before:
        return f"it does not follow the noise schedule '{before['beta_schedule']}' of the configuration it came from"
    if needed := _required(scheduler.step) - {"model_output", "timestep", "sample"}:
        return f"its steps need {', '.join(sorted(needed))}"
    return None if trained in (None, kind) else f"it is for {kind.words}"


def _explain_no_kind(own: Mapping[str, Any]) -> str:
    if "prediction_type" not in own:
        return "it has no prediction_type"
    flow = own.get("use_flow_sigmas") or own["prediction_type"] == "flow_prediction"
    kind = "flow matching, which needs both use_flow_sigmas and 'flow_prediction'," if flow else "something else"
    return f"it is set to {kind} with prediction_type '{own['prediction_type']}'"


def _required(function: Any) -> set[str]:
    """Return the names of the arguments without which a function cannot be called."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
