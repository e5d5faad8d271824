"""Backbones with shared attention: DIAUNet2DModel, and `attach` for every other."""
