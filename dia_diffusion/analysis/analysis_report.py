"""The report on a model's attention maps: figures, a table and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_json
from ..page import heading, markdown, picture, write_page
from .maps import Block, place_blocks
from .similarity import VIEWS, channel_correlations, cka_of_pairs, describe_blocks, describe_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Similarity = dict[tuple[str, str], np.ndarray]
_VIEW_TITLES = {"all": "all samples", "within_timestep": "within a timestep"}
_PICTURES = {
    "correlation": "Correlation between blocks",
    "cka": "Linear CKA between blocks",
    "channels": "Correlation channel by channel",
    "gates": "Gates",
}
_PAIR_PATHS = {"same path": "tab:blue", "different paths": "tab:orange"}


def report(
    maps: dict[str, np.ndarray], timesteps: Sequence[float], folder: Path, blocks: Sequence[Block] | None = None
) -> dict[str, Any]:
    """Writes `analysis.json`, `correlation.png`, `cka.png`, `channels.png`, `gates.png`, and all of them as a page,
    `report.html`.

    Args:
        maps (`dict`), timesteps (sequence of `float`): What `collect_maps` returned; no timesteps for a classifier.
        folder (`Path`): Where to.
        blocks (sequence of `Block`, *optional*): Where the blocks stand; by default that is read off a UNet's names.

    Returns:
        `dict`: What is in analysis.json: `timesteps`, `num_images`, `notes`, `blocks` (see `describe_blocks`), and
        `correlation` and `cka`, each for both views with `groups` and `pairs` (see `describe`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = place_blocks(maps) if blocks is None else blocks
    correlation = {view: channel_correlations(maps, view) for view in VIEWS}
    cka = {view: cka_of_pairs(maps, view) for view in VIEWS}
    described = describe_blocks(blocks, maps)
    figures = {
        "num_images": next(iter(maps.values())).shape[1],
        "timesteps": list(timesteps),
        "notes": _notes(described),
        "correlation": {view: describe_pairs(blocks, similarity) for view, similarity in correlation.items()},
        "cka": {view: describe_pairs(blocks, similarity) for view, similarity in cka.items()},
        "blocks": described,
    }
    write_json(folder / "analysis.json", figures)
    save_matrices(blocks, correlation, "Pearson correlation, mean over channels", (-1, 1), folder / "correlation.png")
    save_matrices(blocks, cka, "linear CKA", (0, 1), folder / "cka.png")
    save_channels(blocks, correlation, folder / "channels.png")
    save_gates(blocks, maps, timesteps, folder / "gates.png")
    parts = [markdown(format_analysis(figures))]
    for name, title in _PICTURES.items():
        parts += [heading(title), picture(folder / f"{name}.png", title)]
    write_page(folder / "report.html", "Attention maps", parts, [folder / "analysis.json"])
    return figures


def _notes(described: list[dict[str, Any]]) -> list[str]:
    constant = [block for block in described if block["constant_channels"]]
    if not constant:
        return []
    number, of = sum(b["constant_channels"] for b in constant), sum(b["width"] for b in described)
    return [
        f"{number} of {of} channel gates are constant, in {len(constant)} of {len(described)} blocks: they correlate "
        "with nothing and are left out. All gates of a fresh model that starts as the identity are."
    ]


def format_analysis(figures: dict[str, Any]) -> str:
    """A table of the groups of pairs, in Markdown."""
    lines = ["| pairs of blocks | r, all: mean | max | r, within a timestep: mean | max | CKA, all | CKA, within |"]
    lines.append("|---" + "|---:" * 6 + "|")
    for group, cka in figures["cka"]["all"]["groups"].items():
        cells = []
        for view in VIEWS:
            of_group = figures["correlation"][view]["groups"].get(group, {})
            cells += [_figure(of_group.get("mean")), _figure(of_group.get("maximum"))]
        cells += [_figure(cka["mean"]), _figure(figures["cka"]["within_timestep"]["groups"][group]["mean"])]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    lines += ["", "Correlations (r) are channel by channel, between blocks of equal width."]
    if not figures["timesteps"]:
        return "\n".join([*lines, f"{figures['num_images']} images; there are no timesteps.", *figures["notes"]])
    shares = [block["timestep_share"] for block in figures["blocks"] if block["timestep_share"] is not None]
    share = f"{np.mean(shares):.0%}" if shares else "-"
    lines += [
        f"{figures['num_images']} images at each of {len(figures['timesteps'])} timesteps.",
        f"Variance of the gates that is between timesteps, not between images (mean over blocks): {share}.",
        *figures["notes"],
    ]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def save_matrices(
    blocks: Sequence[Block], similarity: dict[str, Similarity], title: str, limits: tuple[float, float], path: Path
) -> None:
    """A heat map over pairs of blocks for each view. Pairs without a figure are hatched."""
    from matplotlib.figure import Figure

    size = 2.2 + 0.3 * len(blocks)
    figure = Figure(figsize=(2 * size, size + 0.4), layout="constrained")
    axes = figure.subplots(1, len(VIEWS), sharey=True)
    # Both are perceptually uniform; the second has a neutral middle, for what has a sign.
    colours = "viridis" if limits[0] == 0 else "coolwarm"
    for axis, (view, pairs) in zip(axes, similarity.items(), strict=True):
        image = axis.imshow(_matrix(blocks, pairs), cmap=colours, vmin=limits[0], vmax=limits[1])
        axis.patch.set(facecolor="white", edgecolor="0.75", hatch="///")
        axis.set_title(_VIEW_TITLES[view])
        axis.set_xticks(range(len(blocks)), [block.label for block in blocks], rotation=90)
        axis.set_yticks(range(len(blocks)), [block.label for block in blocks])
        axis.set_xlabel("residual block")
    axes[0].set_ylabel("residual block")
    figure.colorbar(image, ax=list(axes), label=title, shrink=0.8)
    figure.savefig(path, dpi=120)


def _matrix(blocks: Sequence[Block], pairs: Similarity) -> np.ndarray:
    number = {block.name: index for index, block in enumerate(blocks)}
    matrix = np.full((len(blocks), len(blocks)), np.nan)
    for (a, b), values in pairs.items():
        known = values[~np.isnan(values)]
        if len(known):
            matrix[number[a], number[b]] = matrix[number[b], number[a]] = known.mean()
    return matrix


def save_channels(blocks: Sequence[Block], correlation: dict[str, Similarity], path: Path) -> None:
    """Histograms of the channels' correlations, for each view: blocks of one path, and of different ones."""
    from matplotlib.figure import Figure

    place = {block.name: block for block in blocks}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(VIEWS), sharey=True)
    for axis, (view, pairs) in zip(axes, correlation.items(), strict=True):
        for label, colour in _PAIR_PATHS.items():
            chosen = [
                values for (a, b), values in pairs.items() if (place[a].path == place[b].path) == (label == "same path")
            ]
            values = np.concatenate([np.zeros(0), *chosen])
            values = values[~np.isnan(values)]
            weights = np.full(len(values), 1 / max(len(values), 1))
            axis.hist(values, np.linspace(-1, 1, 41), weights=weights, alpha=0.6, color=colour, label=label)
        axis.set(title=_VIEW_TITLES[view], xlabel="Pearson correlation of a channel in two blocks", xlim=(-1, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of channels")
    axes[0].legend(title="blocks on", loc="upper left")
    figure.savefig(path, dpi=120)


def save_gates(blocks: Sequence[Block], maps: dict[str, np.ndarray], timesteps: Sequence[float], path: Path) -> None:
    """The distribution of each block's gates, and their mean at each timestep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.3 * len(blocks)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _box_gates(left, [maps[block.name].reshape(-1) for block in blocks], [block.label for block in blocks])
    means = np.stack([maps[block.name].mean((1, 2)) for block in blocks])
    image = right.imshow(means, aspect="auto", cmap="viridis")
    right.set_xticks(range(len(timesteps)), timesteps)
    right.set(title="mean gate at each timestep" if timesteps else "mean gate", xlabel="timestep" if timesteps else "")
    figure.colorbar(image, ax=right, label="gate")
    figure.savefig(path, dpi=120)


def _box_gates(axis: "Axes", values: Sequence[np.ndarray], labels: Sequence[str]) -> None:
    """Median, quartiles and the middle 98% of each."""
    axis.boxplot(values, orientation="horizontal", whis=(1, 99), showfliers=False, positions=range(len(values)))
    axis.set_yticks(range(len(values)), labels)
    axis.set(title="gates: median, quartiles, middle 98%", xlabel="gate", ylabel="residual block")
    axis.grid(axis="x", alpha=0.3)
