"""Variants compared over seeds: paired statistics, and the one table that shows them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from ..page import markdown_table

_CONFIDENCE = 0.95
# From fewer pairs the t distribution has one degree of freedom, or none.
FEWEST_PAIRS = 3
FEW_PAIRS_MARK = "†"


class Score(NamedTuple):
    """A figure that variants are compared by.

    Attributes:
        title (`str`): For tables.
        better (`str`): `lower` or `higher`.
        is_share (`bool`): A number from 0 to 1, shown in percent, with differences in points; other differences are
            shown in percent of the baseline's mean.
        form (`str`, *optional*): How its mean is written; by default with five digits.
    """

    title: str
    better: str = "lower"
    is_share: bool = False
    form: str = ""


KNOWN_SCORES = {
    "held_out_loss": Score("held-out loss", form=".5f"),
    "fid": Score("Fréchet distance", form=".4f"),
    "accuracy": Score("test accuracy", "higher", is_share=True, form=".2f"),
    "loss": Score("test loss", form=".4f"),
}


def by_seed(runs: Sequence[Mapping[str, Any]], variant: str, score: str) -> dict[int, float]:
    """Return the score of each seed of a variant; runs without it, such as those that diverged, are left out."""
    return {
        run["seed"] if "seed" in run else run["options"]["seed"]: run[score]
        for run in runs
        if run["variant"] == variant and run.get(score) is not None
    }


def compare(scores: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, Any] | None:
    """Return statistics of a score over seeds, and of its difference to the baseline from the same seeds.

    Args:
        scores, baseline (`dict`): Seed and score.

    Returns:
        `dict`: `mean` and its 95% `interval` by Student's t distribution; `difference`, the mean of the paired
        differences, with its `difference_interval` and the `p_value` of a paired, two-sided t-test; `baseline_mean`,
        of the seeds of the baseline; `pairs`. `None` for intervals and tests from fewer than two seeds and from
        differences that are all equal, and in all if there are no scores.
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
        "baseline_mean": statistics.mean(baseline.values()) if baseline else None,
        "pairs": len(differences),
    }


def _interval(values: Sequence[float]) -> list[float] | None:
    if len(set(values)) < 2:
        return None
    return [float(bound) for bound in stats.ttest_1samp(values, 0.0).confidence_interval(_CONFIDENCE)]


def relative_unit(score: Score, figures: Mapping[str, Any]) -> float:
    """Return the factor that shows a difference in points, or in percent of the baseline's mean."""
    return 100.0 if score.is_share else 100 / (abs(figures["baseline_mean"]) or math.nan)


def score_cells(figures: Mapping[str, Any] | None, score: Score, is_baseline: bool, full: bool) -> list[str]:
    """Return the cells of a score in a table: its mean, the difference to the baseline and the p-value.

    Args:
        figures (`dict`, *optional*): What `compare` returned.
        score (`Score`): Which score.
        is_baseline (`bool`): Whether the row is the baseline's own, which has no difference.
        full (`bool`): Whether the mean has its interval, and the difference is given in the score's own unit as well.
    """
    missing = "-" if full else ""
    if figures is None:
        return ["-", *([missing] * (3 if full else 2))]
    scale = 100 if score.is_share else 1
    mean, interval = scale * figures["mean"], figures["interval"]
    digits = max(0, 4 - math.floor(math.log10(abs(mean)))) if mean else 4
    form = score.form or f".{digits}f"
    shown = format(mean, form)
    if full and interval:
        shown += f" ± {scale * (interval[1] - interval[0]) / 2:{form}}"
    if is_baseline or figures["difference"] is None:
        return [shown, *([missing] * (3 if full else 2))]
    unit, sign = relative_unit(score, figures), "" if score.is_share else "%"
    bounds = figures["difference_interval"]
    cells = [shown, _with_interval(unit * figures["difference"], bounds, unit, "+.2f", sign)]
    if full:
        cells.append(_with_interval(scale * figures["difference"], bounds, scale, f"+{form}", ""))
    return [*cells, missing if figures["p_value"] is None else f"{figures['p_value']:.3f}"]


def _with_interval(value: float, bounds: Sequence[float] | None, unit: float, form: str, sign: str) -> str:
    shown = f"{value:{form}}{sign}"
    return (
        shown
        if bounds is None
        else "{} [{:{form}}, {:{form}}]".format(shown, *(unit * bound for bound in bounds), form=form)
    )


def compare_runs(runs: Sequence[Mapping[str, Any]], variants: Sequence[str], scores: Sequence[str]) -> str:
    """Return the table of variants over seeds, each compared with the first.

    Args:
        runs (sequence of `dict`): Results with `variant`, `seed` and the scores.
        variants (sequence of `str`): The rows.
        scores (sequence of `str`): Names of the scores.
    """
    known = {name: KNOWN_SCORES.get(name, Score(name.replace("_", " "))) for name in scores}
    sizes = {run["variant"]: run["attention_parameters"] for run in runs if "attention_parameters" in run}
    rows = []
    for variant in variants:
        row = [variant, *([f"{sizes[variant]:,}" if variant in sizes else "-"] if sizes else [])]
        for name, score in known.items():
            is_baseline = variant == variants[0]
            baseline = {} if is_baseline else by_seed(runs, variants[0], name)
            row += score_cells(compare(by_seed(runs, variant, name), baseline), score, is_baseline, full=False)
        rows.append([*row, str(sum(run["variant"] == variant for run in runs))])
    columns = [column for score in known.values() for column in (score.title, "difference", "p")]
    return markdown_table(["variant", *(["attention parameters"] if sizes else []), *columns, "runs"], rows)
