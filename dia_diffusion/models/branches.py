"""Residual branches of a backbone: where they end, and gates there."""

from collections.abc import Sequence
from typing import NamedTuple

from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn

from ..attention.hooks import ContextHook, Gate
from ..attention.run import Chain
from .resnet import FusedResnetBlock2D


class Branch(NamedTuple):
    """A residual branch that is gated.

    Attributes:
        name (`str`): Name of its block.
        end (`str`): Name of the submodule whose output it is.
        width (`int`): Number of channels of that.
        level (`str`): Name of the part of the network that it belongs to.
    """

    name: str
    end: str
    width: int
    level: str


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


def gate_branches(model: nn.Module, branches: Sequence[Branch], context: tuple[str, str, int] | None) -> Chain:
    """Puts gates on the branches of a model. They are open outside of a `Run` of the chain that is returned.

    Args:
        model (`nn.Module`): The model.
        branches (`Sequence[Branch]`): In order of execution.
        context (`tuple`, *optional*):
            Which argument of which submodule holds the context: name of the submodule, name of the argument and its
            number.
    """
    chain = Chain(tuple(branch.name for branch in branches))
    if context is not None:
        module, argument, index = context
        hook = ContextHook(chain, argument, index)
        model.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
    for position, branch in enumerate(branches):
        gate, block = Gate(chain, position), model.get_submodule(branch.end.rpartition(".")[0])
        if isinstance(block, FusedResnetBlock2D):
            block.gate = gate
        else:
            model.get_submodule(branch.end).register_forward_hook(gate.hook)
    return chain
