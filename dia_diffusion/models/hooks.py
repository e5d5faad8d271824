"""The hooks that `attach` gives to a model: gates behind its modules, and a `ForwardPass` around each of its calls."""

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attention.forward_pass import CarryState, ContextHook, ForwardPass, Gate, GatedBlocks, current_pass
from ..errors import UsageError
from .branches import Branch, FusedResnetBlock2D, fuse_resnets, gate_branches
from .families import FOUND, NAMED, Backbone
from .samples import count_samples, rejoin, separate

# The submodule of a model that is its attention.
NAME = "dia"


class OutputHook(ContextHook):
    """A hook that takes the context from the output of a module, or from an element of it."""

    def of_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.take(output if self.index is None else pytree.tree_leaves(output)[self.index])


class EndHook:
    """A gate behind the submodule of a name. The module may be replaced later: adapters wrap layers, and a detector
    replaces the norms of its backbone.

    Args:
        parent (`nn.Module`), name (`str`): Where the submodule is.
        gate (`Gate`): Its gate.
    """

    def __init__(self, parent: nn.Module, name: str, gate: Gate):
        self.parent, self.name, self.gate = parent, name, gate
        self._place()

    def _place(self) -> None:
        self.module = self.parent._modules[self.name]
        # Quantization copies the hooks of the module that it replaces.
        for key, hook in list(self.module._forward_hooks.items()):
            if getattr(hook, "__self__", None) is self.gate:
                del self.module._forward_hooks[key]
        self.handle = self.module.register_forward_hook(self.gate.hook)

    def follow(self) -> None:
        """Move the gate to the module that has the name now."""
        if self.parent._modules[self.name] is not self.module:
            self.handle.remove()
            self._place()

    def remove(self) -> None:
        self.handle.remove()


class CheckedGate(Gate):
    """A gate on a branch that a caller has named or a forward pass has shown.

    Args:
        blocks (`GatedBlocks`), position (`int`): See `Gate`.
        branch (`Branch`): The branch.

    Raises:
        UsageError: in a forward pass in which the branch runs twice or out of order or has another shape.
    """

    def __init__(self, blocks: GatedBlocks, position: int, branch: Branch):
        super().__init__(blocks, position)
        self.branch = branch

    def __call__(self, branch: Tensor) -> Tensor | None:
        current, samples, dim = current_pass(self.blocks), self.branch.samples, self.branch.channel_dim
        if current is not None:
            self._check(branch, current)
        if current is None or samples is None:
            return super().__call__(branch)
        gate = super().__call__(separate(branch, samples, current.samples, dim))
        return rejoin(gate, branch, samples, dim)

    def hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.branch.element is None:
            return super().hook(module, args, output)
        values, form = pytree.tree_flatten(output)
        values[self.branch.element] = super().hook(module, args, values[self.branch.element])
        return pytree.tree_unflatten(values, form)

    def _check(self, branch: Tensor, current: ForwardPass) -> None:
        state, name = current.state, self.blocks.names[self.position]
        first, before = state.first, state.position - 1
        # The first one runs again where the model calls its backbone a second time.
        again = self.position == first and (before > first or len(self.blocks.names) == 1)
        if self.position <= before and not again:
            raise UsageError(f"the branch '{name}' ran after '{self.blocks.names[before]}': list branches in order.")
        width, dim = self.branch.width, self.branch.channel_dim
        if not isinstance(branch, Tensor) or branch.ndim < 2 or branch.shape[dim] != width:
            found = tuple(branch.shape) if isinstance(branch, Tensor) else type(branch).__name__
            raise UsageError(f"the branch '{name}' should have {width} channels in dimension {dim}, but is {found}.")


class ModelHooks:
    """All that `attach` changes in a model, and `detach` takes back.

    Args:
        model (`nn.Module`), backbone (`Backbone`): The model, and what is gated in it.
        with_context (`bool`): Whether its forward passes start from the context.
    """

    def __init__(self, model: nn.Module, backbone: Backbone, with_context: bool):
        fuse_resnets(model)
        # Those who list branches by hand may list too many; a model that skips layers in training leaves out some.
        self.complete = backbone.family == NAMED

        def make_gate(blocks: GatedBlocks, position: int) -> Gate:
            return CheckedGate(blocks, position, backbone.branches[position])

        checked = backbone.family in (FOUND, NAMED)
        self.blocks, self.handles = gate_branches(model, backbone.branches, make_gate if checked else Gate, EndHook)
        if with_context and (place := backbone.context) is not None:
            module, hook = model.get_submodule(place.module), OutputHook(self.blocks, place.argument, place.element)
            if place.argument is None:
                self.handles.append(module.register_forward_hook(hook.of_output))
            else:
                self.handles.append(module.register_forward_pre_hook(hook.of_arguments, with_kwargs=True))
        self.ends = [handle for handle in self.handles if isinstance(handle, EndHook)]
        self.folded = next((branch.samples for branch in backbone.branches if branch.samples is not None), None)
        self.gated = {model.get_submodule(branch.end.rpartition(".")[0]) for branch in backbone.branches}
        self.checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self.handles += [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for end in self.ends:
            end.follow()
        for module in self.checkpointed:
            # Looked at each time, since it can be switched on later.
            if module.gradient_checkpointing and not isinstance(module._gradient_checkpointing_func, CarryState):
                module._gradient_checkpointing_func = CarryState(self.blocks, module._gradient_checkpointing_func)
        samples = None if self.folded is None else count_samples(self.folded, args, kwargs)
        ForwardPass(self.blocks, getattr(model, NAME), samples=samples).__enter__()

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        current = current_pass(self.blocks)
        if current is None:
            return
        current.__exit__()
        # Blocks may be skipped, by a cache for example; those that are no part of the model any more are a mistake.
        if current.state.first is None and output is not None and not self.gated <= set(model.modules()):
            raise UsageError(
                f"no branch of {type(model).__name__} with attention ran: its blocks were replaced after attach. Call "
                "detach, then attach again."
            )
        left_out = self.blocks.names[current.state.position :]
        if self.complete and current.state.first is not None and left_out and output is not None:
            raise UsageError(f"the branch '{left_out[0]}' did not run in this forward pass: leave it out of branches.")

    def remove(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.checkpointed:
            if isinstance(getattr(module, "_gradient_checkpointing_func", None), CarryState):
                module._gradient_checkpointing_func = module._gradient_checkpointing_func.checkpoint
        for module in model.modules():
            if isinstance(module, FusedResnetBlock2D):
                module.__class__ = ResnetBlock2D
                module.__dict__.pop("gate", None)


def hooks_of(model: nn.Module) -> ModelHooks | None:
    """Return the hooks that `attach` added to this model, or None."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ModelHooks)), None)


def has_gates(model: nn.Module) -> bool:
    """Return whether a branch of this model has a gate already, from its own attention or an outer model's."""
    return any(
        isinstance(owner, Gate)
        for module in model.modules()
        for owner in (
            getattr(module, "gate", None),
            *(getattr(hook, "__self__", None) for hook in module._forward_hooks.values()),
        )
    )
