"""Gradient checkpointing of blocks in a run: what is computed again sees the state that it saw the first time."""

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

from .run import Chain, Run, run_under_way


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
