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
    """The loss on up to `limit` held-out images, with noise and levels that are the same each time.

    The images are spread evenly over the data set, which may be sorted by class. Each image
    is taken `draws` times. The levels are spread evenly over the distribution of those in training, so that their
    choice adds no variance.
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
    """A stride that visits all of `size` places before it comes back, and does not take neighbours to neighbours."""
    for stride in itertools.count(7919):
        step = min(stride % size, -stride % size)
        if math.gcd(stride, size) == 1 and (8 * step >= size or size == 1):
            return stride
