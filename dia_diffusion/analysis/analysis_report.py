"""The report on a model's attention maps: figures, a table and pictures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_json
from ..page import definitions, heading, markdown, markdown_table, plot, prose, write_page
from .maps import Block, place_blocks
from .similarity import VIEWS, channel_correlations, cka_of_pairs, describe_blocks, describe_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Similarity = dict[tuple[str, str], np.ndarray]
_VIEW_TITLES = {"all": "all samples", "within_timestep": "within a timestep"}
_PICTURES = {
    "correlation": "Correlation between blocks",
    "cka": "Linear CKA between blocks",
    "channels": "Correlation channel by channel",
    "gates": "Gates",
}
_MEANING = (
    "**r** is the Pearson correlation of one channel's gate in two blocks, and **CKA** compares all gates of two "
    "blocks at once, whatever their widths: 1 means that the blocks gate alike, 0 that they have nothing in common.",
    "Blocks that are alike within a timestep react alike to the image, so that one shared module can serve them; what "
    "is alike over all samples only follows the timestep, and is no attention to the image.",
)
_PAIR_PATHS = {"same path": "tab:blue", "different paths": "tab:orange"}


def report(
    maps: dict[str, np.ndarray],
    timesteps: Sequence[float],
    folder: Path,
    blocks: Sequence[Block] | None = None,
    facts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write `analysis.json`, `correlation.png`, `cka.png`, `channels.png`, `gates.png`, and all of them as a page,
    `report.html`. A picture that would be empty is left out.

    Args:
        maps (`dict`), timesteps (sequence of `float`): What `collect_maps` returned; no timesteps for a classifier.
        folder (`Path`): Where to.
        blocks (sequence of `Block`, *optional*): Where the blocks stand; by default that is read off a UNet's names.
        facts (`dict`, *optional*): What was analysed, by title: the model, the images, the date.

    Returns:
        `dict`: What is in analysis.json: `timesteps`, `num_images`, `notes`, `blocks` (see `describe_blocks`), and
        `correlation` and `cka`, each for both views with `groups` and `pairs` (see `describe`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks, facts = place_blocks(maps) if blocks is None else blocks, facts or {}
    correlation = {view: channel_correlations(maps, view) for view in VIEWS}
    cka = {view: cka_of_pairs(maps, view) for view in VIEWS}
    described = describe_blocks(blocks, maps)
    figures = {
        "about": dict(facts),
        "num_images": next(iter(maps.values())).shape[1],
        "timesteps": list(timesteps),
        "notes": _notes(described),
        "correlation": {view: describe_pairs(blocks, similarity) for view, similarity in correlation.items()},
        "cka": {view: describe_pairs(blocks, similarity) for view, similarity in cka.items()},
        "blocks": described,
    }
    write_json(folder / "analysis.json", figures)
    # Without timesteps both views are the same.
    views = list(VIEWS) if timesteps else ["all"]
    shown = [{view: similarity[view] for view in views} for similarity in (correlation, cka)]
    draw: dict[str, Callable[[], Figure | None]] = {
        "correlation": partial(draw_matrices, blocks, shown[0], "Pearson correlation, mean over channels", (-1, 1)),
        "cka": partial(draw_matrices, blocks, shown[1], "linear CKA", (0, 1)),
        "channels": partial(draw_channels, blocks, shown[0]),
        "gates": partial(draw_gates, blocks, maps, timesteps),
    }
    parts = [definitions(facts), *map(prose, _MEANING), markdown(format_analysis(figures))]
    for name, title in _PICTURES.items():
        path, figure = folder / f"{name}.png", draw[name]()
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, dpi=120)
            parts += [heading(title), plot(path, title)]
    model = facts.get("Model", "").partition(":")[0]
    write_page(
        folder / "report.html", f"Attention maps of {model}".removesuffix(" of "), parts, [folder / "analysis.json"]
    )
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
    """Return a table of the groups of pairs, in Markdown."""
    views = {view: title for view, title in _VIEW_TITLES.items() if figures["timesteps"] or view == "all"}
    several = len(views) > 1
    head = ["pairs of blocks"]
    for title in views.values():
        head += [f"r{f', {title}' if several else ''}: mean", "max"]
    head += [f"CKA{f', {title}' if several else ''}" for title in views.values()]
    rows = []
    for group in figures["cka"]["all"]["groups"]:
        of_group = [figures["correlation"][view]["groups"].get(group, {}) for view in views]
        cells = [_figure(one.get(name)) for one in of_group for name in ("mean", "maximum")]
        cells += [_figure(figures["cka"][view]["groups"][group]["mean"]) for view in views]
        rows.append([group, *cells])
    lines = [markdown_table(head, rows), "", "Correlations (r) are channel by channel, between blocks of equal width."]
    if not several:
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


def draw_matrices(
    blocks: Sequence[Block], similarity: dict[str, Similarity], title: str, limits: tuple[float, float]
) -> "Figure | None":
    """Draw a heat map over pairs of blocks for each view; pairs without a figure are hatched. None without any."""
    from matplotlib.figure import Figure

    matrices = {view: _matrix(blocks, pairs) for view, pairs in similarity.items()}
    if all(np.isnan(matrix).all() for matrix in matrices.values()):
        return None
    size = 2.2 + 0.3 * len(blocks)
    figure = Figure(figsize=(len(matrices) * size, size + 0.4), layout="constrained")
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    # Both colour maps are perceptually uniform; the second has a neutral middle, for signed values.
    colours = "viridis" if limits[0] == 0 else "coolwarm"
    for axis, (view, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix, cmap=colours, vmin=limits[0], vmax=limits[1])
        axis.patch.set(facecolor="white", edgecolor="0.75", hatch="///")
        axis.set_title(_VIEW_TITLES[view] if len(matrices) > 1 else "")
        axis.set_xticks(range(len(blocks)), [block.label for block in blocks], rotation=90)
        axis.set_yticks(range(len(blocks)), [block.label for block in blocks])
        axis.set_xlabel("residual block")
    axes[0].set_ylabel("residual block")
    figure.colorbar(image, ax=list(axes), label=title, shrink=0.8)
    return figure


def _matrix(blocks: Sequence[Block], pairs: Similarity) -> np.ndarray:
    number = {block.name: index for index, block in enumerate(blocks)}
    matrix = np.full((len(blocks), len(blocks)), np.nan)
    for (a, b), values in pairs.items():
        known = values[~np.isnan(values)]
        if len(known):
            matrix[number[a], number[b]] = matrix[number[b], number[a]] = known.mean()
    return matrix


def draw_channels(blocks: Sequence[Block], correlation: dict[str, Similarity]) -> "Figure | None":
    """Draw histograms of the channels' correlations, for each view: blocks of one path, and of different ones. None
    where no channel has a correlation."""
    from matplotlib.figure import Figure

    path = {block.name: block.path for block in blocks}
    found: dict[str, dict[str, np.ndarray]] = {}
    for view, pairs in correlation.items():
        for (a, b), values in pairs.items():
            label = "same path" if path[a] == path[b] else "different paths"
            of_view = found.setdefault(view, {})
            of_view[label] = np.concatenate([of_view.get(label, np.zeros(0)), values[~np.isnan(values)]])
    if not any(len(values) for of_view in found.values() for values in of_view.values()):
        return None
    figure = Figure(figsize=(4.5 * len(found), 3.6), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (view, of_view) in zip(axes, found.items(), strict=True):
        for label, values in of_view.items():
            weights, colour = np.full(len(values), 1 / max(len(values), 1)), _PAIR_PATHS[label]
            if len(values):
                axis.hist(values, np.linspace(-1, 1, 41), weights=weights, alpha=0.6, color=colour, label=label)
        title = _VIEW_TITLES[view] if len(found) > 1 else ""
        axis.set(title=title, xlabel="Pearson correlation of a channel in two blocks", xlim=(-1, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of channels")
    axes[0].legend(title="blocks on", loc="upper left")
    return figure


def draw_gates(blocks: Sequence[Block], maps: dict[str, np.ndarray], timesteps: Sequence[float]) -> "Figure":
    """Draw the distribution of each block's gates, and their mean at each timestep, from noise to image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.3 * len(blocks)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    values, labels = [maps[block.name].reshape(-1) for block in blocks], [block.label for block in blocks]
    left.boxplot(values, orientation="horizontal", whis=(1, 99), showfliers=False, positions=range(len(values)))
    left.set_yticks(range(len(values)), labels)
    left.set(title="gates: median, quartiles, middle 98%", xlabel="gate", ylabel="residual block")
    left.grid(axis="x", alpha=0.3)
    order = np.argsort(timesteps)[::-1] if timesteps else np.zeros(1, dtype=int)
    means = np.stack([maps[block.name].mean((1, 2)) for block in blocks])[:, order]
    image = right.imshow(means, aspect="auto", **gate_colours(means))
    right.set_xticks(range(len(timesteps)), [f"{timesteps[int(at)]:.4g}" for at in order] if timesteps else [])
    right.set(title="mean gate", xlabel="timestep: from noise to image" if timesteps else "")
    # The first block that runs stands on top.
    right.set_ylim(len(blocks) - 0.5, -0.5)
    figure.colorbar(image, ax=right, label="gate")
    return figure


def gate_colours(mean: np.ndarray) -> dict[str, Any]:
    """Return a colour scale from the smallest to the largest mean gate, with 1, which changes nothing, in grey if it
    lies between them."""
    from matplotlib.colors import TwoSlopeNorm

    low, high = float(mean.min()), float(mean.max())
    if low < 1 < high:
        return {"cmap": "coolwarm", "norm": TwoSlopeNorm(1, low, high)}
    return {"cmap": "viridis"}
