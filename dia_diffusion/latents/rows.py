"""Images as latents of one size, encoded beforehand."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data import PixelDataset
from ..randomness import step_seed
from .scaling import scale_latents
from .shape import LatentShape

# Of the streams of random numbers of a step; those of batches are numbered from 1.
_POSTERIOR = 2**32 - 1


class LatentDataset:
    """The latents of the images of a `PixelDataset`, under the same names.

    Args:
        pixels (`PixelDataset`): The images.
        shape (`LatentShape`): Of the latents of one: `(c, r, r)`.
        vae_config: What scales them to about unit variance.
        rows, flipped (`datasets.Dataset`): What `encode_images` made of the images, and, where there are such, of the
            flipped images.
    """

    def __init__(
        self,
        pixels: PixelDataset,
        shape: LatentShape,
        vae_config: Mapping[str, Any],
        rows: Dataset,
        flipped: Dataset | None = None,
    ):
        self.channels, self.resolution = shape
        self.vae_config = dict(vae_config)
        self.rows = {"posterior": rows} | ({} if flipped is None else {"flipped": flipped})
        self.pixels = pixels
        self.labels = pixels.labels
        self.num_classes = pixels.num_classes

    def __len__(self) -> int:
        return len(self.rows["posterior"])

    def fetch(self, indices: Sequence[int], crop: Callable | None = None) -> dict[str, Tensor]:
        """Means and standard deviations, and labels where there are any, of some images.

        Args:
            indices (`Sequence[int]` of length B): Which images.
            crop (`Callable`, *optional*): Has no meaning here: images were cut before they were encoded.

        Returns:
            `dict`: `posterior` and, where there are such, `flipped`, float16 of shape `(B, 2, c, r, r)`, and `labels`,
            int64 of shape `(B,)`.
        """
        indices, shape = list(indices), (-1, 2, self.channels, self.resolution, self.resolution)
        batch = {}
        for name, rows in self.rows.items():
            joined = bytearray().join(rows[indices]["posterior"].to_pylist())
            batch[name] = torch.from_numpy(np.frombuffer(joined, dtype=np.float16).reshape(shape))
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[indices])
        return batch

    def draw(self, seed: int, step: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers for draws from the posterior of `count` images, `(count, c, r, r)`: a function of the
        seed and the step alone."""
        generator = torch.Generator(device).manual_seed(step_seed(seed, step, _POSTERIOR))
        shape = (count, self.channels, self.resolution, self.resolution)
        return torch.randn(shape, generator=generator, device=device)

    def model_inputs(
        self, batch: Mapping[str, Tensor], flips: Tensor | None = None, draws: Tensor | None = None
    ) -> Tensor:
        """What a diffusion model sees of images: a draw from their posterior, scaled.

        Args:
            batch (`dict`): What `fetch` gave, on any device.
            flips (`Tensor` of shape `(B,)`, *optional*): Which of them are flipped.
            draws (`Tensor` of shape `(B, c, r, r)`, *optional*): What `draw` gave; by default the mean counts.

        Returns:
            `Tensor`: float32 of shape `(B, c, r, r)`.
        """
        posterior = batch["posterior"]
        if flips is not None:
            posterior = torch.where(flips[:, None, None, None, None], batch["flipped"], posterior)
        mean, std = posterior.float().unbind(dim=1)
        latents = mean if draws is None else mean + std * draws
        return scale_latents(latents, self.vae_config)
