"""One forward pass of a model, in which its gated blocks find the shared attention and its state.

A block does not hold the attention: it looks up the current forward pass of its thread and tells it its position. So
nothing is kept between forward passes, threads do not disturb each other, and a block that is called outside of a
forward pass of its model is a plain block.

The file reads from top to bottom: the pass, recording of gates, hooks, checkpointing.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .sharing import AttentionState, SharedAttention

# The only global: the current forward pass and recording. torch.compile and torch.export trace it.
_thread = threading.local()
# Set here, so that the first forward pass changes nothing in the main thread: torch.compile would compile again.
_thread.current = _thread.recording = None


class GatedBlocks:
    """The gated blocks of one model, in order of execution; the identity by which they find its forward passes.

    Args:
        names (tuple of `str`): Names of the blocks.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names


class ForwardPass:
    """One forward pass of one model: a context, in which the gated blocks find it.

    Args:
        blocks (`GatedBlocks`): Whose blocks take part.
        attention (`SharedAttention`): What their gates come from.
        state (`AttentionState`, *optional*): What the first block gets; by default that of the start.

    Attributes:
        state (`AttentionState`): What the next block gets.
    """

    def __init__(self, blocks: GatedBlocks, attention: SharedAttention, state: AttentionState | None = None):
        self.blocks = blocks
        self.attention = attention
        self.recorded = _recording(blocks) if state is None else None
        self.state = AttentionState(maps=None if self.recorded is None else {}) if state is None else state

    def __enter__(self) -> "ForwardPass":
        # It may begin in the middle of another, of this model or of one around it.
        self._outer = getattr(_thread, "current", None)
        _thread.current = self
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.current = self._outer
        if self.recorded is not None:
            self.recorded.clear()
            for position, gate in sorted(self.state.maps.items()):
                self.recorded[self.blocks.names[position]] = gate

    def gate(self, branch: Tensor, position: int) -> Tensor:
        """The gate of the block at this position; the state goes on."""
        gate, self.state = self.attention(branch, self.state._replace(position=position))
        # The attention may live on another device than the block.
        return gate if gate.device == branch.device else gate.to(branch.device)


def current_pass(blocks: GatedBlocks) -> ForwardPass | None:
    """the forward pass in this thread, if it is one of the model that the blocks belong to."""
    current = getattr(_thread, "current", None)
    return current if current is not None and current.blocks is blocks else None


@contextmanager
def record_maps(blocks: GatedBlocks) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that holds, after each forward pass of the model in this thread, the channel gates `(B, C)`
    of its blocks by name, in order of execution."""
    before, maps = getattr(_thread, "recording", None), {}
    _thread.recording = (blocks, maps)
    try:
        yield maps
    finally:
        _thread.recording = before


def _recording(blocks: GatedBlocks) -> dict[str, Tensor] | None:
    recording = getattr(_thread, "recording", None)
    return recording[1] if recording is not None and recording[0] is blocks else None


class ContextHook:
    """Takes the context from which the memory starts, where it passes as an argument of a module.

    Args:
        blocks (`GatedBlocks`): The model's blocks.
        name (`str`), index (`int`): The argument, as it may be given by name or by place.
    """

    def __init__(self, blocks: GatedBlocks, name: str | None, index: int):
        self.blocks, self.name, self.index = blocks, name, index

    def of_arguments(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.take(kwargs[self.name] if self.name in kwargs else args[self.index])

    def take(self, context: Tensor) -> None:
        current = current_pass(self.blocks)
        if current is not None:
            current.state = current.state._replace(context=context)


class Gate:
    """The gate of one block.

    Args:
        blocks (`GatedBlocks`): The model's blocks.
        position (`int`): The place of this one among them.
    """

    def __init__(self, blocks: GatedBlocks, position: int):
        self.blocks = blocks
        self.position = position

    def __call__(self, branch: Tensor) -> Tensor | None:
        """What to multiply the residual branch with; `None` outside of a forward pass."""
        current = current_pass(self.blocks)
        return None if current is None else current.gate(branch, self.position)

    def hook(self, module: nn.Module, args: tuple, branch: Tensor) -> Tensor:
        """Behind the module whose output is the residual branch."""
        gate = self(branch)
        return branch if gate is None else branch * gate


class CarryState:
    """A checkpointing function, as diffusers and transformers call it, that carries the state of the forward pass.

    The state is passed in and returned as tensors, so that gradients flow through it and the recomputation sees the
    same state.

    Args:
        blocks (`GatedBlocks`): The blocks of the model.
        checkpoint (`Callable`): What the library checkpoints with, called with a module and its arguments.
    """

    def __init__(self, blocks: GatedBlocks, checkpoint: Callable):
        self.blocks = blocks
        self.checkpoint = checkpoint
        _allow_passes_in_compiled_checkpoints()

    def __call__(self, module: Callable, *args: Any) -> Any:
        current = current_pass(self.blocks)
        if current is None:
            return self.checkpoint(module, *args)
        values, form = pytree.tree_flatten(current.state)
        part = _PartOfPass(current, module, form, len(values))
        output, *values = self.checkpoint(part, *values, *args)
        current.state = pytree.tree_unflatten(values, part.form_after)
        return output


class _PartOfPass:
    """A module in a forward pass of its own, as a function of the state, given as a flat list, and of its arguments."""

    def __init__(self, current: ForwardPass, module: Callable, form: pytree.TreeSpec, number: int):
        self.blocks, self.attention = current.blocks, current.attention
        self.module = module
        self.form, self.number = form, number
        self.form_after: pytree.TreeSpec | None = None

    def __call__(self, *values: Any) -> tuple:
        state = pytree.tree_unflatten(values[: self.number], self.form)
        # The second time it is called to compute gradients.
        state = state._replace(again=self.form_after is not None)
        with ForwardPass(self.blocks, self.attention, state) as current:
            output = self.module(*values[self.number :])
        values, self.form_after = pytree.tree_flatten(current.state._replace(again=False))
        return output, *values


def _allow_passes_in_compiled_checkpoints() -> None:
    """Let torch.compile trace checkpointed code that enters a forward pass: a side effect that it otherwise refuses,
    and that need not happen again in the backward pass."""
    import torch._dynamo

    if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
