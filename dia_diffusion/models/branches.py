"""Residual branches of a backbone: the fused residual block of diffusers, and gates at the ends of branches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention.forward_pass import Gate, GatedBlocks


class FusedResnetBlock2D(ResnetBlock2D):
    """A `ResnetBlock2D` that computes `S(x) + F(x) * gate` (arXiv 2210.16101, eq. 2) in one pass over the features.

    It has the weights and the signature of diffusers' block, and gives the same output where it has no gate. A hook
    that gates its `conv2` would do the same, slower: `benchmarks/attention_cost.py` has the figures.
    """

    gate: Gate | None = None

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: object, **kwargs: object) -> Tensor:
        """Map features `(B, C, H, W)` and a time embedding to features. Further arguments are ignored, as diffusers
        ignores them."""
        shortcut, branch = input_tensor, self.nonlinearity(self.norm1(input_tensor))
        resample = self.upsample or self.downsample
        if resample is not None:
            shortcut, branch = resample(shortcut), resample(branch)
        branch = self._second_norm(self.conv1(branch), temb)
        branch = self.conv2(self.dropout(self.nonlinearity(branch)))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)

        gate = None if self.gate is None else self.gate(branch)
        output = shortcut + branch if gate is None else torch.addcmul(shortcut, branch, gate)
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor

    def _second_norm(self, branch: Tensor, temb: Tensor | None) -> Tensor:
        if self.time_emb_proj is None:
            return self.norm2(branch)
        time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = time.chunk(2, dim=1)
            return self.norm2(branch) * (1 + scale) + shift
        return self.norm2(branch + time)


class Samples(NamedTuple):
    """The layout of the samples in a branch that does not have them in its first dimension."""

    dim: int  # its dimension that holds them, alone or folded with windows, frames or tokens
    contiguous: bool  # whether the rows of a sample follow each other; else the samples take turns
    argument: str  # of the model, by name and by place: the input that tells the number of samples
    place: int
    input_dim: int  # the dimension of this input that holds the samples


class Branch(NamedTuple):
    """A residual branch that is gated."""

    name: str  # of its block
    end: str  # of the submodule whose output it is
    width: int  # number of channels of that
    level: str  # of the part of the network that it belongs to
    channel_dim: int = 1  # the dimension that holds the channels
    element: int | None = None  # its number where the submodule puts out several tensors
    samples: Samples | None = None  # where they are, if not in the first dimension


def resnet_branches(model: nn.Module, levels: Sequence[str]) -> list[Branch]:
    """Return the branches of diffusers' residual blocks below these submodules of a model, in order of execution."""
    return [
        Branch(f"{level}.{name}", f"{level}.{name}.conv2", block.conv2.out_channels, level)
        for level in levels
        for name, block in model.get_submodule(level).named_modules()
        if isinstance(block, ResnetBlock2D | ResnetBlockCondNorm2D)
    ]


def fuse_resnets(model: nn.Module) -> None:
    """Give diffusers' residual blocks in a model the form that is gated in one pass; weights and names stay."""
    for module in model.modules():
        if type(module) is ResnetBlock2D:
            module.__class__ = FusedResnetBlock2D


def hook_end(block: nn.Module, name: str, gate: Gate) -> RemovableHandle:
    """Put a gate behind the submodule of this name."""
    return block.get_submodule(name).register_forward_hook(gate.hook)


def gate_branches(
    model: nn.Module,
    branches: Sequence[Branch],
    make_gate: Callable[[GatedBlocks, int], Gate] = Gate,
    hook_end: Callable[[nn.Module, str, Gate], Any] = hook_end,
) -> tuple[GatedBlocks, list[Any]]:
    """Put gates on the branches of a model. Outside of a `ForwardPass` of the returned blocks they do nothing.

    Args:
        model (`nn.Module`), branches (`Sequence[Branch]`): The model, and its branches in order of execution.
        make_gate, hook_end (`Callable`, *optional*): Other gates, and another way to put them behind a submodule.

    Returns:
        The blocks, and what removes the hooks again.
    """
    blocks, handles = GatedBlocks(tuple(branch.name for branch in branches)), []
    for position, branch in enumerate(branches):
        parent, _, name = branch.end.rpartition(".")
        gate, block = make_gate(blocks, position), model.get_submodule(parent)
        if isinstance(block, FusedResnetBlock2D) and name == "conv2":
            block.gate = gate
        else:
            handles.append(hook_end(block, name, gate))
    return blocks, handles
