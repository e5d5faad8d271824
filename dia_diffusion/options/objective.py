"""Options that say what the UNet learns."""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from ..errors import UsageError
from ..objectives import OBJECTIVES, Objective
from .fields import Options, Range, Share, option


@dataclass
class ObjectiveOptions(Options):
    """What the UNet learns. Options that belong to one objective have its default, and are `None` for the others."""

    objective: Literal[tuple(OBJECTIVES)] = option(
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
        for name in self.of_others(self.objective):
            if (value := getattr(self, name)) is not None:
                owners = [key for key, kind in OBJECTIVES.items() if name in kind.option_names()]
                raise UsageError(
                    f"{name} {value} has no meaning with --objective {self.objective}: it belongs to "
                    f"{', '.join(owners)}. Leave it out."
                )
        for name, value in asdict(self.make()).items():
            setattr(self, name, value)

    @staticmethod
    def of_others(objective: str) -> list[str]:
        """The options that belong to other objectives than this one."""
        names = [name for kind in OBJECTIVES.values() for name in kind.option_names()]
        return [name for name in names if name not in OBJECTIVES[objective].option_names()]

    def make(self) -> Objective:
        """The objective that they describe.

        Raises:
            UsageError: if the options do not go together.
        """
        kind = OBJECTIVES[self.objective]
        given = {name: getattr(self, name) for name in kind.option_names()}
        return kind(**{name: value for name, value in given.items() if value is not None})

    def as_built(self, objective: Objective) -> "ObjectiveOptions":
        """What was given, completed by what the objective is: for the record."""
        return replace(self, **asdict(objective))
