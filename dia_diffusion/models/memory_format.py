"""The order in which the numbers of images and of a UNet's weights lie in memory."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Placed = TypeVar("Placed", Tensor, nn.Module)

# Convolutions are fastest with the channels last: on a CPU by measurement (docs/speed.md), on a GPU its tensor cores
# take them so.
MEMORY_FORMAT = torch.channels_last


def lay_out(placed: Placed) -> Placed:
    """Return images `(B, C, H, W)`, or a network with its weights, in the memory format that is fastest."""
    if isinstance(placed, nn.Module):
        return placed.to(memory_format=MEMORY_FORMAT)  # type: ignore[call-overload]
    return placed.contiguous(memory_format=MEMORY_FORMAT)
