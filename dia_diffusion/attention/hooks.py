"""Hooks on the modules of a network: where the context passes, and where residual branches end."""

from typing import Any

from torch import Tensor, nn

from .run import Chain, run_under_way


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
