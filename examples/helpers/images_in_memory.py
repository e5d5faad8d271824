"""Keep all images of a split in memory, so that batches are cut out of one tensor, which is fast on one core."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from dia_diffusion.data.preparation import prepare_pixels


class Images:
    """The images of a split, as uint8 pixels `(N, C, R, R)`, and their labels.

    Args:
        split (`datasets.Dataset`): Images with labels.
        resolution (`int`): Height and width R that they are given.
        device (`torch.device`): Where they are kept.
        channels (`int`, *optional*): Number C of channels; by default that of the images.
    """

    def __init__(self, split: Dataset, resolution: int, device: torch.device, channels: int | None = None):
        data = prepare_pixels(split, resolution, channels, with_labels=True)
        batch = data.fetch(range(len(data)))
        self.pixels, self.labels = batch["images"].to(device), batch["labels"].to(device)
        self.classes = data.num_classes

    def batches(self, rows: Tensor, size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of `size` images and labels, in the order of `rows`.

        With a generator each image is cropped at random out of a black border of 4 pixels, and flipped or not.
        """
        padded, side = F.pad(self.pixels, (4, 4, 4, 4)).permute(0, 2, 3, 1), torch.arange(self.pixels.shape[-1])
        for chosen in rows.split(size):
            down = across = 4 + side.expand(len(chosen), -1)
            if generator is not None:
                down, across = torch.randint(9, (2, len(chosen), 1), generator=generator) + side
                flipped = torch.rand(len(chosen), 1, generator=generator) < 0.5
                across = torch.where(flipped, across.flip(1), across)
            # In the memory format in which convolutions are fastest.
            images = padded[chosen[:, None, None], down[:, :, None], across[:, None]].permute(0, 3, 1, 2)
            yield images, self.labels[chosen]
