"""Sampling pipelines. Installed as `dia_diffusion.pipelines`."""

from .pipeline_dia_unet import DIAUNetPipeline

__all__ = ["DIAUNetPipeline"]
