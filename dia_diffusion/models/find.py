"""Find the residual branches of any model by watching one forward pass.

A residual block shows itself: two tensors of one shape are added, and one of them came through more layers than the
other. That one is the branch F(x) of x + F(x) (arXiv 2210.16101, eq. 1); the other is the shortcut, with no layer or
with one, a projection. From the addition the search walks back to the module that put out the branch.
"""

import heapq
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

from torch import nn

from ..errors import UsageError
from .branches import Branch
from .channels import TRANSPARENT, channel_dim
from .families import ContextPlace, with_levels
from .watch import Addition, ForwardWatch, Output, Step, watch_forward


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
            lines.append(f"  {branch.name:{width}}  {place}, level {branch.level}")
        if self.context is not None:
            lines.append(f"  Context: {self.context.describe()}, of width {self.context.size}.")
        return "\n".join([*lines, *(f"  not gated: {line}" for line in self.not_gated)])


def find_branches(model: nn.Module, *args: Any, **kwargs: Any) -> FoundBranches:
    """Run a model once and return its residual branches.

    The model runs in evaluation mode and without gradients. Its modes, buffers and attributes and the random state are
    restored. A model on the `meta` device runs there, so that a large one costs nothing. All intermediate tensors of
    the pass are held in memory until it ends.

    Args:
        model (`nn.Module`): Any model whose forward pass calls functions and modules of torch from Python.
        args, kwargs:
            Inputs for its `forward`. The batch must be the first dimension of the largest one (by its number of
            dimensions).

    Returns:
        [`FoundBranches`]: a sequence of `Branch` with `not_gated`, the additions that cannot be gated and why.
    """
    return _Search(model, *watch_forward(model, args, kwargs)).find()


