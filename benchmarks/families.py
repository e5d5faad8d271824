"""The models of each family that the tests have, wider, with inputs: `attention_cost.py` measures them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "models")]

from backbones import make_backbones, outputs  # noqa: E402

BATCH = 4
# The makers of a model and of inputs for it.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    name: (backbone.make, lambda inputs=backbone.inputs: inputs(BATCH))
    for name, backbone in make_backbones(scale=4).items()
    if backbone.ends is None
}


def make_step(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return a forward pass and its backward pass, for all outputs."""

    def step() -> None:
        sum(output.square().mean() for output in outputs(model, inputs)).backward()
        model.zero_grad()

    return step
