"""Options that say what the UNet learns."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import UsageError
from .fields import Options, Range, Share, option

# The options that belong to each objective, with their defaults. An option that is not there is `None`.
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "ddpm": {
        "prediction_type": "epsilon",
        "ddpm_num_steps": 1000,
        "ddpm_beta_schedule": "linear",
        "rescale_betas_zero_snr": False,
        "snr_gamma": None,
    },
    "edm": {"sigma_data": None, "p_mean": -1.2, "p_std": 1.2},
    "flow": {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0},
}


@dataclass
class ObjectiveOptions(Options):
    """What the UNet learns. Options that belong to one objective have its default, and are `None` for the others."""

    objective: Literal["ddpm", "edm", "flow"] = option(
        "ddpm", "ddpm: noise by a schedule of betas. edm: Karras et al. 2022. flow: flow matching on straight paths."
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "ddpm: what the model predicts, by default epsilon."
    )
    ddpm_num_steps: Annotated[int, Range(least=2)] | None = option(
        None, "ddpm: timesteps of the noise schedule, by default 1000."
    )
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] | None = option(
        None, "ddpm: how noise grows, by default linear; squaredcos_cap_v2 is the cosine schedule."
    )
    rescale_betas_zero_snr: bool | None = option(
        None, "ddpm: zero signal at the last timestep (Lin et al. 2023).", nargs="?", const=True
    )
    snr_gamma: Annotated[float, Range(above=0)] | None = option(
        None, "ddpm: Min-SNR loss weighting (Hang et al. 2023); 5 is usual."
    )
    sigma_data: Annotated[float, Range(least=1e-3, most=1e3)] | None = option(
        None, "edm: standard deviation of the images in [-1, 1]; by default it is measured."
    )
    p_mean: Annotated[float, Range(least=-5, most=5)] | None = option(
        None, "edm: mean of ln(sigma) in training, by default -1.2."
    )
    p_std: Annotated[float, Range(above=0, most=5)] | None = option(
        None, "edm: standard deviation of ln(sigma) in training, by default 1.2."
    )
    weighting_scheme: Literal["logit_normal", "none"] | None = option(
        None, "flow: distribution of times in training, logit_normal (the default); none: uniform."
    )
    logit_mean: Annotated[float, Range(least=-10, most=10)] | None = option(
        None, "flow: mean of the logit of the time, by default 0."
    )
    logit_std: Annotated[float, Range(above=0, most=10)] | None = option(
        None, "flow: standard deviation of the logit of the time, by default 1."
    )
    label_dropout: Share = option(0.1, "Share of labels replaced by 'no class', for classifier-free guidance.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in options_of_other_objectives(self.objective):
            if (value := getattr(self, name)) is not None:
                owner = next(key for key, defaults in OBJECTIVE_DEFAULTS.items() if name in defaults)
                raise UsageError(
                    f"{name} {value} has no meaning with --objective {self.objective}: it belongs to {owner}. Leave it "
                    "out."
                )
        for name, default in OBJECTIVE_DEFAULTS[self.objective].items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        check_zero_snr(self.rescale_betas_zero_snr, self.prediction_type)


def check_zero_snr(rescaled: bool | None, prediction_type: str | None) -> None:
    """Refuse to predict noise where the last timestep has no signal.

    Raises:
        UsageError: for `rescale_betas_zero_snr` with the prediction type `epsilon`.
    """
    if rescaled and prediction_type == "epsilon":
        raise UsageError(
            "rescale_betas_zero_snr leaves no signal at the last timestep, where noise says nothing about the image: "
            "use it with --prediction_type v_prediction or sample."
        )


def options_of_other_objectives(objective: str) -> list[str]:
    """Return the names of the options that belong to other objectives than this one."""
    return [name for key, defaults in OBJECTIVE_DEFAULTS.items() if key != objective for name in defaults]
