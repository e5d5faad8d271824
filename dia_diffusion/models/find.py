"""Find the residual branches of any model by watching one forward pass.

A residual block shows itself: two tensors of one shape are added, and one of them came through more layers than the
other. That one is the branch F(x) of x + F(x) (arXiv 2210.16101, eq. 1); the other is the shortcut, with no layer or
with one, a projection. From the addition the search walks back to the module that put out the branch.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

from torch import nn

from ..errors import UsageError
from .additions import ResidualAdditions
from .branches import Branch
from .channels import TRANSPARENT, channel_dim
from .families import ContextPlace, with_levels
from .samples import LEAK, Place, find_places
from .watch import Addition, Output, Step, watch_forward

_DIFFERENT = "give inputs of at least two samples that differ, to show whose the rows are"


class FoundBranches(Sequence[Branch]):
    """The residual branches that one forward pass of a model has shown, in order of execution.

    Args:
        model (`str`): The class of the model.
        branches (`Sequence[Branch]`): What can be gated.
        not_gated (`Sequence[str]`): For each residual addition that cannot be gated, a line that says why.
        context (`ContextPlace`, *optional*): Where an embedding `(B, E)` passes that all blocks are given.
        embeddings (`dict[str, ContextPlace]`): All that `context` of `attach` may name.
    """

    def __init__(
        self,
        model: str,
        branches: Sequence[Branch],
        not_gated: Sequence[str],
        context: ContextPlace | None,
        embeddings: Mapping[str, ContextPlace],
    ):
        self.model, self.branches, self.not_gated = model, list(branches), list(not_gated)
        self.context, self.embeddings = context, dict(embeddings)

    def without(self, pattern: str) -> "FoundBranches":
        """Return the branches whose name does not contain a match of a regular expression."""
        kept = [branch for branch in self.branches if not re.search(pattern, branch.name)]
        return FoundBranches(self.model, kept, self.not_gated, self.context, self.embeddings)

    def __len__(self) -> int:
        return len(self.branches)

    @overload
    def __getitem__(self, index: int) -> Branch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Branch]: ...
    def __getitem__(self, index: int | slice) -> Branch | list[Branch]:
        return self.branches[index]

    def __repr__(self) -> str:
        lines = [f"{len(self)} residual branches of {self.model}:"]
        width = max((len(branch.name) for branch in self), default=0)
        for branch in self:
            place = f"{branch.width} channels in dimension {branch.channel_dim}"
            place += "" if branch.samples is None else f", samples in dimension {branch.samples.dim}"
            lines.append(f"  {branch.name:{width}}  {place}, level {branch.level}")
        if self.context is not None:
            lines.append(f"  Context: {self.context.describe()}, of width {self.context.size}.")
        return "\n".join([*lines, *(f"  not gated: {line}" for line in self.not_gated)])


def find_branches(model: nn.Module, *args: Any, **kwargs: Any) -> FoundBranches:
    """Run a model and return its residual branches.

    The model runs in evaluation mode and without gradients. Its modes, buffers and attributes and the random state are
    restored. A model on the `meta` device runs there, so that a large one costs nothing. All intermediate tensors of
    the pass are held in memory until it ends.

    Args:
        model (`nn.Module`): Any model whose forward pass calls functions and modules of torch from Python.
        args, kwargs:
            Inputs for its `forward`, best of at least two samples that differ: then three more passes show which rows
            belong to which sample. The batch is the first dimension of the largest input (by its number of
            dimensions), or the second one where that alone keeps the samples apart.

    Returns:
        [`FoundBranches`]: a sequence of `Branch` with `not_gated`, the additions that cannot be gated and why.
    """
    return _search(model, args, kwargs, _Search.find)


def find_named(model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> FoundBranches:
    """Run a model once and return the outputs of these modules as its branches, in the order of the names.

    Raises:
        UsageError: for a module that does not run once, or whose output shows no channels.
    """
    found = _search(model, args, kwargs, lambda search: search.named(names))
    if found.not_gated:
        raise UsageError(f"a branch of {type(model).__name__} cannot be gated: {found.not_gated[0]}.")
    return found


def _search(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], find: Callable[["_Search"], FoundBranches]
) -> FoundBranches:
    """Search with the samples in the first dimension of the inputs, and if they mix, in the second one."""
    search = _Search(model, args, kwargs, 0)
    found = find(search)
    if search.leak > LEAK and search.main.tensor(args, kwargs).ndim > 1:
        second = find(_Search(model, args, kwargs, 1))
        return second if len(second) > len(found) else found
    return found


class _Found(NamedTuple):
    """A branch, with the tensors from which its level and the context are derived."""

    branch: Branch
    order: int  # of the end of the call of its module
    addition: Addition
    shape: tuple[int, ...]  # of the output that is gated


class _Reason(Exception):
    """The reason why an addition cannot be gated."""


class _Search:
    """The search for branches in the notes of one forward pass.

    Args:
        model (`nn.Module`), args, kwargs: The model and its inputs.
        batch_dim (`int`): The dimension of the inputs that holds the samples.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch_dim: int):
        self.model, self.args, self.kwargs, self.batch_dim = model, args, kwargs, batch_dim
        self.watch, self.main = watch_forward(model, args, kwargs, batch_dim)
        self.batch, self.steps = self.watch.batch, self.watch.steps
        # The largest share of a change in other samples that a sample shows.
        self.leak = 0.0
        # Layers of torch that hold the samples in dimension 1.
        self.second = {
            name.rpartition(".")[0]
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first
            if self.watch.calls[name]
        }

    def find(self) -> FoundBranches:
        found, reasons = self._search(3)
        if not found and not reasons:
            # A network of vectors (B, C).
            found, reasons = self._search(2)
        return self._result(found, reasons)

    def named(self, names: Sequence[str]) -> FoundBranches:
        """Return the outputs of these modules as branches."""
        found = []
        for name in names:
            if self.watch.calls[name] != 1:
                raise UsageError(f"'{name}' runs {self.watch.calls[name]} times in a forward pass: a branch runs once.")
            number, output = next(
                (number, output)
                for number, outputs in self.watch.outputs.items()
                for output in outputs
                if output.module == name
            )
            try:
                found.append(self._end(number, [output], Addition((number,) * 2, number, (name.rpartition(".")[0],))))
            except _Reason as reason:
                raise UsageError(f"'{name}' cannot be gated: {reason}.") from reason
        return self._result(found, [])

    def _search(self, dimensions: int) -> tuple[list[_Found], list[tuple[Addition, str]]]:
        """Return the branches in order, and the additions that cannot be gated, of at least this many dimensions."""
        self.residual = ResidualAdditions(self.model, self.watch, dimensions)
        found: dict[tuple[str, int | None], _Found] = {}
        reasons = []
        for addition in self.watch.additions:
            try:
                branch = self.residual.branch_side(addition)
                for item in self._walk_back(branch, addition) if branch is not None else ():
                    found.setdefault((item.branch.end, item.branch.element), item)
            except _Reason as reason:
                reasons.append((addition, str(reason)))
        in_order = sorted(found.values(), key=lambda item: (item.order, item.branch.element or 0))
        # A sum inside of a module that puts out a branch is a part of that branch.
        ends = {item.branch.end for item in in_order}
        sums = [pair for pair in self.residual.sums.values() if not ends.intersection(pair[0].modules)]
        return in_order, [*reasons, *sums]

    def _result(self, found: Sequence[_Found], reasons: Sequence[tuple[Addition, str]]) -> FoundBranches:
        """Return the branches with their samples, levels and context."""
        ends = [(item.branch.end, item.branch.element, item.branch.channel_dim) for item in found]
        places = find_places(self.model, self.args, self.kwargs, self.main, self.batch_dim, ends)
        kept, not_gated = [], [*reasons]
        for item, place in zip(found, places or [None] * len(found), strict=True):
            self.leak = max(self.leak, place.leak if place is not None else 0.0)
            if (reason := self._refusal(item, place)) is not None:
                not_gated.append((item.addition, reason))
            else:
                kept.append(item._replace(branch=item.branch._replace(samples=place and place.samples)))
        blocks = [
            (item.branch, item.addition.modules[-1], math.prod(item.shape) // self.batch // item.branch.width)
            for item in kept
        ]
        lines = [self._line(*pair) for pair in sorted(not_gated, key=lambda pair: pair[0].total)]
        context, embeddings = self._context(kept), self._embeddings(kept)
        return FoundBranches(type(self.model).__name__, with_levels(self.model, blocks), lines, context, embeddings)

    def _refusal(self, item: _Found, place: Place | None) -> str | None:
        """Return the reason why a gate of a branch would not belong to one sample, or None."""
        if place is not None:
            return None if place.leak <= LEAK else f"'{item.branch.end}' mixes the samples: one changes with another"
        if any(name in self.second for name in item.addition.modules):
            return f"its samples are in dimension 1 (batch_first=False): {_DIFFERENT}"
        if item.shape[0] != self.batch:
            return f"'{item.branch.end}' puts out {item.shape[0]} rows for {self.batch} samples: {_DIFFERENT}"
        return None

    def _line(self, addition: Addition, reason: str) -> str:
        shape = tuple(self.steps[addition.total].shape)
        return f"{addition.modules[-1] or type(self.model).__name__}, sum of shape {shape}: {reason}"

    def _walk_back(self, number: int, addition: Addition) -> list[_Found]:
        """Return the ends of the branch that this side of an addition is: one, or several that were added before."""
        seen, folded = None, None
        while True:
            step = self.steps[number]
            outputs = [output for output in self.watch.outputs.get(number, ()) if output.module not in addition.modules]
            once = [output for output in outputs if self.watch.calls[output.module] == 1]
            if once and step.shape[0] == self.batch:
                return [self._end(number, once, addition)]
            if once and folded is None:
                folded = (number, once, addition)
            if outputs and not once:
                last = outputs[-1].module
                seen = f"'{last}' runs {self.watch.calls[last]} times in a forward pass"
            if number in self.residual.sums:
                del self.residual.sums[number]
                return [found for source in step.inputs for found in self._walk_back(source, addition)]
            try:
                number = self._source(step, seen)
            except _Reason:
                if folded is None:
                    raise
                return [self._end(*folded)]

    def _source(self, step: Step, seen: str | None) -> int:
        """Return the tensor that a gate may stand at as well as at this one."""
        size = math.prod(step.shape)
        full = [source for source in step.inputs if math.prod(self.steps[source].shape) >= size]
        if len(step.inputs) == 1 or step.name.endswith("_as"):
            full = [*step.inputs[:1]]
        if step.weight or not step.inputs:
            raise _Reason(seen or "no module puts out its branch")
        if step.name not in TRANSPARENT:
            raise _Reason(seen or f"'{step.name}' stands between its last module and the addition")
        if len(full) != 1:
            raise _Reason(seen or "its branch is a product of tensors of full size")
        return full[0]

    def _end(self, number: int, outputs: list[Output], addition: Addition) -> _Found:
        # The outermost module that puts out this tensor alone, or else the one nearest to the layer.
        output = next((output for output in reversed(outputs) if output.element is None), outputs[0])
        shape = self.steps[number].shape
        dim = channel_dim(self.steps, number)
        if dim is None and self.steps[addition.total].shape == shape:
            # The shortcut has the same channels.
            dim = channel_dim(self.steps, addition.total)
        if dim is None:
            raise _Reason(f"no layer tells which dimension of the output of '{output.module}' holds channels")
        label = output.module if output.element is None else f"{output.module}[{output.element}]"
        last = dim == len(shape) - 1 and dim != 1
        branch = Branch(label, output.module, shape[dim], "", -1 if last else dim, output.element)
        return _Found(branch, output.order, addition, shape)

    def _embeddings(self, found: Sequence[_Found]) -> dict[str, ContextPlace]:
        """Return the vectors `(B, E)` that modules put out once, before the first branch ends."""
        first = min((item.order for item in found), default=0)
        places: dict[str, ContextPlace] = {}
        for number, outputs in self.watch.outputs.items():
            shape = self.steps[number].shape
            for output in outputs:
                once = self.watch.calls[output.module] == 1
                if once and len(shape) == 2 and shape[0] == self.batch and output.order < first:
                    places.setdefault(output.module, ContextPlace(output.module, None, output.element, shape[1]))
        return places

    def _context(self, found: Sequence[_Found]) -> ContextPlace | None:
        """Find the context: the one vector that layers compute and all blocks receive. Return its place, or None."""
        given = [{n for name in item.addition.modules[1:] for n in self.watch.given.get(name, ())} for item in found]
        shared = [number for number in set.intersection(*given) if self._is_embedding(number)] if given else []
        if len(shared) != 1:
            return None
        size = self.steps[shared[0]].shape[1]
        for output in reversed(self.watch.outputs.get(shared[0], ())):
            if self.watch.calls[output.module] == 1:
                return ContextPlace(output.module, None, output.element, size)
        block = next(name for name in found[0].addition.modules[1:] if shared[0] in self.watch.given.get(name, ()))
        given_as = self.watch.given[block][shared[0]]
        return ContextPlace(block, given_as.argument, given_as.place, size)

    def _is_embedding(self, number: int) -> bool:
        shape, above, seen = self.steps[number].shape, [number], {number}
        while above:
            step = self.steps[above.pop()]
            if step.weight:
                return shape[0] == self.batch
            above += (new := set(step.inputs) - seen)
            seen |= new
        return False
