"""Tell residual additions from others, and their branches from their shortcuts, in the notes of a forward pass."""

import heapq
import math
from collections import Counter, defaultdict

from torch import nn

from .channels import TRANSPARENT
from .watch import ADDITIONS, Addition, ForwardWatch

_PRODUCTS = {"softmax", "scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum"}
_ON_THE_WAY = TRANSPARENT | ADDITIONS | {"cat", "where"}


class ResidualAdditions:
    """The residual additions of one forward pass.

    Args:
        model (`nn.Module`), watch (`ForwardWatch`): What ran, and the notes.
        dimensions (`int`): The least number of dimensions of features.

    Attributes:
        sums (`dict[int, tuple[Addition, str]]`):
            Sums of two sides with layers, by number: neither is a shortcut, but both may be branches of a later
            addition.
    """

    def __init__(self, model: nn.Module, watch: ForwardWatch, dimensions: int):
        self.model, self.steps, self.batch, self.dimensions = model, watch.steps, watch.batch, dimensions
        # How often a tensor goes into a call, and how often into an addition.
        self.uses = Counter(source for step in self.steps for source in set(step.inputs))
        self.readers: dict[int, list[int]] = defaultdict(list)
        for number, step in enumerate(self.steps):
            for source in set(step.inputs):
                self.readers[source].append(number)
        self.added = Counter(side for addition in watch.additions for side in addition.sides)
        self.sums: dict[int, tuple[Addition, str]] = {}

    def branch_side(self, addition: Addition) -> int | None:
        """Return the side of an addition that is a residual branch; None if neither is.

        Both sides are followed back to what they have in common. The tensors are numbered in the order in which they
        were made, so the highest number is always taken next, and all that depends on it has been seen.
        """
        if not self._is_features(addition.total) or self._in_adapter(addition) or self._in_attention(addition.total):
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
        # A side that holds the common input itself is a shortcut, whatever was added to it before.
        least = [self._least_layers(side, common) if fewer else 0 for side in (one, two)]
        if min(least) == 0 < max(least):
            branch = one if least[0] > 0 else two
        elif fewer < more and fewer <= 1:
            branch = one if layers[1] > layers[2] else two
        else:
            words = f"both sides come through layers ({layers[1]} and {layers[2]}), so neither is a shortcut"
            self.sums[addition.total] = (addition, words)
            return None
        return None if self._is_embedded(branch, addition) else branch

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

    def _in_attention(self, number: int) -> bool:
        """Tell whether a sum is a score, a query or a key of attention: it goes nowhere but into a softmax or a product
        with other features."""
        readers, seen = [number], {number}
        while readers:
            following = self.readers[readers.pop()]
            if not following:
                return False
            for step in following:
                kind = self.steps[step]
                if kind.name in _PRODUCTS and not kind.weight:
                    continue
                if kind.weight or kind.name not in _ON_THE_WAY:
                    return False
                if step not in seen:
                    seen.add(step)
                    readers.append(step)
        return True
