"""Backbones with shared attention."""

from .unet import DIAUNet2DModel

__all__ = ["DIAUNet2DModel"]
