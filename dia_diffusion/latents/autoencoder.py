"""VAEs: load them, know them by a digest, encode images, and check the shape of their latents."""

import inspect
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import UsageError, first_line, why_not_loaded
from ..files import json_digest, weights_digest


class LatentShape(NamedTuple):
    """Shape of the latents of one image.

    Attributes:
        channels (`int`): c.
        resolution (`int`): Height and width r.
    """

    channels: int
    resolution: int


VAE: TypeAlias = AutoencoderKL | AutoencoderTiny
_CLASSES = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}


def load_vae(name_or_path: str) -> VAE:
    """Load a VAE in float32, frozen and in evaluation mode.

    Args:
        name_or_path (`str`):
            A folder or a Hub id of an `AutoencoderKL` or `AutoencoderTiny` of diffusers, or of a pipeline that has one
            in its subfolder `vae`.

    Raises:
        UsageError: if there is none, or one of another class, or its weights are incomplete or not finite, or the
            scaling of its configuration has no inverse.
    """
    try:
        location = find_component(AutoencoderKL, name_or_path, "vae")
        config = AutoencoderKL.load_config(name_or_path, **location)
        name = config.get("_class_name") if isinstance(config, dict) else None
        if name not in _CLASSES:
            raise UsageError(f"'{name_or_path}' is a {name or 'model of no class'}; a VAE is one of: {_names()}.")
        vae, info = _CLASSES[name].from_pretrained(
            name_or_path, **location, torch_dtype=torch.float32, output_loading_info=True
        )
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"cannot load a VAE from '{name_or_path}': {why_not_loaded(name_or_path, error)} Name a "
            f"folder or a Hub id of an {_names()}, or of a pipeline that holds one."
        ) from error
    if info["missing_keys"]:
        raise UsageError(f"the VAE '{name_or_path}' lacks weights, for example {sorted(info['missing_keys'])[0]}.")
    if not all(tensor.isfinite().all() for tensor in vae.state_dict().values()):
        raise UsageError(f"the VAE '{name_or_path}' has weights that are not finite numbers.")
    _check_scale(name_or_path, vae.config)
    if Path(name_or_path).exists():
        # The name alone: a path of this machine would be saved with the VAE.
        vae.register_to_config(_name_or_path=Path(name_or_path).resolve().name)
    return vae.eval().requires_grad_(False)


def downsampling_factor(vae: VAE) -> int:
    """Return the ratio of the side of an image to that of its latents."""
    tiny = isinstance(vae, AutoencoderTiny)
    return 2 ** (len(vae.config.encoder_block_out_channels if tiny else vae.config.block_out_channels) - 1)


def vae_digest(vae: VAE) -> str:
    """Return a digest of a VAE's class, weights and configuration, whichever diffusers saved it."""
    defaults = inspect.signature(type(vae)).parameters
    config = {
        name: value
        for name, value in json.loads(json.dumps(dict(vae.config), default=str)).items()
        if name in defaults and value != _plain(defaults[name].default)
    }
    return json_digest([type(vae).__name__, config, weights_digest(vae.state_dict())])[:32]


@torch.no_grad()
def encode_posterior(vae: VAE, images: Tensor) -> Tensor:
    """Return mean and standard deviation of the latents of images; an `AutoencoderTiny` has a deviation of 0.

    Args:
        images (`Tensor` of shape `(B, C, R, R)`): In [-1, 1].

    Returns:
        `Tensor`: float32 of shape `(B, 2, c, r, r)`, not scaled.
    """
    encoded = vae.encode(images)
    if isinstance(vae, AutoencoderTiny):
        return torch.stack([encoded.latents, torch.zeros_like(encoded.latents)], dim=1)
    return torch.stack([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)


def _check_scale(name_or_path: str, config: Any) -> None:
    """Refuse a configuration whose scaling of latents has no inverse."""
    factor, mean, std = config.scaling_factor, config.get("latents_mean"), config.get("latents_std")
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise UsageError(f"scaling_factor {factor} of the VAE '{name_or_path}' must be a number above 0.")
    if (mean is None) != (std is None):
        raise UsageError(f"the VAE '{name_or_path}' has only one of latents_mean and latents_std.")
    if std is not None and not (len(mean) == len(std) == config.latent_channels and min(std) > 0):
        raise UsageError(
            f"latents_mean and latents_std of the VAE '{name_or_path}' must have a figure for each of its "
            f"{config.latent_channels} channels, and deviations above 0."
        )


def find_component(model_class: Any, name_or_path: str, subfolder: str) -> dict[str, str]:
    """Return the arguments that load a component from a folder or repository: with its subfolder, or none on top.

    Raises:
        UsageError: for a file.
    """
    if Path(name_or_path).is_file():
        raise UsageError(f"'{name_or_path}' is a file: name the folder that holds it.")
    try:
        model_class.load_config(name_or_path, subfolder=subfolder)
    except OSError:
        return {}
    return {"subfolder": subfolder}


def _names() -> str:
    return " or ".join(_CLASSES)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def find_latent_shape(vae: VAE, resolution: int, channels: int) -> LatentShape:
    """Find the shape of the latents of square images, with tensors that have a shape and no values.

    Args:
        vae: Encodes and decodes them.
        resolution, channels (`int`): Side and channels of the images.

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
    except Exception as error:  # Any error of diffusers or torch for such a size.
        raise UsageError(f"the VAE cannot encode images of resolution {resolution}: {first_line(error)}.") from error
    if decoded.shape[-2:] != (resolution, resolution):
        factor = downsampling_factor(vae)
        raise UsageError(
            f"resolution {resolution} does not fit the VAE, whose images would have {decoded.shape[-1]} pixels a side "
            f"again: choose a multiple of {factor}."
        )
    return LatentShape(latents.shape[1], latents.shape[-1])
