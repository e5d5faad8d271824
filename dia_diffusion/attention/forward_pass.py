"""The run: one forward pass of one model, in which its blocks ask for their gates.

A block does not hold the attention: it finds the run that is under way in its thread and tells it its position. So
nothing is kept between forward passes, several threads do not meet, and a block that is called outside of a run, or
inside of another model's, is a plain block.


Hooks on the modules of a network: where the context passes, and where residual branches end.

Gradient checkpointing of blocks in a run: what is computed again sees the state that it saw the first time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .sharing import AttentionState, SharedAttention

# The one global: the run under way, and the recording that was asked for. torch.compile and torch.export follow it.
_thread = threading.local()
# Set here, a run leaves the main thread as it found it, and torch.compile need not compile a second time.
_thread.run = _thread.recording = None


class Chain:
    """The gated blocks of one model, in order of execution; what ties them to the runs of that model alone.

    Args:
        names (tuple of `str`): Names of the blocks.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names


class Run:
    """One forward pass of one model: a context, in which the blocks of its chain find it.

    Args:
        chain (`Chain`): Whose blocks take part.
        attention (`SharedAttention`): What their gates come from.
        state (`AttentionState`, *optional*): What the first block gets; by default that of the start.

    Attributes:
        state (`AttentionState`): What the next block gets.
    """

    def __init__(self, chain: Chain, attention: SharedAttention, state: AttentionState | None = None):
        self.chain = chain
        self.attention = attention
        self.recorded = _recording(chain) if state is None else None
        self.state = AttentionState(maps=None if self.recorded is None else {}) if state is None else state

    def __enter__(self) -> "Run":
        # It may begin in the middle of another, of this model or of one around it.
        self._outer = getattr(_thread, "run", None)
        _thread.run = self
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.run = self._outer
        if self.recorded is not None:
            self.recorded.clear()
            for position, gate in sorted(self.state.maps.items()):
                self.recorded[self.chain.names[position]] = gate

    def gate(self, branch: Tensor, position: int) -> Tensor:
        """The gate of the block at this position; the state goes on."""
        gate, self.state = self.attention(branch, self.state._replace(position=position))
        # The attention may live on another device than the block.
        return gate if gate.device == branch.device else gate.to(branch.device)


def run_under_way(chain: Chain) -> Run | None:
    """The run in this thread, if it is one of the model that the chain belongs to."""
    run = getattr(_thread, "run", None)
    return run if run is not None and run.chain is chain else None


@contextmanager
def record_maps(chain: Chain) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that holds, after each forward pass of the model in this thread, the channel gates `(B, C)`
    of its blocks by name, in order of execution."""
    before, maps = getattr(_thread, "recording", None), {}
    _thread.recording = (chain, maps)
    try:
        yield maps
    finally:
        _thread.recording = before


def _recording(chain: Chain) -> dict[str, Tensor] | None:
    recording = getattr(_thread, "recording", None)
    return recording[1] if recording is not None and recording[0] is chain else None


class ContextHook:
    """Takes the context from which the run's memory starts, where it passes as an argument of a module.

    Args:
        chain (`Chain`): The model's blocks.
        name (`str`), index (`int`): The argument, as it may be given by name or by place.
    """

    def __init__(self, chain: Chain, name: str | None, index: int):
        self.chain, self.name, self.index = chain, name, index

    def of_arguments(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.take(kwargs[self.name] if self.name in kwargs else args[self.index])

    def take(self, context: Tensor) -> None:
        run = run_under_way(self.chain)
        if run is not None:
            run.state = run.state._replace(context=context)


class Gate:
    """The gate of one block.

    Args:
        chain (`Chain`): The model's blocks.
        position (`int`): The place of this one among them.
    """

    def __init__(self, chain: Chain, position: int):
        self.chain = chain
        self.position = position

    def __call__(self, branch: Tensor) -> Tensor | None:
        """What to multiply the residual branch with; `None` outside of a run."""
        run = run_under_way(self.chain)
        return None if run is None else run.gate(branch, self.position)

    def hook(self, module: nn.Module, args: tuple, branch: Tensor) -> Tensor:
        """Behind the module whose output is the residual branch."""
        gate = self(branch)
        return branch if gate is None else branch * gate


class CarryState:
    """A checkpointing function, as diffusers and transformers call it, that carries the state of the run.

    The state goes in and comes out as arguments and results of what is checkpointed, which makes a run of its own
    inside: so gradients flow through it, and the second time it is the same.

    Args:
        chain (`Chain`): The blocks of the model.
        checkpoint (`Callable`): What the library checkpoints with, called with a module and its arguments.
    """

    def __init__(self, chain: Chain, checkpoint: Callable):
        self.chain = chain
        self.checkpoint = checkpoint
        _allow_runs_in_compiled_checkpoints()

    def __call__(self, module: Callable, *args: Any) -> Any:
        run = run_under_way(self.chain)
        if run is None:
            return self.checkpoint(module, *args)
        values, form = pytree.tree_flatten(run.state)
        part = _PartOfRun(run, module, form, len(values))
        output, *values = self.checkpoint(part, *values, *args)
        run.state = pytree.tree_unflatten(values, part.form_after)
        return output


class _PartOfRun:
    """A module in a run of its own, as a function of the state, given as a flat list, and of its arguments."""

    def __init__(self, run: Run, module: Callable, form: pytree.TreeSpec, number: int):
        self.chain, self.attention = run.chain, run.attention
        self.module = module
        self.form, self.number = form, number
        self.form_after: pytree.TreeSpec | None = None

    def __call__(self, *values: Any) -> tuple:
        state = pytree.tree_unflatten(values[: self.number], self.form)
        # The second time it is called to compute gradients.
        state = state._replace(again=self.form_after is not None)
        with Run(self.chain, self.attention, state) as run:
            output = self.module(*values[self.number :])
        values, self.form_after = pytree.tree_flatten(run.state._replace(again=False))
        return output, *values


def _allow_runs_in_compiled_checkpoints() -> None:
    """torch.compile refuses checkpointed code that changes something outside of it, as beginning a run does, unless it
    is told that this need not happen again in the backward pass."""
    import torch._dynamo

    if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
