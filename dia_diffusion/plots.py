"""Pictures: grids of images and training curves."""

import json
import math
from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

_SMALLEST_TILE = 56
_GAP = 2
_MOST_COLUMNS = 20


def image_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """A picture of uint8 images `(B, C, H, W)` side by side; small ones are enlarged without smoothing.

    `columns` is by default about the square root of B, and also where it would be more than 20.
    """
    if columns is None or columns > _MOST_COLUMNS:
        columns = math.ceil(math.sqrt(len(images)))
    factor = max(1, -(-_SMALLEST_TILE // images.shape[-1]))
    tiles = []
    for image in images.numpy():
        pixels = np.kron(image.transpose(1, 2, 0), np.ones((factor, factor, 1), dtype=np.uint8))
        framed = np.pad(pixels, ((_GAP, _GAP), (_GAP, _GAP), (0, 0)), constant_values=255)
        tiles.append(Image.fromarray(framed.squeeze(-1) if framed.shape[-1] == 1 else framed).convert("RGB"))
    rows = math.ceil(len(tiles) / columns)
    tiles += [Image.new("RGB", tiles[0].size, "white")] * (rows * columns - len(tiles))
    return make_image_grid(tiles, rows=rows, cols=columns)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl. A last line that a killed run did not finish is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def save_curves(metrics: list[dict[str, float]], path: Path) -> None:
    """Training loss, held-out loss and learning rate over the steps, from the lines of a metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    losses = figure.subplots()
    rate = losses.twinx()
    for axis, key, label, style in (
        (losses, "loss", "training loss", {"color": "tab:blue", "alpha": 0.35, "linewidth": 1}),
        (losses, "held_out_loss", "held-out loss", {"color": "tab:red", "marker": "o", "markersize": 4}),
        (rate, "learning_rate", "learning rate", {"color": "tab:gray", "linestyle": ":"}),
    ):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)
    losses.set(xlabel="step", ylabel="mean squared error", yscale="log")
    rate.set(ylabel="learning rate", ylim=(0, None))
    handles = [axis.get_legend_handles_labels() for axis in (losses, rate)]
    losses.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="upper right")
    losses.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
