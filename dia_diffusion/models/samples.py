"""Samples in the inputs of a model and in its branches, which may hold windows, frames or tokens in the batch, or time
in the first dimension.

A gate belongs to one sample and is pooled over all that belongs to it. Whose a row is, is no guess: the model runs
again with all samples but the first one changed, and with all but the last one; the rows that stay are those of the
first and of the last. One of the two would not do: in a causal model the first token never changes with later ones.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UsageError
from .branches import Samples

# The share of a change in the others that may appear in a sample: activations may be quantized for all samples at once.
LEAK = 0.05


class MainInput(NamedTuple):
    """The input of a forward pass with the most dimensions, which tells the number of samples."""

    argument: str  # its name; "" where only its place is known
    place: int

    def tensor(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the tensor, from the arguments of a forward pass.

        Raises:
            UsageError: if the argument is not there or holds no tensor.
        """
        value = kwargs[self.argument] if self.argument in kwargs else args[self.place : self.place + 1]
        tensors = tensors_in(value)
        if not tensors:
            raise UsageError(f"the input '{self.argument or self.place}' must hold a tensor, to count the samples by.")
        most = max([tensor.ndim for tensor in tensors])
        return next(tensor for tensor in tensors if tensor.ndim == most)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an argument of a model: in nested containers, and in the attributes of an object."""
    tensors = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type):
            tensors += [part for part in tree_leaves(vars(leaf)) if isinstance(part, Tensor)]
    return [tensor for tensor in tensors if tensor.ndim]


class Place(NamedTuple):
    """The layout in which the samples of a branch were found."""

    samples: Samples | None  # None if they are the first dimension
    leak: float  # the largest change of the first or last sample, relative to that of the others


def separate(branch: Tensor, samples: Samples, number: int, channel_dim: int) -> Tensor:
    """Return a branch as `(B, ..., C)`, with a dimension for its samples alone.

    Raises:
        UsageError: if its rows cannot be divided among this number of samples.
    """
    rows = branch.shape[samples.dim]
    if rows % number:
        raise UsageError(f"{rows} rows in dimension {samples.dim} of a branch are not those of {number} samples.")
    sizes = (number, rows // number) if samples.contiguous else (rows // number, number)
    own, channels = samples.dim + (not samples.contiguous), channel_dim % branch.ndim
    return branch.unflatten(samples.dim, sizes).movedim((own, channels + (channels > samples.dim)), (0, -1))


def rejoin(gate: Tensor, branch: Tensor, samples: Samples, channel_dim: int) -> Tensor:
    """Return the gates `(B, 1, ..., C)` of the samples in the layout of a branch, to multiply it with."""
    own, channels = samples.dim + (not samples.contiguous), channel_dim % branch.ndim
    gate = gate.movedim((0, -1), (own, channels + (channels > samples.dim)))
    sizes = [-1] * gate.ndim
    folded = samples.dim + samples.contiguous
    sizes[folded] = branch.shape[samples.dim] // gate.shape[own]
    return gate.expand(sizes).flatten(samples.dim, samples.dim + 1)


def count_samples(samples: Samples, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return the number of samples in the inputs of a forward pass."""
    return MainInput(samples.argument, samples.place).tensor(args, kwargs).shape[samples.input_dim]


def find_places(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    main: MainInput,
    dim: int,
    branches: Sequence[tuple[str, int | None, int]],
) -> list[Place | None] | None:
    """Find the samples of branches by running the model again, with the first and with the last sample alone the same.

    Args:
        model (`nn.Module`), args, kwargs: The model and its inputs.
        main (`MainInput`), dim (`int`): The input that tells the number of samples, and the dimension that holds them.
        branches: For each branch its module, its number among the outputs of that, and the dimension of its channels.

    Returns:
        For each branch its place, or `None` if its values do not depend on the sample. `None` for all if the inputs
        cannot tell: one sample, equal samples, no values (`meta`), or a model that does not run on the changed ones.
    """
    number = main.tensor(args, kwargs).shape[dim]
    tensors = [value for value in tree_leaves((tuple(args), dict(kwargs))) if isinstance(value, Tensor)]
    if number < 2 or any(type(value) is not Tensor or value.is_meta for value in (*tensors, *model.buffers())):
        return None
    inputs: list[Any] = [
        tree_map(partial(_changed, dim=dim, number=number, kept=kept), (tuple(args), dict(kwargs)))
        for kept in (0, number - 1)
    ]
    if all(map(torch.equal, tensors, (value for value in tree_leaves(inputs[0]) if isinstance(value, Tensor)))):
        return None
    # Layers that start at zero would hide what is before them.
    with torch.random.fork_rng():
        zero = {name: torch.randn_like(p) / 10 for name, p in _plain_parameters(model) if not p.any()}
    try:
        before = _outputs(model, zero, tuple(args), dict(kwargs), branches)
        after = [_outputs(model, zero, args_, kwargs_, branches) for args_, kwargs_ in inputs]
    except Exception:  # whatever a model raises for inputs that are not those that it was given
        return None
    return [
        _place(was, pair, number, channel_dim, (*main, dim))
        for was, *pair, (_, _, channel_dim) in zip(before, *after, branches, strict=True)
    ]


