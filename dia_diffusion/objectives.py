"""Training objectives: how images are noised, and what the network predicts.

- DDPM (Ho et al. 2020, arXiv 2006.11239): noise levels are the timesteps of a noise schedule.
- EDM (Karras et al. 2022, arXiv 2206.00364): noise levels are the standard deviation of the noise, sigma.
- Flow matching on straight paths (rectified flow: Liu et al. 2022, arXiv 2209.03003): noise levels are times in (0, 1).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from .errors import UsageError
from .options.objective import OBJECTIVE_DEFAULTS, ObjectiveOptions, check_zero_snr

_DDPM, _EDM, _FLOW = OBJECTIVE_DEFAULTS["ddpm"], OBJECTIVE_DEFAULTS["edm"], OBJECTIVE_DEFAULTS["flow"]
# Schedulers of flows count the time in [0, 1] in thousandths.
_FLOW_TIMESTEPS = 1000


class NoisedBatch(NamedTuple):
    """B noised images, and the prediction that the network should make of them.

    Attributes:
        sample (`Tensor` of shape `(B, C, H, W)`), timesteps (`Tensor` of shape `(B,)`): Input of the network.
        target (`Tensor` of shape `(B, C, H, W)`): Target of its prediction.
        weights (`Tensor` of shape `(B,)`, *optional*): Weights of the squared errors, by default 1.
    """

    sample: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class Objective(ABC):
    """The noising of images and the target of the network: what training, sampling and analysis share.

    Subclasses are dataclasses: their fields are the training options that belong to them. A noise level says how much
    noise an image has, in the measure of the objective; B images have levels `(B,)`.

    Attributes:
        title (`str`): Name and source.
        num_timesteps (`int`, *optional*): Number of noise levels; `None` where they are continuous.
        scheduler (`SchedulerMixin`): A scheduler for the trained network. Its configuration describes the noise, and
            the pipeline's sampler is made from it.
    """

    title: ClassVar[str]

    @property
    def num_timesteps(self) -> int | None:
        return None

    @property
    @abstractmethod
    def scheduler(self) -> SchedulerMixin: ...

    @classmethod
    def option_names(cls) -> list[str]:
        return [item.name for item in fields(cls)]

    def describe(self) -> str:
        """Describe the objective and its options in a line."""
        options = [f"{name} {getattr(self, name)}" for name in self.option_names()]
        return f"{self.title}: {', '.join(options)}"

    def fitted(self, measure_std: Callable[[], float]) -> "Objective":
        """Return the objective for images of this standard deviation, which is measured only where it is needed."""
        return self

    @abstractmethod
    def quantile(self, shares: Tensor) -> Tensor:
        """Return the inverse CDF of the noise levels in training, at shares in (0, 1)."""

    def draw_levels(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Draw noise levels for training, `(count,)`."""
        # A share of 0 may have an infinite quantile.
        return self.quantile(torch.rand(count, generator=generator, device=device).clamp(min=2**-25))

    @abstractmethod
    def noised_batch(self, images: Tensor, noise: Tensor, levels: Tensor) -> NoisedBatch:
        """Add noise to images, each to its level, and return them with the target of the network.

        Args:
            images (`Tensor` of shape `(B, C, H, W)`): Of about [-1, 1].
            noise (`Tensor` of shape `(B, C, H, W)`): Standard normal.
            levels (`Tensor` of shape `(B,)`): Noise levels.
        """

    def loss(
        self, network: nn.Module, images: Tensor, noise: Tensor, levels: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return the weighted mean squared error of the network's predictions, averaged over the batch: a scalar.

        Args:
            network: A `UNet2DModel`, or one that is called like it, with labels `(B,)` if it is class-conditional.
            images, noise, levels: See `noised_batch`.
        """
        sample, timesteps, target, weights = self.noised_batch(images, noise, levels)
        prediction: Any = network(sample, timesteps, labels).sample.float()
        if weights is None:
            return nn.functional.mse_loss(prediction, target)
        return (weights * (prediction - target).square().mean((1, 2, 3))).mean()


@dataclass(frozen=True)
class DDPM(Objective):
    """Predict the noise (Ho et al. 2020, eq. 14), the velocity (Salimans & Ho 2022, appendix D), or the sample, whose
    error is then weighted by the signal-to-noise ratio.

    With `snr_gamma`, errors are weighted so that the error of the sample counts `min(SNR, gamma)` times, whatever is
    predicted (Hang et al. 2023, eq. 4).
    """

    title = "denoising diffusion (DDPM, arXiv 2006.11239)"

    prediction_type: str = _DDPM["prediction_type"]
    ddpm_num_steps: int = _DDPM["ddpm_num_steps"]
    ddpm_beta_schedule: str = _DDPM["ddpm_beta_schedule"]
    rescale_betas_zero_snr: bool = _DDPM["rescale_betas_zero_snr"]
    snr_gamma: float | None = _DDPM["snr_gamma"]

    def __post_init__(self) -> None:
        check_zero_snr(self.rescale_betas_zero_snr, self.prediction_type)

    @property
    def num_timesteps(self) -> int:
        return self.ddpm_num_steps

    @cached_property
    def scheduler(self) -> DDPMScheduler:
        return DDPMScheduler(
            num_train_timesteps=self.ddpm_num_steps,
            beta_schedule=self.ddpm_beta_schedule,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.rescale_betas_zero_snr,
            # Sampling begins at the highest noise level with any scheduler made from this one (Lin et al. 2023).
            timestep_spacing="trailing",
        )

    def quantile(self, shares: Tensor) -> Tensor:
        return (shares * self.ddpm_num_steps).long()

    def draw_levels(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        return torch.randint(0, self.ddpm_num_steps, (count,), generator=generator, device=device)

    def noised_batch(self, images: Tensor, noise: Tensor, levels: Tensor) -> NoisedBatch:
        noisy = self.scheduler.add_noise(images, noise, levels)
        if self.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(images, noise, levels)
        else:
            target = {"epsilon": noise, "sample": images}[self.prediction_type]
        return NoisedBatch(noisy, levels, target, self._weights(levels))

    def _weights(self, levels: Tensor) -> Tensor | None:
        if self.prediction_type != "sample" and self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, levels)
        weights = snr if self.snr_gamma is None else snr.clamp(max=self.snr_gamma)
        # An error of the noise or of the velocity is this many times that of the sample.
        return weights / {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}[self.prediction_type]


@dataclass(frozen=True)
class EDM(Objective):
    """Denoise `x = y + sigma n` through preconditioning: `D(x) = c_skip x + c_out F(c_in x, c_noise)` (eq. 7).

    The coefficients are those of table 1. The loss `1 / c_out² |D(x) - y|²` (eq. 8, with the table's weighting) is the
    plain squared error of the network F, whose target then has unit variance at every level. `ln(sigma)` is normally
    distributed in training, with mean `p_mean` and standard deviation `p_std`.
    """

    title = "EDM (arXiv 2206.00364)"

    sigma_data: float | None = _EDM["sigma_data"]
    p_mean: float = _EDM["p_mean"]
    p_std: float = _EDM["p_std"]

    def fitted(self, measure_std: Callable[[], float]) -> "EDM":
        if self.sigma_data is not None:
            return self
        # Rounded, so that it does not depend on the order in which a version of torch adds.
        sigma_data = float(f"{measure_std():.4g}")
        if sigma_data < 1e-3:
            raise UsageError("all pixels of all images are equal, so sigma_data would be 0: give --sigma_data.")
        return replace(self, sigma_data=sigma_data)

    @cached_property
    def scheduler(self) -> EDMEulerScheduler:
        return EDMEulerScheduler(sigma_data=self.sigma_data)

    def quantile(self, shares: Tensor) -> Tensor:
        return (self.p_mean + self.p_std * torch.special.ndtri(shares)).exp()

    def noised_batch(self, images: Tensor, noise: Tensor, levels: Tensor) -> NoisedBatch:
        sigma, data = levels.view(-1, 1, 1, 1), self.sigma_data
        assert data is not None, "call `fitted` first"
        sample = self.scheduler.precondition_inputs(images + sigma * noise, sigma)
        # (y - c_skip x) / c_out, without the terms that cancel at low levels.
        target = (sigma * images - data**2 * noise) / (data * (sigma**2 + data**2).sqrt())
        return NoisedBatch(sample, self.scheduler.precondition_noise(levels), target)


@dataclass(frozen=True)
class Flow(Objective):
    """Predict the velocity `n - y` on the path `(1 - t) y + t n` from an image y to noise n.

    With `weighting_scheme="logit_normal"` the logit of the time is normally distributed (Esser et al. 2024, arXiv
    2403.03206, eq. 19), with mean `logit_mean` and standard deviation `logit_std`; with `"none"` the time is uniform.
    """

    title = "flow matching (rectified flow, arXiv 2209.03003)"

    weighting_scheme: str = _FLOW["weighting_scheme"]
    logit_mean: float = _FLOW["logit_mean"]
    logit_std: float = _FLOW["logit_std"]

    @cached_property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(_FLOW_TIMESTEPS)

    def quantile(self, shares: Tensor) -> Tensor:
        if self.weighting_scheme == "none":
            return shares
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(shares))

    def noised_batch(self, images: Tensor, noise: Tensor, levels: Tensor) -> NoisedBatch:
        time = levels.view(-1, 1, 1, 1)
        timesteps = levels * _FLOW_TIMESTEPS
        return NoisedBatch((1 - time) * images + time * noise, timesteps, noise - images)


OBJECTIVES: dict[str, type[Objective]] = {"ddpm": DDPM, "edm": EDM, "flow": Flow}


def make_objective(options: ObjectiveOptions) -> Objective:
    """Return the objective that the options describe."""
    return OBJECTIVES[options.objective](
        **{name: getattr(options, name) for name in OBJECTIVE_DEFAULTS[options.objective]}
    )
