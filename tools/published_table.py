"""A table of docs/study_details.md from the raw figures of a study, with differences in percent of the first line.

    python tools/published_table.py docs/study/cifar10.json [--scores held_out_loss fid]

It reads what `dia study`, `examples/compare_classifiers.py` and `studies/places.py` leave. Accuracies are in percent,
and their differences in points.
"""

import argparse
import json
import statistics
from pathlib import Path

from dia_diffusion.study.study_report import compare

TITLES = {
    "held_out_loss": "held-out loss",
    "fid": "Fréchet distance",
    "accuracy": "test accuracy",
    "loss": "test loss",
}
FORMS = {"held_out_loss": ".5f", "fid": ".4f", "accuracy": ".2f", "loss": ".4f"}


def seeds_of(runs: list[dict], variant: str, score: str) -> dict[int, float]:
    unit = 100 if score == "accuracy" else 1
    return {
        run["seed"] if "seed" in run else run["options"]["seed"]: unit * run[score]
        for run in runs
        if run["variant"] == variant and score in run
    }


def cells(scores: dict[int, float], baseline: dict[int, float], score: str, first: bool) -> list[str]:
    figures = compare(scores, {} if first else baseline)
    if figures is None:
        return ["-", "", ""]
    mean = format(figures["mean"], FORMS[score])
    if figures["difference"] is None:
        return [mean, "", ""]
    percent, sign = (1, "") if score == "accuracy" else (100 / statistics.mean(baseline.values()), "%")
    difference = f"{percent * figures['difference']:+.2f}{sign}"
    if figures["difference_interval"] is None:
        return [mean, difference, ""]
    low, high = (f"{percent * bound:+.2f}" for bound in figures["difference_interval"])
    return [mean, f"{difference} [{low}, {high}]", f"{figures['p_value']:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--scores", nargs="+", choices=TITLES, default=["held_out_loss"])
    parser.add_argument("--variants", nargs="+", help="which, by default all; the first is compared with")
    options = parser.parse_args()
    if not options.figures.is_file():
        parser.error(f"there is no file '{options.figures}'.")
    raw = json.loads(options.figures.read_text())
    runs = raw if isinstance(raw, list) else raw["runs"]
    known = list(dict.fromkeys(run["variant"] for run in runs))
    variants = options.variants or known
    if missing := [name for name in variants if name not in known]:
        parser.error(f"'{options.figures}' has no variant '{missing[0]}', only: {', '.join(known)}.")
    if absent := [score for score in options.scores if not any(score in run for run in runs)]:
        parser.error(f"'{options.figures}' has no {absent[0]}: choose other --scores.")
    columns = [column for score in options.scores for column in (TITLES[score], "difference", "p")]
    print("| " + " | ".join(["variant", "attention parameters", *columns, "runs"]) + " |")
    print("| --- " + "| ---: " * (len(columns) + 2) + "|")
    for variant in variants:
        mine = [run for run in runs if run["variant"] == variant]
        # A run that diverged has no figures.
        of_attention = [run["attention_parameters"] for run in mine if "attention_parameters" in run]
        row = [variant, f"{of_attention[0]:,}" if of_attention else "-"]
        for score in options.scores:
            first = seeds_of(runs, variants[0], score)
            row += cells(seeds_of(runs, variant, score), first, score, variant == variants[0])
        print("| " + " | ".join([*row, str(len(mine))]) + " |")


if __name__ == "__main__":
    main()
