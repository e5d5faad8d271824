"""Checksums of weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
