"""Which shape latents have, and which images a VAE takes."""

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import UsageError
from .autoencoder import VAE, downsampling_factor, encode_posterior


class LatentShape(NamedTuple):
    """Of the latents of one image.

    Attributes:
        channels (`int`): c.
        resolution (`int`): Height and width r.
    """

    channels: int
    resolution: int


def find_latent_shape(vae: VAE, resolution: int, channels: int) -> LatentShape:
    """The shape of the latents of square images, tried on tensors that have a shape and no values.

    Args:
        vae: What encodes and decodes them.
        resolution, channels (`int`): Of the images.

    Raises:
        UsageError: if the VAE does not take such images, or does not give them back in their size.
    """
    config = vae.config
    if not config.in_channels == config.out_channels == channels:
        takes = f"{config.in_channels}" + f" and gives {config.out_channels}" * (
            config.out_channels != config.in_channels
        )
        advice = f"add --channels {config.in_channels}" if takes in "13" else "choose another VAE"
        raise UsageError(f"the VAE takes images of {takes} channels, and these have {channels}: {advice}.")
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            latents = encode_posterior(vae, torch.zeros(1, channels, resolution, resolution))[:, 0]
            decoded = vae.decode(latents).sample
    except Exception as error:  # Whatever such a size makes diffusers or torch do.
        raise UsageError(
            f"the VAE cannot encode images of resolution {resolution}: {str(error).splitlines()[0]}"
        ) from error
    if decoded.shape[-2:] != (resolution, resolution):
        factor = downsampling_factor(vae)
        raise UsageError(
            f"resolution {resolution} does not fit the VAE, which makes latents of 1/{factor} of it and images of "
            f"{decoded.shape[-1]} again: choose a multiple of {factor}."
        )
    return LatentShape(latents.shape[1], latents.shape[-1])
