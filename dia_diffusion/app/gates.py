"""The gates of all blocks over the steps of a sampling: a heat map, and how to read it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..analysis.analysis_report import gate_colours
from .stepwise import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TICKS = 12


def gate_table(snapshots: Sequence[Snapshot]) -> tuple[list[str], list[float], np.ndarray]:
    """Return the blocks, the timesteps, and mean and standard deviation of the gates: `(2, blocks, timesteps)`."""
    seen = [snapshot for snapshot in snapshots if snapshot.gates]
    blocks = list(seen[0].gates)
    figures = np.array([[snapshot.gates[block] for snapshot in seen] for block in blocks])
    return blocks, [snapshot.timestep for snapshot in seen], figures.transpose(2, 0, 1)


def draw_gates(snapshots: Sequence[Snapshot]) -> "Figure":
    """Draw the mean gate and its spread over images and channels: a row for each block in order of execution, a column
    for each step, from noise to image."""
    from matplotlib.figure import Figure

    blocks, timesteps, (mean, spread) = gate_table(snapshots)
    figure = Figure(figsize=(6.5, 2.4 + 0.4 * len(blocks)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    ticks = range(0, len(timesteps), -(-len(timesteps) // _MOST_TICKS))
    for axis, values, title, style in (
        (above, mean, "mean gate", gate_colours(mean)),
        (below, spread, "spread of the gates over images and channels (standard deviation)", {"cmap": "viridis"}),
    ):
        shown = axis.imshow(values, aspect="auto", interpolation="nearest", **style)
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(blocks)), blocks, fontsize=8)
        figure.colorbar(shown, ax=axis)
    below.set_xticks(list(ticks), [f"{timesteps[tick]:.4g}" for tick in ticks], fontsize=8)
    below.set_xlabel("timestep: from noise (left) to image (right)")
    return figure


def describe_gates(snapshots: Sequence[Snapshot]) -> str:
    """Return which blocks the attention strengthens and weakens most."""
    blocks, _, (mean, _) = gate_table(snapshots)
    averages = mean.mean(axis=1)
    low, high = averages.argmin(), averages.argmax()
    return (
        f"Averaged over the steps, the mean gate is smallest in {blocks[low]} ({averages[low]:.3g}) and largest in "
        f"{blocks[high]} ({averages[high]:.3g})."
    )


def describe_difference(images: Tensor, bare: Tensor) -> str:
    """Return how far images are from those without attention, with the distance of two images as the yardstick."""
    apart = (bare.float() - images.float()).abs().mean().item()
    text = f"Without the attention a pixel changes by {apart:.1f} of 255 on average"
    if len(images) < 2:
        return f"{text}."
    others = (images.float() - images.float().roll(1, 0)).abs().mean().item()
    if others == 0:
        return f"{text}."
    share = apart / others
    size = "small" if share < 0.1 else "clear" if share < 0.5 else "large"
    return f"{text}, {share:.0%} of the difference between two of these images ({others:.1f}): a {size} effect."