def _plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta:
            yield name, parameter


def _changed(value: Any, dim: int, number: int, kept: int) -> Any:
    """Return an input with one of its samples in place of all others."""
    if not isinstance(value, Tensor):
        return value
    # In sequences that begin with time, a mask or a timestep may still begin with the batch.
    where = next((d for d in (dim, 0) if value.ndim > d and value.shape[d] == number), None)
    if where is None:
        return value
    return torch.cat([value.narrow(where, kept, 1)] * number, where)


def _outputs(
    model: nn.Module, weights: dict[str, Tensor], args: tuple, kwargs: dict[str, Any], branches: Sequence[tuple]
) -> list[Tensor]:
    """Return copies of the outputs of some modules in one forward pass."""
    values: dict[tuple[str, int | None], Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        for name, element, _ in branches:

            def keep(module: nn.Module, given: Any, output: Any, key: tuple = (name, element)) -> None:
                values[key] = tree_leaves(output)[key[1] or 0].detach().clone()

            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        torch.func.functional_call(model, weights, args, kwargs)
    return [values[name, element] for name, element, _ in branches]


def _place(
    before: Tensor, after: Sequence[Tensor], number: int, channel_dim: int, given: tuple[str, int, int]
) -> Place | None:
    """Return the layout in which the first sample changes least where it was kept, and the last one where it was."""
    if any(before.shape != now.shape for now in after):
        # Rows that were routed by their values.
        return Place(None, math.inf)
    first, last = [(now - before).abs().float() for now in after]
    if not first.isfinite().all() or not last.isfinite().all() or not first.any():
        return None
    places = []
    for dim in range(before.ndim):
        if dim == channel_dim % before.ndim or before.shape[dim] % number:
            continue
        for contiguous in (True, False)[: 1 + (before.shape[dim] > number)]:
            samples = Samples(dim, contiguous, *given)
            parts, parts_of_last = (separate(change, samples, number, channel_dim) for change in (first, last))
            leaks = parts[0].max() / parts[1:].max(), parts_of_last[-1].max() / parts_of_last[:-1].max()
            plain = dim == 0 and before.shape[0] == number
            places.append(Place(None if plain else samples, max(float(leak.nan_to_num(math.inf)) for leak in leaks)))
    possible = [place for place in places if place.leak <= LEAK]
    return min(places, key=lambda place: place.leak, default=Place(None, math.inf)) if len(possible) < 2 else None


def main_input(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> MainInput:
    """Return the place of the main input among the arguments of a forward pass.

    Raises:
        UsageError: if there is none.
    """
    names = [*inspect.signature(model.forward).parameters]
    given = [(MainInput(name, place), args[place]) for place, name in enumerate(names_of(model, args))]
    given += [(MainInput(key, names.index(key) if key in names else len(names)), kwargs[key]) for key in kwargs]
    sizes = [max((tensor.ndim for tensor in tensors_in(value)), default=0) for _, value in given]
    if not any(sizes):
        raise UsageError("the inputs hold no tensor: give what the model's forward pass takes.")
    return given[sizes.index(max(sizes))][0]


def names_of(module: nn.Module, args: Sequence[Any]) -> list[str]:
    """Return the names of the arguments that are given by place; "" for those of `*args`."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [*names, *[""] * len(args)][: len(args)]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode in this context, without gradients and uncompiled, and leave it as it was."""
    # Compiled code would hide what it calls.
    with torch.compiler.set_stance("force_eager"), _restored(model), torch.no_grad():
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards restore all that belongs to it, and the random state."""
    scripted = [(part, part.training) for part in model.modules() if isinstance(part, torch.jit.ScriptModule)]
    attributes = [(part, dict(vars(part))) for part in model.modules() if not isinstance(part, torch.jit.ScriptModule)]
    registries = [
        (registry, dict(registry))
        for _, own in attributes
        for registry in (own["_parameters"], own["_buffers"], own["_modules"])
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            model.eval()
            yield
        finally:
            for current, saved in [*((vars(module), own) for module, own in attributes), *registries]:
                current.clear()
                current.update(saved)
            for part, training in scripted:
                part.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    if buffer.device.type != "meta" and not torch.equal(buffer, value):
                        buffer.copy_(value)
