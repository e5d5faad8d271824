"""Sampling pipelines. Installed as `dia_diffusion.pipelines`."""

# diffusers loads a UNet of this class only where its module has been imported.
from dia_diffusion.models import unet  # noqa: F401

from .noise import NoiseKind, noise_kind
from .pipeline_dia_unet import DIAUNetPipeline
from .self_contained import keep_sources

keep_sources()

__all__ = ["DIAUNetPipeline", "NoiseKind", "noise_kind"]
