"""The gates of all blocks over the steps of a sampling, as a heat map."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .making import Moment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TICKS = 12


def gate_table(moments: Sequence[Moment]) -> tuple[list[str], list[float], np.ndarray]:
    """The blocks, the timesteps, and mean and standard deviation of the gates: `(2, blocks, timesteps)`."""
    seen = [moment for moment in moments if moment.gates]
    blocks = list(seen[0].gates)
    figures = np.array([[moment.gates[block] for moment in seen] for block in blocks])
    return blocks, [moment.timestep for moment in seen], figures.transpose(2, 0, 1)


def draw_gates(moments: Sequence[Moment]) -> "Figure":
    """Mean gate and its spread over images and channels: a row for each block in order of execution, a column for each
    step, from noise to image."""
    from matplotlib.figure import Figure

    blocks, timesteps, (mean, spread) = gate_table(moments)
    figure = Figure(figsize=(11, 1.6 + 0.24 * len(blocks)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    # A gate of 1 changes nothing: it has the neutral colour.
    far = max(np.abs(mean - 1).max(), 1e-3)
    ticks = range(0, len(timesteps), -(-len(timesteps) // _MOST_TICKS))
    for axis, values, title, style in (
        (left, mean, "mean gate", {"cmap": "coolwarm", "vmin": 1 - far, "vmax": 1 + far}),
        (right, spread, "spread of the gates (standard deviation)", {"cmap": "viridis", "vmin": 0}),
    ):
        shown = axis.imshow(values, aspect="auto", interpolation="nearest", **style)
        axis.set(title=title, xlabel="timestep: from noise to image")
        axis.set_xticks(list(ticks), [f"{timesteps[tick]:.4g}" for tick in ticks])
        figure.colorbar(shown, ax=axis)
    left.set_yticks(range(len(blocks)), blocks)
    return figure
