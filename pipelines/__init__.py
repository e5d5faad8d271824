"""Sampling pipelines. Installed as `dia_diffusion.pipelines`."""

from .self_contained import keep_sources

# It imports the pipeline and the UNet: diffusers loads a UNet of this class only where its module has been imported.
keep_sources()
