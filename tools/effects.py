"""The main effects of docs/study.md: its table, printed, and its forest plot, docs/study/effects.png.

    python tools/effects.py

Each effect is the mean difference of two variants from the same seeds, from the raw figures in docs/study/, with its
95% interval by Student's t distribution. Losses differ in percent of the second variant's mean, accuracies in points.
"""

import json
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from dia_diffusion.study.comparison import KNOWN_SCORES, by_seed, compare, relative_unit

STUDY = Path(__file__).parent.parent / "docs" / "study"


class Effect(NamedTuple):
    """A comparison: what is compared with what, where, and in which file."""

    what: str
    where: str
    file: str
    variant: str
    baseline: str


UNETS = "UNets: held-out loss, %"
CLASSIFIERS = "Classifiers: test accuracy, points"
EFFECTS = {
    UNETS: [
        Effect("DIA", "default UNet, CIFAR-10 16x16", "cifar10", "lstm", "plain"),
        Effect("DIA", "the same, without classes", "cifar10_unconditional", "lstm", "plain"),
        Effect("DIA", "the same, 32x32", "cifar10_32", "lstm", "plain"),
        Effect("DIA", "default UNet, digits", "digits_finalists", "lstm", "plain"),
        Effect("gates of the timestep alone", "default UNet, CIFAR-10 16x16", "cifar10", "time", "plain"),
        Effect("scale-shift", "default UNet, CIFAR-10 16x16", "cifar10", "plain-scale-shift", "plain"),
        Effect("scale-shift", "default UNet, digits", "digits_finalists", "plain-scale-shift", "plain"),
        Effect("DIA", "scale-shift, CIFAR-10 16x16", "cifar10", "lstm-scale-shift", "plain-scale-shift"),
        Effect("DIA", "scale-shift, digits", "digits_finalists", "lstm-scale-shift", "plain-scale-shift"),
        Effect(
            "SE in each block", "scale-shift, CIFAR-10 16x16", "cifar10", "se-block-scale-shift", "plain-scale-shift"
        ),
        Effect(
            "SE in each block", "scale-shift, digits", "digits_finalists", "se-block-scale-shift", "plain-scale-shift"
        ),
        Effect("SE in each block", "scale-shift, MNIST", "mnist", "se-block-scale-shift", "plain-scale-shift"),
        Effect("gates at long skips", "scale-shift, CIFAR-10 16x16", "places", "skips", "plain"),
    ],
    CLASSIFIERS: [
        Effect("DIA as in the paper", "ResNet-32", "classification_cifar10", "dia-paper", "plain"),
        Effect("SE in each block", "ResNet-32", "classification_cifar10", "se-block", "plain"),
        Effect("branches that begin small", "ResNet-32", "classification_cifar10", "plain-quarter", "plain"),
        Effect("DIA, to that control", "ResNet-32", "classification_cifar10", "dia-paper", "plain-quarter"),
        Effect("DIA as in the paper", "ResNet-56", "classification_cifar10_depth_56", "dia-paper", "plain"),
        Effect("branches that begin small", "ResNet-56", "classification_cifar10_depth_56", "plain-quarter", "plain"),
        Effect("DIA, to that control", "ResNet-56", "classification_cifar10_depth_56", "dia-paper", "plain-quarter"),
        Effect("DIA", "ViT, digits", "classification_digits_vit", "dia-network", "plain"),
        Effect("SE in each block", "ViT, digits", "classification_digits_vit", "se-block", "plain"),
    ],
}


def measure(effect: Effect, score: str) -> tuple[float, float, float, int]:
    """Return an effect, the bounds of its 95% interval, and the number of pairs of runs."""
    raw = json.loads((STUDY / f"{effect.file}.json").read_text())
    runs = raw if isinstance(raw, list) else raw["runs"]
    figures = compare(*(by_seed(runs, variant, score) for variant in (effect.variant, effect.baseline)))
    unit = relative_unit(KNOWN_SCORES[score], figures)
    low, high = figures["difference_interval"]
    return unit * figures["difference"], unit * low, unit * high, figures["pairs"]


def measure_all() -> dict[str, list[tuple[Effect, tuple[float, float, float, int]]]]:
    """Return all effects with their figures, by group."""
    scores = {UNETS: "held_out_loss", CLASSIFIERS: "accuracy"}
    return {group: [(effect, measure(effect, scores[group])) for effect in EFFECTS[group]] for group in EFFECTS}


def table() -> str:
    """Return the table of all effects, in Markdown."""
    lines = []
    for group, effects in measure_all().items():
        lines += ["", f"| {group} | on what | difference [95% interval] | seeds |", "| --- | --- | ---: | ---: |"]
        for effect, (mean, low, high, pairs) in effects:
            lines.append(f"| {effect.what} | {effect.where} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] | {pairs} |")
    return "\n".join(lines[1:]) + "\n"


def draw(path: Path) -> None:
    """Draw the forest plot. Effects of two seeds are hollow; intervals that leave the picture end in an arrow."""
    groups = measure_all()
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    panels = figure.subplots(len(groups), height_ratios=[len(effects) for effects in groups.values()])
    for panel, (group, effects), limit, better in zip(
        panels, groups.items(), (2.2, 16), ("left", "right"), strict=True
    ):
        for row, (_, (mean, low, high, pairs)) in enumerate(effects):
            colour = "tab:blue" if pairs > 2 else "tab:gray"
            panel.plot([max(low, -limit), min(high, limit)], [row, row], color=colour, linewidth=1.5)
            panel.plot(mean, row, "o", color=colour, markerfacecolor=colour if pairs > 2 else "white")
            for bound, marker in ((low, "<"), (high, ">")):
                if abs(bound) > limit:
                    panel.plot(limit if bound > 0 else -limit, row, marker, color=colour, markersize=5)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(effects)), [f"{effect.what}: {effect.where}" for effect, _ in effects], fontsize=8)
        panel.set_xlim(-1.05 * limit, 1.05 * limit)
        panel.invert_yaxis()
        panel.set_title(f"{group} (better: {better}; hollow: two seeds)", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    print(table(), end="")
    draw(STUDY / "effects.png")
