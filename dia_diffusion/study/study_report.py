"""What a study says: statistics over seeds, a table, a picture."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from ..files import replace_text, write_json
from ..objectives import OBJECTIVES
from ..page import folded, heading, markdown, picture, write_page
from .description import Study, StudyRun
from .single_run import MOST_HELD_OUT, SPIKES, read_result, read_timing

SCORES = {"held_out_loss": "held-out loss", "fid": "Fréchet distance"}
# What must be the same for a score to be compared: the images, and for a loss what it measures. Losses of zero models
# are 1.0 for noise, 0.8 for velocities and 20.2 for samples.
_IMAGES = (
    "dataset_name dataset_config_name train_data_dir image_column resolution channels center_crop "
    "preserve_input_precision on_bad_image"
).split()
_OBJECTIVE = ["objective", *(name for kind in OBJECTIVES.values() for name in kind.option_names())]
_MUST_AGREE = {"held_out_loss": _IMAGES + _OBJECTIVE, "fid": _IMAGES}
_CONFIDENCE = 0.95


def summarise(study: Study, runs: Sequence[StudyRun]) -> dict[str, Any]:
    """The figures of the finished runs of a study, JSON-ready.

    Returns:
        `dict`: `study`: its description. `runs`: the results as they are. `variants`: for each variant `parameters`,
        `attention_parameters`, `step_time_ratio`, `finished`, `diverged` (numbers of runs), `loss_spikes` (a run, on
        average), `not_compared` (for each score that is another quantity than the baseline's, the options that make it
        so), and for each score the figures of `compare`. What there is no figure for yet is `None`.
    """
    results = [result for run in runs if (result := read_result(run)) is not None]
    ratios = {run.variant: read_timing(run) for run in reversed(runs)} | {study.baseline: 1.0}
    by_variant = {name: [result for result in results if result["variant"] == name] for name in study.variants}
    apart = {name: _differences(study, name) for name in study.variants}
    variants = {}
    for name, of_variant in by_variant.items():
        trained = [result for result in of_variant if "diverged_at_step" not in result]
        scores = {
            score: compare(
                _by_seed(of_variant, score), {} if apart[name][score] else _by_seed(by_variant[study.baseline], score)
            )
            for score in SCORES
        }
        variants[name] = {
            "parameters": trained[0]["parameters"] if trained else None,
            "attention_parameters": trained[0]["attention_parameters"] if trained else None,
            "step_time_ratio": ratios[name],
            "finished": len(of_variant),
            "diverged": len(of_variant) - len(trained),
            "loss_spikes": statistics.mean(result["loss_spikes"] for result in of_variant) if of_variant else None,
            "not_compared": {score: names for score, names in apart[name].items() if names},
            **scores,
        }
    return {"study": study.description(), "variants": variants, "runs": results}


def _differences(study: Study, variant: str) -> dict[str, list[str]]:
    """For each score the options that make it another quantity than the baseline's."""
    mine, other = (study.config(name, study.seeds[0], Path()).public_dict() for name in (variant, study.baseline))
    return {score: [name for name in names if mine[name] != other[name]] for score, names in _MUST_AGREE.items()}


def _by_seed(results: Sequence[dict[str, Any]], score: str) -> dict[int, float]:
    return {result["seed"]: result[score] for result in results if score in result}


def compare(scores: dict[int, float], baseline: dict[int, float]) -> dict[str, Any] | None:
    """Statistics of a score over seeds, and of its difference to the baseline from the same seeds.

    Args:
        scores, baseline (`dict`): Seed and score.

    Returns:
        `dict`: `mean` and its 95% `interval` by Student's t distribution; `difference`, the mean of the paired
        differences, with its `difference_interval` and the `p_value` of a paired, two-sided t-test. `None` for
        intervals and tests from fewer than two seeds and from differences that are all equal, and in all if there are
        no scores.
    """
    if not scores:
        return None
    differences = [scores[seed] - baseline[seed] for seed in scores if seed in baseline]
    varied = len(set(differences)) > 1
    return {
        "mean": statistics.mean(scores.values()),
        "interval": _interval(list(scores.values())),
        "difference": statistics.mean(differences) if differences else None,
        "difference_interval": _interval(differences),
        "p_value": float(stats.ttest_1samp(differences, 0.0).pvalue) if varied else None,
        "pairs": len(differences),
    }


def _interval(values: Sequence[float]) -> list[float] | None:
    if len(set(values)) < 2:
        return None
    return [float(bound) for bound in stats.ttest_1samp(values, 0.0).confidence_interval(_CONFIDENCE)]


