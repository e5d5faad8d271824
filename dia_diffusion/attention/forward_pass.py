"""One forward pass of a model, in which its gated blocks find the shared attention and its state.

A block does not hold the attention: it looks up the current forward pass of its thread and tells it its position. So
nothing is kept between forward passes, threads do not disturb each other, and a block that is called outside of a
forward pass of its model is a plain block.

The file reads from top to bottom: the pass, recording of gates, hooks, checkpointing.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UsageError
from .modules import in_backward_pass
from .sharing import AttentionState, SharedAttention

# The only global: the current forward pass and recording. torch.compile and torch.export trace it.
_thread = threading.local()
# Set here, so that the first forward pass changes nothing in the main thread: torch.compile would compile again.
_thread.current = _thread.recording = None


class GatedBlocks:
    """The gated blocks of one model, in order of execution; by this object they find its forward passes.

    Args:
        names (tuple of `str`): Names of the blocks.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        _prepare_compiler(len(names))


def _prepare_compiler(number: int) -> None:
    """Set options of torch.compile that a model with this number of gated blocks needs, for the whole process."""
    config = torch._dynamo.config
    # Without guards on hooks, a plain and an attached model of one class run the code that was compiled first.
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()
    # Blocks that are compiled one by one are compiled again for each position.
    config.recompile_limit = max(config.recompile_limit, number + 8)
    # Checkpointed code enters a forward pass: a side effect, which need not happen again in the backward pass.
    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


class ForwardPass:
    """One forward pass of one model: a context in which its gated blocks get their gates.

    Args:
        blocks (`GatedBlocks`): The blocks that take part.
        attention (`SharedAttention`): The attention that computes their gates.
        state (`AttentionState`, *optional*): The state for the first block; by default that of the start.
        maps (`dict[int, Tensor]`, *optional*):
            Filled with the channel gates by position; by default where `record_maps` asks for them.
        samples (`int`, *optional*): The number of samples, where rows of a branch are not samples.

    Attributes:
        state (`AttentionState`): The state for the next block.
    """

    def __init__(
        self,
        blocks: GatedBlocks,
        attention: SharedAttention,
        state: AttentionState | None = None,
        maps: dict[int, Tensor] | None = None,
        samples: int | None = None,
    ):
        self.blocks = blocks
        self.samples = samples
        self.attention = attention
        self.state = AttentionState() if state is None else state
        self.recording = _recording(blocks) if state is None else None
        self.maps = maps if self.recording is None else {}

    def __enter__(self) -> "ForwardPass":
        # It may begin in the middle of another, of this model or of one around it.
        self._outer = getattr(_thread, "current", None)
        _thread.current = self
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.current = self._outer
        if self.recording is not None and self.maps is not None:
            self.recording.clear()
            self.recording.update((self.blocks.names[position], gate) for position, gate in sorted(self.maps.items()))

    def gate(self, branch: Tensor, position: int) -> Tensor:
        """Return the gate of the block at this position, and keep the state for the next."""
        gate, self.state = self.attention(branch, self.state._replace(position=position), self.maps)
        # The attention may live on another device than the block.
        return gate if gate.device == branch.device else gate.to(branch.device)


def current_pass(blocks: GatedBlocks) -> ForwardPass | None:
    """Return the current forward pass of this thread, if it is one of the model that these blocks belong to."""
    current = getattr(_thread, "current", None)
    return current if current is not None and current.blocks is blocks else None


# ---- recording


