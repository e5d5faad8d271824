"""The samplers for each kind of noise, by short names."""

from typing import Any, NamedTuple

from ..pipelines import NoiseKind

Samplers = dict[str, tuple[str, dict[str, Any]]]


class Family(NamedTuple):
    """The samplers for a kind of noise.

    Attributes:
        of_the_model (`tuple[str, ...]`):
            What belongs to the model, and not to the sampler that was saved with it: the noise that it was trained on,
            what it predicts, and the range of its images. All else that a configuration holds (orders, types of solver,
            spacings of noise levels) has other values and meanings in other samplers, and is left to the one that is
            named.
        samplers (`dict`): For each short name the class of diffusers, and its options.
        default (`str`): The sampler that pipelines are saved with.
        noising (`str`): The one whose table of noise levels is finest, for images that are to be noised.
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
