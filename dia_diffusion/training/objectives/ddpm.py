"""Denoising diffusion (Ho et al. 2020, arXiv 2006.11239): levels are the timesteps of a noise schedule."""

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from ...errors import UsageError
from .objective import Lesson, Objective


@dataclass(frozen=True)
class DDPM(Objective):
    """Predicts the noise (Ho et al. 2020, eq. 14), the velocity (Salimans & Ho 2022, appendix D), or the sample, whose
    error is then weighted by the signal-to-noise ratio.

    With `snr_gamma`, errors are weighted so that the error of the sample counts `min(SNR, gamma)` times, whatever is
    predicted (Hang et al. 2023, eq. 4).
    """

    title = "denoising diffusion (DDPM, arXiv 2006.11239)"

    prediction_type: str = "epsilon"
    ddpm_num_steps: int = 1000
    ddpm_beta_schedule: str = "linear"
    rescale_betas_zero_snr: bool = False
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UsageError(
                "rescale_betas_zero_snr leaves no signal at the last timestep, where noise says nothing about the "
                "image: use it with --prediction_type v_prediction or sample."
            )

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

    def levels_at(self, places: Tensor) -> Tensor:
        return (places * self.ddpm_num_steps).long()

    def draw_levels(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        return torch.randint(0, self.ddpm_num_steps, (count,), generator=generator, device=device)

    def lesson(self, images: Tensor, noise: Tensor, levels: Tensor) -> Lesson:
        noisy = self.scheduler.add_noise(images, noise, levels)
        if self.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(images, noise, levels)
        else:
            target = {"epsilon": noise, "sample": images}[self.prediction_type]
        return Lesson(noisy, levels, target, self._weights(levels))

    def _weights(self, levels: Tensor) -> Tensor | None:
        if self.prediction_type != "sample" and self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, levels)
        weights = snr if self.snr_gamma is None else snr.clamp(max=self.snr_gamma)
        # An error of the noise or of the velocity is this many times that of the sample.
        return weights / {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}[self.prediction_type]
