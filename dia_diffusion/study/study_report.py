"""The report of a study: its figures, its tables, its picture and its page."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..files import replace_text, write_json
from ..objectives import OBJECTIVES
from ..options.model import DataOptions, ModelOptions
from ..page import folded, heading, markdown, markdown_table, plot, prose, write_page
from .comparison import FEW_PAIRS_MARK, FEWEST_PAIRS, Score, by_seed, compare, relative_unit, score_cells
from .description import Study, StudyRun
from .single_run import MOST_HELD_OUT, SPIKES, read_result, read_timing

# Of the options of the data, those that leave the scored images and the meaning of a score as they are.
_FREE = {"cache_dir", "random_flip", "preprocessing_num_workers", "dataloader_num_workers"}
# These change what a loss measures, and leave the images as they are.
_OF_LOSSES = ["vae", "class_conditional", "label_column"]
_IMAGES = [item.name for item in fields(DataOptions) if item.name not in {*_FREE, *_OF_LOSSES}]
_OBJECTIVE = ["objective", *(name for kind in OBJECTIVES.values() for name in kind.option_names())]
# What must be the same for a score to be compared: the images, and for a loss what it measures. Losses of zero models
# are 1.0 for noise, 0.8 for velocities and 20.2 for samples.
_MUST_AGREE = {"held_out_loss": _IMAGES + _OF_LOSSES + _OBJECTIVE, "fid": _IMAGES}
# Of the options of the model, those that do not change the layers of its backbone.
_SAME_LAYERS = {"dropout", "compile_mode"}


def summarise(study: Study, runs: Sequence[StudyRun]) -> dict[str, Any]:
    """Return the figures of the finished runs of a study, JSON-ready.

    Returns:
        `dict`: `study`: its description. `scores`: for each score whether lower or higher is better. `runs`: the
        results as they are. `variants`: for each variant `parameters`, `attention_parameters`, `step_time_ratio`,
        `finished`, `diverged` (numbers of runs), `loss_spikes` (a run, on average), `not_compared` (for each score that
        is another quantity than the baseline's, the options that make it so), `other_weights` (the options for which it
        starts from other weights than the baseline), and for each score the figures of `compare`. What there is no
        figure for yet is `None`.
    """
    results = [result for run in runs if (result := read_result(run)) is not None]
    firsts = {run.variant: run for run in reversed(runs)}
    variants = {}
    for name in study.variants:
        of_variant = [result for result in results if result["variant"] == name]
        trained = [result for result in of_variant if "diverged_at_step" not in result]
        apart, other_layers = _differences(study, name)
        spikes = [result["loss_spikes"] for result in of_variant if "loss_spikes" in result]
        is_baseline = name == study.baseline
        variants[name] = {
            "parameters": trained[0].get("parameters") if trained else None,
            "attention_parameters": trained[0].get("attention_parameters") if trained else None,
            "step_time_ratio": 1.0 if is_baseline else read_timing(firsts[name], firsts[study.baseline]),
            "finished": len(of_variant),
            "diverged": len(of_variant) - len(trained),
            "loss_spikes": statistics.mean(spikes) if spikes else None,
            "not_compared": {score: names for score, names in apart.items() if names},
            "other_weights": other_layers,
            **{
                score: compare(
                    by_seed(results, name, score), {} if apart.get(score) else by_seed(results, study.baseline, score)
                )
                for score in study.scores
            },
        }
    scores = {name: score.better for name, score in study.scores.items()}
    return {"study": study.description(), "scores": scores, "variants": variants, "runs": results}


def _differences(study: Study, variant: str) -> tuple[dict[str, list[str]], list[str]]:
    """Return for each score the options that make it another quantity than the baseline's, and those that change the
    layers of the backbone."""
    if study.trainer is not None:
        return {}, []
    mine, other = (study.config(name, study.seeds[0], Path()).public_dict() for name in (variant, study.baseline))
    model = [item.name for item in fields(ModelOptions) if item.name not in _SAME_LAYERS]
    layers = [name for name in model if not name.startswith("dia_")]
    apart = {score: [name for name in names if mine[name] != other[name]] for score, names in _MUST_AGREE.items()}
    return apart, [name for name in [*layers, "class_conditional", "vae"] if mine[name] != other[name]]


def write_report(summary: dict[str, Any], scores: Mapping[str, Score], folder: Path) -> None:
    """Write `study.json`, `study.md`, `study.png`, and all of them as a page, `study.html`."""
    text, picture = format_table(summary, scores), folder / "study.png"
    write_json(folder / "study.json", summary)
    replace_text(folder / "study.md", text)
    picture.unlink(missing_ok=True)
    save_figure(summary, scores, picture)
    tables, _, words = text.partition(_LEGEND)
    study = summary["study"]
    parts = [
        prose(
            f"{len(study['variants'])} variants, each from {len(study['seeds'])} seeds, against `{study['baseline']}`."
        )
    ]
    if picture.exists():
        title = "Differences to the baseline from the same seeds"
        parts += [heading(title), plot(picture, title)]
    parts += [markdown(tables), heading("How to read this"), markdown(words)]
    parts += [heading("Settings"), folded("The study", yaml.safe_dump(study, sort_keys=False))]
    write_page(folder / "study.html", f"Study: {folder.name}", parts, [folder / "study.json"])


_LEGEND = "How to read this:\n\n"


def format_table(summary: dict[str, Any], scores: Mapping[str, Score]) -> str:
    """Return the tables of a study in Markdown: one for each score, and one of costs."""
    variants, baseline = summary["variants"], summary["study"]["baseline"]
    parts = []
    for name, score in scores.items():
        if not any(variant[name] for variant in variants.values()):
            continue
        unit = "points" if score.is_share else "in %"
        head = [
            "variant",
            f"{score.title} ({score.better} is better)",
            f"difference, {unit}",
            "difference",
            "p",
            "runs",
        ]
        rows = [
            [
                variant,
                *score_cells(figures[name], score, variant == baseline, full=True),
                _runs(figures, name, variant == baseline),
            ]
            for variant, figures in variants.items()
        ]
        parts += [markdown_table(head, rows), ""]
    columns = {
        "parameters": ("parameters", ",d"),
        "attention_parameters": ("of attention", ",d"),
        "step_time_ratio": ("step time", ".2f"),
        "finished": ("runs", "d"),
        "diverged": ("diverged", "d"),
        "loss_spikes": ("spikes", ".1f"),
    }
    others = [figures for name, figures in variants.items() if name != baseline] or list(variants.values())
    shown = {
        name: column
        for name, column in columns.items()
        if name in ("finished", "diverged") or any(figures[name] is not None for figures in others)
    }
    rows = [
        [name, *(_number(figures[key], form) for key, (_, form) in shown.items())] for name, figures in variants.items()
    ]
    parts += [markdown_table(["variant", *(title for title, _ in shown.values())], rows), ""]
    return "\n".join([*parts, _LEGEND + _legend(summary, scores)])


def _runs(figures: Mapping[str, Any], score: str, is_baseline: bool) -> str:
    """Return the number of runs of a row, marked where few of them are pairs."""
    of_score = figures[score]
    few = not is_baseline and of_score is not None and 0 < of_score["pairs"] < FEWEST_PAIRS
    return f"{figures['finished'] - figures['diverged']}{f' {FEW_PAIRS_MARK}' if few else ''}"


def _legend(summary: dict[str, Any], scores: Mapping[str, Score]) -> str:
    study, variants = summary["study"], summary["variants"]
    steps, baseline = (study.get("common") or {}).get("max_train_steps"), study["baseline"]
    lines = [
        f"Seeds {', '.join(map(str, study['seeds']))}{f'; {steps:,} steps' if isinstance(steps, int) else ''}. Means ± "
        "half of their 95% interval (t distribution).",
        f"Differences are to `{baseline}` from the same seeds, with their 95% interval in brackets: an interval "
        "without 0 tells the two apart. p is that of a paired t-test, not corrected for the number of variants.",
    ]
    few = [figures[name]["pairs"] for figures in variants.values() for name in scores if figures[name]]
    if any(0 < pairs < FEWEST_PAIRS for pairs in few):
        lines.append(f"{FEW_PAIRS_MARK} fewer than {FEWEST_PAIRS} pairs: such an interval says little.")
    if study.get("trainer") is None:
        lines.append(
            f"The held-out loss is on all held-out images, at most {MOST_HELD_OUT:,}, with {study['loss_draws']} fixed "
            "draws of noise and timestep for each image."
        )
        if study["num_images"]:
            lines.append(f"The Fréchet distance is of {study['num_images']:,} images.")
        lines.append(f"Step time is a ratio to that of `{baseline}`, measured in alternation. {SPIKES}")
    for variant, figures in variants.items():
        lines += [
            f"Not compared: the {scores[score].title} of `{variant}`, which has another {' and '.join(names)}."
            for score, names in figures["not_compared"].items()
        ]
        if figures["other_weights"]:
            options = " and ".join(figures["other_weights"])
            lines.append(
                f"`{variant}` starts from other weights than `{baseline}` where another {options} gives its backbone "
                "other layers: images and noise alone are the same."
            )
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def save_figure(summary: dict[str, Any], scores: Mapping[str, Score], path: Path) -> None:
    """Draw a forest plot of the paired differences to the baseline, a panel for each score: mean and 95% interval of
    each variant, each seed a dot, hollow where there are few. Nothing where there is no difference to show."""
    from matplotlib.figure import Figure

    variants, baseline = summary["variants"], summary["study"]["baseline"]
    names = [name for name in variants if name != baseline]
    compared = {
        name: score
        for name, score in scores.items()
        if any(variants[other][name] and variants[other][name]["difference"] is not None for other in names)
    }
    if not compared:
        return
    figure = Figure(figsize=(2 + 4 * len(compared), 1.6 + 0.36 * len(names)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(compared), sharey=True))
    for axis, (name, score) in zip(axes, compared.items(), strict=True):
        reference, shown = by_seed(summary["runs"], baseline, name), [0.0]
        for row, variant in enumerate(names):
            figures, values = variants[variant][name], by_seed(summary["runs"], variant, name)
            if figures is None or figures["difference"] is None:
                continue
            unit = relative_unit(score, figures)
            few = figures["pairs"] < FEWEST_PAIRS
            colour = "tab:gray" if few else "tab:blue"
            dots = [unit * (values[seed] - reference[seed]) for seed in values if seed in reference]
            bounds = [unit * bound for bound in figures["difference_interval"] or ()]
            axis.plot(bounds, [row] * len(bounds), color=colour, linewidth=2)
            shown += dots if few else dots + bounds
            axis.plot(dots, [row] * len(dots), ".", color="black", markersize=5, zorder=3)
            axis.plot(
                unit * figures["difference"], row, "D", color=colour, markersize=7, fillstyle="none" if few else "full"
            )
        axis.axvline(0, color="black", linewidth=1)
        # Wide intervals of few pairs may leave the picture.
        margin = 0.1 * (max(shown) - min(shown)) or 1.0
        axis.set_xlim(min(shown) - margin, max(shown) + margin)
        better = "← better" if score.better == "lower" else "better →"
        axis.set(
            title=score.title, xlabel=f"difference to {baseline}, {'points' if score.is_share else '%'}   {better}"
        )
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
