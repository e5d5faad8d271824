"""The loss on held-out images."""

import itertools
import math

import torch
from torch import nn

from ..data.pixels import PixelDataset
from ..latents.space import LatentDataset
from ..objectives import Objective
from ..randomness import step_seed


@torch.no_grad()
def held_out_loss(
    unet: nn.Module,
    objective: Objective,
    dataset: PixelDataset | LatentDataset,
    batch_size: int,
    limit: int = 1024,
    draws: int = 1,
) -> float:
    """Return the loss on held-out images, with the same noise and noise levels at each call.

    The levels are spread evenly over their distribution in training, so that their choice adds no variance.

    Args:
        unet (`nn.Module`), objective (`Objective`): The model, and what it learns.
        dataset (`PixelDataset` or `LatentDataset`): The held-out images, which may be sorted by class.
        batch_size (`int`): Images at a time.
        limit (`int`, *optional*, defaults to 1024): The most images to take; they are spread over the data set.
        draws (`int`, *optional*, defaults to 1): How often each image is taken, with other noise.
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
        posterior = dataset.draw(0, draw, count)
        for start in range(0, count, batch_size):
            batch = dataset.fetch(rows[start : start + batch_size])
            batch = {name: values.to(device) for name, values in batch.items()}
            taken = slice(start, start + batch_size)
            images = dataset.model_inputs(batch, draws=None if posterior is None else posterior[taken].to(device))
            labels, noise = batch.get("labels"), all_noise[taken].to(device)
            order = (torch.arange(start, start + len(images)) + draw * count) * stride % (count * draws)
            levels = objective.quantile((order + 0.5) / (count * draws)).to(device)
            total += objective.loss(unet, images, noise, levels, labels).item() * len(images)
    unet.train(training)
    return total / (count * draws)


def _shuffling_stride(size: int) -> int:
    """Return a stride that visits all of `size` indices and takes neighbours far apart."""
    fits = (
        stride
        for stride in itertools.count(7919)
        if math.gcd(stride, size) == 1 and (8 * min(stride % size, -stride % size) >= size or size == 1)
    )
    return next(fits)
