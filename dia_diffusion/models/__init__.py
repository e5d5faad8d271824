"""Backbones with shared attention: DIAUNet2DModel, and `attach` for every other."""

from .attach import AttachedAttention, attach, detach
from .unet import DIAUNet2DModel

__all__ = ["AttachedAttention", "DIAUNet2DModel", "attach", "detach"]
