"""Images as latents of one size, encoded beforehand.

The latent space of a run: its VAE while it is needed, and what the UNet sees in place of pixels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from ..data.loading import load_pixels
from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..files import replace_files
from ..options.data import DataOptions
from ..randomness import step_seed
from .autoencoder import VAE, LatentShape, downsampling_factor, find_latent_shape, load_vae, vae_digest
from .encoding import encode_images
from .scaling import scale_latents

# Of the streams of random numbers of a step; those of batches are numbered from 1.
_POSTERIOR = 2**32 - 1

# Where a run keeps its VAE, in the output directory.
VAE_FOLDER = "vae"


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


@dataclass
class LatentSpace:
    """A VAE, and the shape of its latents.

    Args:
        options (`DataOptions`): Name it.
        vae: The VAE.
        shape (`LatentShape`): Of the latents of an image of the run.
    """

    options: DataOptions
    vae: VAE
    shape: LatentShape

    @classmethod
    def load(cls, options: DataOptions, data: PixelDataset) -> "LatentSpace":
        """The latent space for a run's images.

        Raises:
            UsageError: if there is no such VAE, or it does not fit the images, or these can only be cut at random.
        """
        vae = load_vae(options.vae)
        shape = find_latent_shape(vae, data.resolution, data.channels)
        if not options.center_crop and not _are_square(data):
            raise UsageError(
                "images that are not square are cut at random, which latents that are encoded once cannot be: cut "
                "them in the middle with --center_crop."
            )
        return cls(options, vae, shape)

    @property
    def seen(self) -> tuple[LatentShape, int]:
        """What the UNet sees of an image, and how many pixels a latent stands for along one side."""
        return self.shape, downsampling_factor(self.vae)

    @cached_property
    def digest(self) -> str:
        return vae_digest(self.vae)

    def describe(self, count: int) -> str:
        """What a run says at its start, of this number of images."""
        channels, size = self.shape
        # A mean and a deviation of two bytes each.
        size_in_bytes = count * 4 * channels * size**2
        times = "once"
        if self.options.random_flip:
            size_in_bytes, times = 2 * size_in_bytes, "once as they are and once flipped"
        return (
            f"Latents: {channels}x{size}x{size} of {type(self.vae).__name__} '{self.options.vae}'; images are encoded "
            f"{times}, which takes {size_in_bytes / 1e6:,.1f} MB of the cache."
        )

    def describe_scale(self, deviation: float) -> str:
        """What a run says of the standard deviation of its latents, which diffusion models expect to be about 1."""
        said = f"Standard deviation of the latents, scaled: {deviation:.3g}"
        if 0.5 <= deviation <= 2:
            return f"{said}."
        factor = (self.vae.config.scaling_factor or 1.0) / deviation
        return (
            f"{said}. The noise is made for about 1: scaling_factor {factor:.4g} in the VAE's config.json would bring "
            "them there."
        )

    def encode(self, data: PixelDataset, flips: bool) -> LatentDataset:
        """The latents of images, and where asked for those of the flipped images too. All processes share the work."""
        arguments = {"cache_dir": self.options.cache_dir, "state": PartialState()}
        rows = encode_images(self.vae, data, **arguments)
        flipped = encode_images(self.vae, data, flip=True, **arguments) if flips else None
        return LatentDataset(data, self.shape, self.vae.config, rows, flipped)

    def encode_all(
        self, data: PixelDataset, held_out: PixelDataset | None
    ) -> tuple[LatentDataset, LatentDataset | None]:
        """The latents of the training images, and of the held-out ones if there are any."""
        latents = self.encode(data, self.options.random_flip)
        return latents, None if held_out is None else self.encode(held_out, flips=False)

    def keep(self, folder: Path) -> None:
        """Saves the VAE in the output directory, so that the run does not hang on where it came from."""
        replace_files(folder / VAE_FOLDER, self.vae.save_pretrained, last="config.json")


def load_data(options: DataOptions) -> tuple[PixelDataset | LatentDataset, PixelDataset | LatentDataset | None]:
    """The training images of a run, and the held-out ones if there are any, as its UNet sees them."""
    data, held_out = load_pixels(options)
    return (data, held_out) if options.vae is None else LatentSpace.load(options, data).encode_all(data, held_out)


def _are_square(data: PixelDataset) -> bool:
    sides = data.prepared.select_columns(["width", "height"]).with_format("arrow")[:]
    return np.array_equal(sides["width"].to_numpy(), sides["height"].to_numpy())