@contextmanager
def record_maps(blocks: GatedBlocks) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that holds, after each forward pass of the model in this thread, the channel gates `(B, C)`
    of its blocks by name, in order of execution."""
    before = getattr(_thread, "recording", None)
    maps: dict[str, Tensor] = {}
    _thread.recording = (blocks, maps)
    try:
        yield maps
    finally:
        _thread.recording = before


def _recording(blocks: GatedBlocks) -> dict[str, Tensor] | None:
    recording = getattr(_thread, "recording", None)
    return recording[1] if recording is not None and recording[0] is blocks else None


# ---- hooks


class ContextHook:
    """A hook that takes the context of a forward pass from an argument of a module.

    Args:
        blocks (`GatedBlocks`): The model's blocks.
        name (`str`, *optional*), index (`int`): The argument, by name and by position.
    """

    def __init__(self, blocks: GatedBlocks, name: str | None, index: int):
        self.blocks, self.name, self.index = blocks, name, index

    def of_arguments(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.take(kwargs[self.name] if self.name in kwargs else args[self.index])

    def take(self, context: Tensor) -> None:
        current = current_pass(self.blocks)
        if current is not None:
            current.state = AttentionState(context=context)


class Gate:
    """The gate of one block.

    Args:
        blocks (`GatedBlocks`): The model's blocks.
        position (`int`): The index of this one among them.
    """

    def __init__(self, blocks: GatedBlocks, position: int):
        self.blocks = blocks
        self.position = position

    def __call__(self, branch: Tensor) -> Tensor | None:
        """Return the factor of the residual branch, or `None` outside of a forward pass."""
        current = current_pass(self.blocks)
        if current is not None:
            return current.gate(branch, self.position)
        if in_backward_pass():
            raise UsageError(
                f"the model calls torch.utils.checkpoint itself, which recomputes '{self.blocks.names[self.position]}' "
                "without the attention's state: gradients would be wrong. Turn that off (timm: "
                "set_grad_checkpointing(False)); gradient checkpointing of diffusers and transformers works."
            )
        if not torch.compiler.is_compiling():
            # The same words for all blocks of a model: Python shows them once.
            warnings.warn(
                f"branches such as '{self.blocks.names[0]}' ran without their attention, because they were called "
                "outside of their model: call the model itself, not its forward, another method or a part of it.",
                stacklevel=2,
            )
        return None

    def hook(self, module: nn.Module, args: tuple, branch: Tensor) -> Tensor:
        """Gate the output of the module at the end of the branch: a forward hook."""
        gate = self(branch)
        return branch if gate is None else branch * gate


# ---- checkpointing


class CarryState:
    """A checkpointing function, as diffusers and transformers call it, that carries the state of the forward pass.

    The state is passed in and returned as tensors, so that gradients flow through it and the recomputation sees the
    same state.

    Args:
        blocks (`GatedBlocks`): The blocks of the model.
        checkpoint (`Callable`): The library's checkpointing function, called with a module and its arguments.
    """

    def __init__(self, blocks: GatedBlocks, checkpoint: Callable):
        self.blocks = blocks
        self.checkpoint = checkpoint

    def __call__(self, module: Callable, *args: Any) -> Any:
        current = current_pass(self.blocks)
        if current is None:
            return self.checkpoint(module, *args)
        part = _CheckpointedPart(current, module)
        output, *values = self.checkpoint(part, *part.values, *args)
        current.state, maps = pytree.tree_unflatten(values, part.form_after)
        if current.maps is not None:
            current.maps.update(maps)
        return output


class _CheckpointedPart:
    """A module with a forward pass of its own, as a function of the state's tensors and the module's arguments."""

    def __init__(self, current: ForwardPass, module: Callable):
        self.blocks, self.attention, self.module = current.blocks, current.attention, module
        self.record, self.samples = current.maps is not None, current.samples
        self.values, self.form = pytree.tree_flatten(current.state)
        self.form_after = self.form

    def __call__(self, *values: Any) -> tuple:
        number = self.form.num_leaves
        state = pytree.tree_unflatten(values[:number], self.form)
        with ForwardPass(self.blocks, self.attention, state, {} if self.record else None, self.samples) as current:
            output = self.module(*values[number:])
        values_after, self.form_after = pytree.tree_flatten((current.state, current.maps))
        return output, *values_after
