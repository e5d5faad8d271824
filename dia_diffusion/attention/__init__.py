"""Shared attention for residual networks (arXiv 2210.16101): the modules, who shares them, the forward pass."""
