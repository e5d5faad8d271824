"""Residual branches of a backbone: where they end, and gates there."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..attention.hooks import Gate
from ..attention.run import Chain
from .resnet import FusedResnetBlock2D


class Branch(NamedTuple):
    """A residual branch that is gated."""

    name: str  # of its block
    end: str  # of the submodule whose output it is
    width: int  # number of channels of that
    level: str  # of the part of the network that it belongs to


def resnet_branches(model: nn.Module, levels: Sequence[str]) -> list[Branch]:
    """The branches of diffusers' residual blocks below these submodules of a model, in order of execution."""
    return [
        Branch(f"{level}.{name}", f"{level}.{name}.conv2", block.conv2.out_channels, level)
        for level in levels
        for name, block in model.get_submodule(level).named_modules()
        if isinstance(block, ResnetBlock2D | ResnetBlockCondNorm2D)
    ]


def fuse_resnets(model: nn.Module) -> None:
    """Gives diffusers' residual blocks in a model the form that is gated in one pass; weights and names stay."""
    for module in model.modules():
        if type(module) is ResnetBlock2D:
            module.__class__ = FusedResnetBlock2D


def hook_end(block: nn.Module, name: str, gate: Gate) -> RemovableHandle:
    """Puts a gate behind the submodule of this name."""
    return block.get_submodule(name).register_forward_hook(gate.hook)


def gate_branches(
    model: nn.Module,
    branches: Sequence[Branch],
    make_gate: Callable[[Chain, int], Gate] = Gate,
    hook_end: Callable[[nn.Module, str, Gate], Any] = hook_end,
) -> tuple[Chain, list[Any]]:
    """Puts gates on the branches of a model. They are open outside of a `Run` of the chain that is returned.

    Args:
        model (`nn.Module`), branches (`Sequence[Branch]`): The model, and its branches in order of execution.
        make_gate, hook_end (`Callable`, *optional*): Other gates, and another way to put them behind a submodule.

    Returns:
        The chain, and what removes the hooks again.
    """
    chain, handles = Chain(tuple(branch.name for branch in branches)), []
    for position, branch in enumerate(branches):
        parent, _, name = branch.end.rpartition(".")
        gate, block = make_gate(chain, position), model.get_submodule(parent)
        if isinstance(block, FusedResnetBlock2D) and name == "conv2":
            block.gate = gate
        else:
            handles.append(hook_end(block, name, gate))
    return chain, handles