def find_named(model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> FoundBranches:
    """Run a model once and return the outputs of these modules as its branches, in the order of the names.

    Raises:
        UsageError: for a module that does not run once, or whose output shows no channels.
    """
    return _Search(model, *watch_forward(model, args, kwargs)).named(names)


class _Found(NamedTuple):
    """A branch, with the tensors from which its level and the context are derived."""

    branch: Branch
    order: int  # of the end of the call of its module
    modules: tuple[str, ...]  # that were running at the addition
    tokens: int  # pixels or tokens of one sample


class _Reason(Exception):
    """The reason why an addition cannot be gated."""


class _Search:
    """The search for branches in the notes of one forward pass.

    Args:
        model (`nn.Module`), watch (`ForwardWatch`), batch (`int`): What ran, the notes, and the number of samples.
    """

    def __init__(self, model: nn.Module, watch: ForwardWatch, batch: int):
        self.model, self.watch, self.batch = model, watch, batch
        self.steps = watch.steps
        self.dimensions = 3
        # How often a tensor goes into a call, and how often into an addition.
        self.uses = Counter(source for step in self.steps for source in set(step.inputs))
        self.added = Counter(side for addition in watch.additions for side in addition.sides)
        # Sums of two sides with layers, by number: neither is a shortcut, but both may be branches of a later addition.
        self.sums: dict[int, tuple[Addition, str]] = {}
        # Layers of torch that hold the samples in dimension 1.
        self.second = {
            name.rpartition(".")[0]
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first and watch.calls[name]
        }

    def find(self) -> FoundBranches:
        found, reasons = self._search(3)
        if not found and not reasons:
            # A network of vectors (B, C).
            found, reasons = self._search(2)
        not_gated = [self._line(addition, reason) for addition, reason in reasons]
        branches = with_levels(self.model, [(item.branch, item.modules[-1], item.tokens) for item in found])
        name = type(self.model).__name__
        return FoundBranches(name, branches, not_gated, self._context(found), self._embeddings(found))

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
                found.append(self._end(number, [output], (name.rpartition(".")[0],)))
            except _Reason as reason:
                raise UsageError(f"'{name}' cannot be gated: {reason}.") from reason
        branches = with_levels(self.model, [(item.branch, item.modules[-1], item.tokens) for item in found])
        kind = type(self.model).__name__
        return FoundBranches(kind, branches, [], self._context(found), self._embeddings(found))

    def _search(self, dimensions: int) -> tuple[list[_Found], list[tuple[Addition, str]]]:
        """Return the branches in order, and the additions that cannot be gated, of at least this many dimensions."""
        self.dimensions, self.sums = dimensions, {}
        found: dict[tuple[str, int | None], _Found] = {}
        reasons = []
        for addition in self.watch.additions:
            try:
                branch = self._branch_side(addition)
                if branch is not None and self._is_embedded(branch, addition):
                    continue
                for item in self._walk_back(branch, addition) if branch is not None else ():
                    found.setdefault((item.branch.end, item.branch.element), item)
            except _Reason as reason:
                reasons.append((addition, str(reason)))
        in_order = sorted(found.values(), key=lambda item: (item.order, item.branch.element or 0))
        return in_order, sorted([*reasons, *self.sums.values()], key=lambda pair: pair[0].total)

    def _line(self, addition: Addition, reason: str) -> str:
        shape = tuple(self.steps[addition.total].shape)
        return f"{addition.modules[-1] or type(self.model).__name__}, sum of shape {shape}: {reason}"

    def _branch_side(self, addition: Addition) -> int | None:
        """Return the side of an addition that is a residual branch; None if neither is.

        Both sides are followed back to what they have in common. The tensors are numbered in the order in which they
        were made, so the highest number is always taken next, and all that depends on it has been seen.
        """
        if not self._is_features(addition.total) or self._in_adapter(addition):
            return None
        one, two = addition.sides
        colours, layers, common = {one: 1}, [0, 0, 0, 0], set()
        colours[two] = colours.get(two, 0) | 2
        heap = [-number for number in colours]
        heapq.heapify(heap)
        apart = sum(colour != 3 for colour in colours.values())
        while heap and apart:
            number = -heapq.heappop(heap)
            colour, step = colours[number], self.steps[number]
            apart -= colour != 3
            common |= {number} if colour == 3 else set()
            layers[colour] += step.weight
            # A mask or an index carries no features.
            for source in step.inputs if step.floating else ():
                before = colours.get(source, 0)
                colours[source] = before | colour
                apart += (colours[source] != 3) - (before in (1, 2))
                if not before:
                    heapq.heappush(heap, -source)
        common |= {-number for number in heap}
        # Two embeddings of one number have that in common, and no features.
        if layers[1] == layers[2] == 0 or not any(map(self._is_features, common)):
            return None
        fewer, more = sorted(layers[1:3])
        if fewer > 1 or fewer == more:
            # A side that holds the common input itself is a shortcut, whatever was added to it before.
            least = [self._least_layers(side, common) for side in (one, two)]
            if min(least) > 0 or max(least) == 0:
                words = f"both sides come through layers ({layers[1]} and {layers[2]}), so neither is a shortcut"
                self.sums[addition.total] = (addition, words)
                return None
            return one if least[0] > 0 else two
        return one if layers[1] > layers[2] else two

    def _least_layers(self, side: int, common: set[int]) -> float:
        """Return the number of layers on the shortest way to the common input, through tensors of full size."""
        heap, best, size = [-side], math.inf, math.prod(self.steps[side].shape)
        least: dict[int, float] = {side: 0}
        while heap:
            number = -heapq.heappop(heap)
            if number in common:
                best = min(best, least[number])
                continue
            step = self.steps[number]
            for source in step.inputs:
                if math.prod(self.steps[source].shape) >= size:
                    if source not in least:
                        heapq.heappush(heap, -source)
                    least[source] = min(least.get(source, math.inf), least[number] + step.weight)
        return best

    def _is_features(self, number: int) -> bool:
        """Tell features from embeddings: by their dimensions, or by the tokens of all samples in the first."""
        shape = self.steps[number].shape
        folded = len(shape) == 2 and shape[0] > self.batch and shape[0] % self.batch == 0
        return folded or len(shape) >= self.dimensions

    def _is_embedded(self, branch: int, addition: Addition) -> bool:
        """Tell whether features are given positions, as DETR does in each layer: the other side is added to more than
        these, and these go on without it."""
        other = sum(addition.sides) - branch
        return self.uses[branch] > 1 and self.added[other] > 1

    def _in_adapter(self, addition: Addition) -> bool:
        """Tell whether a layer of peft adds its update to the layer that it wraps."""
        return hasattr(self.model.get_submodule(addition.modules[-1]), "base_layer")

    def _walk_back(self, number: int, addition: Addition) -> list[_Found]:
        """Return the ends of the branch that this side of an addition is: one, or several that were added before."""
        if any(name in self.second for name in addition.modules):
            raise _Reason("its samples are in dimension 1 (batch_first=False)")
        seen = None
        while True:
            step = self.steps[number]
            outputs = [output for output in self.watch.outputs.get(number, ()) if output.module not in addition.modules]
            once = [output for output in outputs if self.watch.calls[output.module] == 1]
            if once and step.shape[0] == self.batch:
                return [self._end(number, once, addition.modules, addition.total)]
            if outputs and not once:
                last = outputs[-1].module
                seen = f"'{last}' runs {self.watch.calls[last]} times in a forward pass"
            elif once:
                seen = f"'{once[-1].module}' puts out {step.shape[0]} rows for {self.batch} samples"
            if number in self.sums:
                del self.sums[number]
                return [found for source in step.inputs for found in self._walk_back(source, addition)]
            number = self._source(step, seen)

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

    def _end(self, number: int, outputs: list[Output], modules: tuple[str, ...], total: int | None = None) -> _Found:
        # The outermost module that puts out this tensor alone, or else the one nearest to the layer.
        output = next((output for output in reversed(outputs) if output.element is None), outputs[0])
        shape = self.steps[number].shape
        dim = channel_dim(self.steps, number)
        if dim is None and total is not None and self.steps[total].shape == shape:
            # The shortcut has the same channels.
            dim = channel_dim(self.steps, total)
        if dim is None:
            raise _Reason(f"no layer tells which dimension of the output of '{output.module}' holds channels")
        label = output.module if output.element is None else f"{output.module}[{output.element}]"
        last = dim == len(shape) - 1 and dim != 1
        branch = Branch(label, output.module, shape[dim], "", -1 if last else dim, output.element)
        tokens = math.prod(shape[1:]) // shape[dim]
        return _Found(branch, output.order, modules, tokens)

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
        given = [{n for name in item.modules[1:] for n in self.watch.given.get(name, ())} for item in found]
        shared = [number for number in set.intersection(*given) if self._is_embedding(number)] if given else []
        if len(shared) != 1:
            return None
        size = self.steps[shared[0]].shape[1]
        for output in reversed(self.watch.outputs.get(shared[0], ())):
            if self.watch.calls[output.module] == 1:
                return ContextPlace(output.module, None, output.element, size)
        block = next(name for name in found[0].modules[1:] if shared[0] in self.watch.given.get(name, ()))
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
