"""The training objective, and the randomness of a step as a function of the seed and the step."""

import itertools
import math
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from ..data import PixelDataset, to_unit_range
from ..errors import UsageError
from ..randomness import step_seed
from .options import ObjectiveOptions


class StepDraws(NamedTuple):
    """What is random about a batch of B images."""

    timesteps: Tensor  # int64 (B,)
    noise: Tensor  # (B, C, H, W), standard normal
    flips: Tensor  # bool (B,)
    label_drops: Tensor  # uniform in [0, 1), (B,)

    def rows(self, rows: slice) -> "StepDraws":
        return StepDraws(*(values[rows] for values in self))


def draw_step(
    seed: int, step: int, shape: tuple[int, int, int, int], num_timesteps: int, device: torch.device | str
) -> StepDraws:
    """Draws for the whole global batch `(B, C, H, W)` of a step, of which each process takes its rows."""
    generator = torch.Generator(device).manual_seed(step_seed(seed, step))
    arguments = {"generator": generator, "device": device}
    return StepDraws(
        torch.randint(0, num_timesteps, shape[:1], **arguments),
        torch.randn(shape, **arguments),
        torch.rand(shape[:1], **arguments) < 0.5,
        torch.rand(shape[:1], **arguments),
    )


def make_noise_scheduler(options: ObjectiveOptions) -> DDPMScheduler:
    """The noise schedule of a run."""
    if options.rescale_betas_zero_snr and options.prediction_type == "epsilon":
        raise UsageError(
            "rescale_betas_zero_snr leaves no signal at the last timestep, where noise says nothing about the image: "
            "use it with --prediction_type v_prediction or sample."
        )
    return DDPMScheduler(
        num_train_timesteps=options.ddpm_num_steps,
        beta_schedule=options.ddpm_beta_schedule,
        prediction_type=options.prediction_type,
        rescale_betas_zero_snr=options.rescale_betas_zero_snr,
        # Sampling begins at the highest noise level with any scheduler made from this one (Lin et al. 2023).
        timestep_spacing="trailing",
    )


def diffusion_loss(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    images: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    labels: Tensor | None = None,
    snr_gamma: float | None = None,
) -> Tensor:
    """The mean squared error of the prediction, averaged over the batch.

    Args:
        unet: Predicts what `scheduler.config.prediction_type` says: the noise (Ho et al. 2020, eq. 14), the velocity
            (Salimans & Ho 2022, appendix D), or the sample, then weighted by the signal-to-noise ratio.
        images (`Tensor` of shape `(B, C, H, W)`): In [-1, 1].
        noise, timesteps, labels: As in `StepDraws`; labels `(B,)` for a class-conditional UNet.
        snr_gamma (`float`, *optional*): Weighs the error of the sample by `min(SNR, gamma)` (Hang et al. 2023, eq. 4).
    """
    prediction = unet(scheduler.add_noise(images, noise, timesteps), timesteps, labels).sample.float()
    kind = scheduler.config.prediction_type
    if kind == "sample":
        target = images
    else:
        target = noise if kind == "epsilon" else scheduler.get_velocity(images, noise, timesteps)
    if kind != "sample" and snr_gamma is None:
        return nn.functional.mse_loss(prediction, target)
    snr = compute_snr(scheduler, timesteps)
    weights = snr if snr_gamma is None else snr.clamp(max=snr_gamma)
    # An error of the noise or of the velocity is this many times that of the sample.
    weights = weights / {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}[kind]
    return (weights * (prediction - target).square().mean((1, 2, 3))).mean()


@torch.no_grad()
def held_out_loss(
    unet: nn.Module, scheduler: DDPMScheduler, dataset: PixelDataset, batch_size: int, limit: int = 1024, draws: int = 1
) -> float:
    """The loss on up to `limit` held-out images, with noise and timesteps that are the same each time.

    The images are spread evenly over the data set, which may be sorted by class. Each image
    is taken `draws` times. The timesteps are spread evenly over the schedule, so that their choice adds no
    variance.
    """
    device = next(unet.parameters()).device
    training = unet.training
    unet.eval()
    count = min(limit, len(dataset))
    rows = [number * len(dataset) // count for number in range(count)]
    stride = _shuffling_stride(count * draws)
    shape = (count, dataset.channels, dataset.resolution, dataset.resolution)
    total = 0.0
    for draw in range(draws):
        all_noise = torch.randn(shape, generator=torch.Generator().manual_seed(step_seed(0, draw)))
        for start in range(0, count, batch_size):
            batch = dataset.fetch(rows[start : start + batch_size])
            images = to_unit_range(batch["images"]).to(device)
            labels = batch["labels"].to(device) if "labels" in batch else None
            noise = all_noise[start : start + len(images)].to(device)
            order = (torch.arange(start, start + len(images)) + draw * count) * stride % (count * draws)
            timesteps = ((order + 0.5) / (count * draws) * scheduler.config.num_train_timesteps).long().to(device)
            total += diffusion_loss(unet, scheduler, images, noise, timesteps, labels).item() * len(images)
    unet.train(training)
    return total / (count * draws)


def _shuffling_stride(size: int) -> int:
    """A stride that visits all of `size` places before it comes back, and does not take neighbours to neighbours."""
    for stride in itertools.count(7919):
        step = min(stride % size, -stride % size)
        if math.gcd(stride, size) == 1 and (8 * step >= size or size == 1):
            return stride