def write_report(summary: dict[str, Any], folder: Path) -> None:
    """Writes `study.json`, `study.md`, `study.png`, and all of them as a page, `study.html`."""
    table, figure = format_table(summary), folder / "study.png"
    write_json(folder / "study.json", summary)
    replace_text(folder / "study.md", table)
    save_figure(summary, figure)
    parts = [markdown(table)]
    if figure.exists():
        title = "Differences to the baseline from the same seeds"
        parts += [heading(title), picture(figure, title)]
    parts += [heading("Settings"), folded("The study", yaml.safe_dump(summary["study"], sort_keys=False))]
    write_page(folder / "study.html", f"Study: {folder.name}", parts, [folder / "study.json"])


def format_table(summary: dict[str, Any]) -> str:
    """The table of a study, in Markdown."""
    scores = [score for score in SCORES if any(variant[score] for variant in summary["variants"].values())]
    head = ["variant", "parameters", "of attention", "step time"]
    for score in scores:
        head += [SCORES[score], "difference", "p"]
    head += ["runs", "diverged", "spikes"]
    rows = []
    for name, variant in summary["variants"].items():
        row = [name, _number(variant["parameters"], ",d"), _number(variant["attention_parameters"], ",d")]
        row.append(_number(variant["step_time_ratio"], ".2f"))
        for score in scores:
            row += _score_cells(variant[score], name == summary["study"]["baseline"])
        rows.append([*row, str(variant["finished"]), str(variant["diverged"]), _number(variant["loss_spikes"], ".1f")])
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join([*lines, "", _legend(summary["study"]), *_not_compared(summary["variants"])])


def _legend(study: dict[str, Any]) -> str:
    seeds, steps = ", ".join(map(str, study["seeds"])), study["common"].get("max_train_steps")
    lines = [
        f"Seeds {seeds}; {steps:,} steps. Means ± half of their 95% interval (t distribution).",
        f"The held-out loss is on all held-out images, at most {MOST_HELD_OUT:,}, with {study['loss_draws']} fixed "
        "draws of noise and timestep for each image.",
        f"The Fréchet distance is of {study['num_images']:,} images." if study["num_images"] else "",
        f"Differences are to `{study['baseline']}` from the same seeds, with their 95% interval; p by a paired t-test, "
        "not corrected for the number of variants.",
        f"Step time is a ratio to that of `{study['baseline']}`, measured in alternation. {SPIKES}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _not_compared(variants: dict[str, Any]) -> list[str]:
    lines = [
        f"Not compared: the {SCORES[score]} of `{variant}`, which has another {' and '.join(names)}."
        for variant, figures in variants.items()
        for score, names in figures["not_compared"].items()
    ]
    return [*lines, ""] if lines else []


def _score_cells(figures: dict[str, Any] | None, is_baseline: bool) -> list[str]:
    if figures is None:
        return ["-"] * 3
    mean, interval = figures["mean"], figures["interval"]
    digits = max(0, 4 - math.floor(math.log10(abs(mean)))) if mean else 4
    half = f" ± {(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
    score = f"{mean:.{digits}f}{half}"
    if is_baseline or figures["difference"] is None:
        return [score, "-", "-"]
    difference = f"{figures['difference']:+.{digits}f}"
    if figures["difference_interval"]:
        low, high = figures["difference_interval"]
        difference += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return [score, difference, _number(figures["p_value"], ".3f")]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def save_figure(summary: dict[str, Any], path: Path) -> None:
    """A panel for each score: the paired differences to the baseline, each seed a dot, with mean and 95% interval."""
    from matplotlib.figure import Figure

    baseline = summary["study"]["baseline"]
    names = [name for name in summary["variants"] if name != baseline]
    scores = [score for score in SCORES if summary["variants"][baseline][score]]
    if not names or not scores:
        return
    figure = Figure(figsize=(2 + 4.5 * len(scores), 1.4 + 0.36 * len(names)), layout="constrained")
    for axis, score in zip(np.atleast_1d(figure.subplots(1, len(scores), sharey=True)), scores, strict=True):
        reference = _by_seed([run for run in summary["runs"] if run["variant"] == baseline], score)
        for row, name in enumerate(names):
            values = _by_seed([run for run in summary["runs"] if run["variant"] == name], score)
            figures = summary["variants"][name][score]
            if figures is None or figures["difference"] is None:
                continue
            dots = [values[seed] - reference[seed] for seed in values if seed in reference]
            axis.plot(dots, [row] * len(dots), "o", color="black", fillstyle="none", markersize=4, zorder=3)
            axis.plot(figures["difference"], row, "D", color="tab:blue", markersize=6)
            if figures["difference_interval"]:
                axis.plot(figures["difference_interval"], [row, row], color="tab:blue", linewidth=2)
        axis.axvline(0, color="black", linewidth=1)
        axis.set(xlabel=f"{SCORES[score]}, difference to {baseline}", yticks=range(len(names)), yticklabels=names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        # Differences are small numbers with many digits, which would run into each other.
        axis.ticklabel_format(axis="x", scilimits=(-2, 3), useMathText=True)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
