"""The space in which a run trains: pixels, or latents that a VAE computed from them beforehand.

A space is one of both kinds: it encodes all images once, describes itself, has a digest, and decodes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
from ..options.model import DataOptions
from ..randomness import step_seed
from .autoencoder import VAE, LatentShape, downsampling_factor, find_latent_shape, load_vae, vae_digest
from .encoding import encode_images
from .scaling import scale_latents

# The number of this stream of random numbers within a step; the streams of batches are numbered from 1.
_POSTERIOR = 2**32 - 1

# The folder of the VAE in the output directory.
VAE_FOLDER = "vae"


class LatentDataset:
    """Latents of the images of a `PixelDataset`, with the same methods.

    Args:
        pixels (`PixelDataset`): The images.
        shape (`LatentShape`): Channels c and size r of the latents of an image.
        vae_config: Configuration of the VAE, with the factors that scale latents to about unit variance.
        rows (`datasets.Dataset`): The result of `encode_images`.
        flipped (`datasets.Dataset`, *optional*): The result of `encode_images` for the flipped images.
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
        """Return means and standard deviations of latents, and labels if there are any.

        Args:
            indices (`Sequence[int]` of length B): Indices of the images.
            crop (`Callable`, *optional*): Ignored: images were cropped before they were encoded.

        Returns:
            `dict`: `posterior` and, if flipped images were encoded too, `flipped`, float16 of shape
            `(B, 2, c, r, r)`; `labels`, int64 of shape `(B,)`.
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
        """Return standard normal noise `(count, c, r, r)` for draws from the posterior of `count` images.

        It is a function of the seed and the step alone.
        """
        generator = torch.Generator(device).manual_seed(step_seed(seed, step, _POSTERIOR))
        shape = (count, self.channels, self.resolution, self.resolution)
        return torch.randn(shape, generator=generator, device=device)

    def model_inputs(
        self, batch: Mapping[str, Tensor], flips: Tensor | None = None, draws: Tensor | None = None
    ) -> Tensor:
        """Return what a diffusion model sees of images: draws from their posterior, scaled to about unit variance.

        Args:
            batch (`dict`): The result of `fetch`, on any device.
            flips (bool `Tensor` of shape `(B,)`, *optional*): Marks the images to flip.
            draws (`Tensor` of shape `(B, c, r, r)`, *optional*): The result of `draw`; by default the mean is taken.

        Returns:
            `Tensor`: float32 of shape `(B, c, r, r)`.
        """
        posterior = batch["posterior"]
        if flips is not None:
            posterior = torch.where(flips[:, None, None, None, None], batch["flipped"], posterior)
        mean, std = posterior.float().unbind(dim=1)
        latents = mean if draws is None else mean + std * draws
        return scale_latents(latents, self.vae_config)


class PixelSpace:
    """Pixels: nothing to encode, to save or to decode.

    Attributes:
        shape (`LatentShape`): Channels and size of what the model sees of an image.
        latent_factor (`int`, *optional*): Pixels of an image for each value of the latents along one side; `None` here.
        digest (`str`, *optional*): Of the encoder; `None` here.
    """

    latent_factor = None
    digest = None

    def __init__(self, data: PixelDataset):
        self.shape = LatentShape(data.channels, data.resolution)

    def describe(self, count: int) -> str:
        """Describe in a phrase what the model sees of `count` images."""
        return f"pixels of {self.shape.channels}x{self.shape.resolution}x{self.shape.resolution}"

    def encode_all(self, data: PixelDataset, held_out: PixelDataset | None) -> tuple[PixelDataset, PixelDataset | None]:
        """Return the training and the held-out images as the model sees them."""
        return data, held_out

    def remarks(self, data: PixelDataset | LatentDataset) -> list[str]:
        """Return lines about the values of images that are encoded."""
        return []

    def keep_decoder(self, folder: Path) -> None:
        """Save the decoder in the output directory, and release its memory."""

    def load_decoder(self, device: torch.device) -> None:
        """Return the VAE for the pipeline, or `None`."""

    def sampler_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the configuration of the pipeline's scheduler."""
        return config


