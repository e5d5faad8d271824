"""Follow the channels of a tensor through the steps that a forward pass was watched to take."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .watch import Step

# Layers and norms by the dimension that they leave their channels in.
_LAST = set("linear addmm matmul rmatmul mm bmm baddbmm einsum embedding linear_dynamic".split())
_LAST |= {"multi_head_attention_forward"} | set(
    "layer_norm native_layer_norm rms_norm scaled_dot_product_attention lstm gru".split()
)
_SECOND = {f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)}
_SECOND |= {"batch_norm", "group_norm", "instance_norm", "convolution", "native_batch_norm", "native_group_norm"}
# What a gate of channels may stand before as well as behind: each channel comes out of it scaled as it went in.
_RESHAPES = set("reshape view view_as reshape_as flatten unflatten unsqueeze squeeze expand expand_as".split())
_RESHAPES.add("unsafe_view")
_MOVES = set("permute transpose swapaxes swapdims movedim moveaxis t T mT".split())
_CUTS = set("getitem slice narrow chunk split tensor_split split_with_sizes unbind select".split())
_SCALES = set("mul rmul imul multiply div truediv neg dropout dropout1d dropout2d dropout3d feature_dropout".split())
_SCALES |= set("to type type_as float half bfloat16 contiguous clone detach roll flip masked_fill alias".split())
_SCALES.add("to_copy")
# A factor that is not negative, one for each channel, may stand before these as well.
_SCALES |= set("relu leaky_relu pad pixel_shuffle pixel_unshuffle".split())
_SCALES |= {f"{adaptive}avg_pool{n}d" for adaptive in ("", "adaptive_") for n in (1, 2, 3)}
TRANSPARENT = _SCALES | _RESHAPES | _MOVES | _CUTS


def channel_dim(steps: Sequence[Step], number: int) -> int | None:
    """Return the dimension of a tensor that holds its channels, from the layer or norm that made it, or None."""
    step = steps[number]
    if step.name in _SECOND:
        return 1
    if step.name in _LAST:
        return len(step.shape) - 1
    for source in sorted(step.inputs, key=lambda source: -math.prod(steps[source].shape)):
        dim = channel_dim(steps, source)
        if dim is not None:
            return _dim_after(step, steps[source].shape, dim)
    return None


def _dim_after(step: Step, before: tuple[int, ...], dim: int) -> int | None:
    """Return the dimension of the result of a step that dimension `dim` of its input, of shape `before`, has become."""
    after = step.shape
    if step.name in _MOVES:
        # Done again with sizes that number the dimensions.
        numbered = torch.empty([*range(len(before))], device="meta")
        moved = getattr(numbered, step.name)
        return [*(moved if isinstance(moved, Tensor) else moved(*step.arguments[1:])).shape].index(dim)
    if step.name in _RESHAPES:
        for place, size in enumerate(after):
            if size == before[dim] and math.prod(after[:place]) == math.prod(before[:dim]):
                return place
        # Heads that are joined.
        return len(after) - 1 if dim == len(before) - 1 else None
    if step.name == "getitem":
        return _dim_of_item(step.arguments[1], len(before), dim)
    return dim if len(after) == len(before) else None


def _dim_of_item(index: Any, dimensions: int, dim: int) -> int | None:
    """Return the dimension of `x[index]` that dimension `dim` of x has become."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, Tensor | list) for item in items):
        return None
    if Ellipsis in items:
        here, taken = items.index(Ellipsis), sum(item is not None for item in items) - 1
        items[here : here + 1] = [slice(None)] * (dimensions - taken)
    before = after = 0
    for item in items:
        if item is not None and before == dim:
            return after if isinstance(item, slice) else None
        before += item is not None
        after += not isinstance(item, int)
    return after + dim - before
