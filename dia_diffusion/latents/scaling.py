"""The scaling of latents between a VAE and a diffusion model, which expects about unit variance."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def scale_latents(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Scale the latents of a VAE to about mean 0 and variance 1, as its configuration says.

    As diffusers' pipelines: `(z - shift_factor) * scaling_factor` (Rombach et al. 2022, appendix G, and Esser et al.
    2024), or with figures for each channel `(z - latents_mean) * scaling_factor / latents_std`.

    Args:
        latents (`Tensor` of shape `(B, C, H, W)`): Latents from `vae.encode`.
        config: The configuration of the VAE (`vae.config`).
    """
    shift, scale = _shift_and_scale(latents, config)
    return (latents - shift) * scale


def unscale_latents(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Invert `scale_latents`: return latents for `vae.decode`."""
    shift, scale = _shift_and_scale(latents, config)
    return latents / scale + shift


def _shift_and_scale(latents: Tensor, config: Mapping[str, Any]) -> tuple[Tensor | float, Tensor | float]:
    # `None` is no scaling, and no shift.
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return shift, scale
    mean, std = (torch.tensor(values, device=latents.device, dtype=latents.dtype) for values in (mean, std))
    return mean.view(1, -1, 1, 1), scale / std.view(1, -1, 1, 1)