class LatentSpace:
    """Latents of a VAE, with the attributes and methods of `PixelSpace`.

    Args:
        options (`DataOptions`): The options that name the VAE.
        data (`PixelDataset`): The images.

    Raises:
        UsageError: if there is no such VAE, if it does not fit the images, or if they can only be cropped at random.
    """

    def __init__(self, options: DataOptions, data: PixelDataset):
        assert options.vae is not None
        self.options = options
        vae: Any = load_vae(options.vae)
        self.shape = find_latent_shape(vae, data.resolution, data.channels)
        self.latent_factor = downsampling_factor(vae)
        self.config = dict(vae.config)
        self.digest = vae_digest(vae)
        self.vae: VAE | None = vae
        self._kept: Path | None = None
        if not options.center_crop and not _are_square(data):
            raise UsageError(
                "images that are not square are cropped at random, but latents are encoded once: crop them in the "
                "middle with --center_crop."
            )

    def describe(self, count: int) -> str:
        channels, size = self.shape
        # Mean and standard deviation, two bytes each.
        size_in_bytes = count * 4 * channels * size**2
        times = "once"
        if self.options.random_flip:
            size_in_bytes, times = 2 * size_in_bytes, "once as they are and once flipped"
        return (
            f"latents of {channels}x{size}x{size} by the VAE '{self.options.vae}', encoded {times} "
            f"({size_in_bytes / 1e6:,.1f} MB of the cache)"
        )

    def encode_all(
        self, data: PixelDataset, held_out: PixelDataset | None
    ) -> tuple[LatentDataset, LatentDataset | None]:
        """Encode the training images, the flipped ones too where they are asked for, and the held-out images.

        All processes share the work, and the results are cached.
        """
        latents = self._encode(data, self.options.random_flip)
        return latents, None if held_out is None else self._encode(held_out, flips=False)

    def remarks(self, data: PixelDataset | LatentDataset) -> list[str]:
        std = measure_std(data, most=1000)
        said = f"Standard deviation of the latents, scaled: {std:.3g}"
        if 0.5 <= std <= 2:
            return [f"{said}."]
        factor = (self.config.get("scaling_factor") or 1.0) / std
        return [
            f"{said}. The noise is made for about 1: scaling_factor {factor:.4g} in the VAE's config.json gives that."
        ]

    def keep_decoder(self, folder: Path) -> None:
        # The run then does not depend on where the VAE came from.
        self._kept = folder / VAE_FOLDER
        if PartialState().is_main_process and self.vae is not None:
            replace_files(self._kept, self.vae.save_pretrained, last="config.json")
        self.vae = None

    def load_decoder(self, device: torch.device) -> VAE:
        vae: Any = load_vae(str(self._kept or self.options.vae))
        vae.to(device)
        vae.enable_slicing()
        return vae

    def sampler_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        # Latents leave the range of pixels.
        return {**config, "clip_sample": False}

    def _encode(self, data: PixelDataset, flips: bool) -> LatentDataset:
        assert self.vae is not None
        arguments = {"cache_dir": self.options.cache_dir, "state": PartialState()}
        rows = encode_images(self.vae, data, **arguments)
        flipped = encode_images(self.vae, data, flip=True, **arguments) if flips else None
        return LatentDataset(data, self.shape, self.config, rows, flipped)


def make_space(options: DataOptions, data: PixelDataset) -> PixelSpace | LatentSpace:
    """Return the space of a run: latents where the options name a VAE, else pixels."""
    return PixelSpace(data) if options.vae is None else LatentSpace(options, data)


def load_data(options: DataOptions) -> tuple[PixelDataset | LatentDataset, PixelDataset | LatentDataset | None]:
    """Return the training images of a run, and the held-out ones or `None`, as its UNet sees them."""
    data, held_out = load_pixels(options)
    return make_space(options, data).encode_all(data, held_out)


def measure_std(data: PixelDataset | LatentDataset, most: int = 10_000) -> float:
    """Measure the standard deviation of what a model sees, over up to `most` images that are spread evenly."""
    count, sums = min(len(data), most), torch.zeros(3, dtype=torch.float64)
    for start in range(0, count, 500):
        indices = [number * len(data) // count for number in range(start, min(start + 500, count))]
        seen = data.model_inputs(data.fetch(indices), draws=data.draw(0, start, len(indices))).double()
        sums += torch.stack([torch.tensor(seen.numel()), seen.sum(), seen.square().sum()])
    number, total, squares = sums.tolist()
    return math.sqrt(max(squares / number - (total / number) ** 2, 0.0))


def _are_square(data: PixelDataset) -> bool:
    sides = data.prepared.select_columns(["width", "height"]).with_format("arrow")[:]
    return np.array_equal(sides["width"].to_numpy(), sides["height"].to_numpy())
