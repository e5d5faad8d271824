"""Print a table of docs/study_details.md from the raw figures of a study, in percent of the first line.

    python tools/published_table.py docs/study/cifar10.json [--scores held_out_loss fid]

Reads the `study.json` that `dia study` leaves. Accuracies are in percent, and their differences in points.
"""

import argparse
import json
from pathlib import Path

from dia_diffusion.study.comparison import KNOWN_SCORES, compare_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--scores", nargs="+", choices=KNOWN_SCORES, default=["held_out_loss"])
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
    print(compare_runs(runs, variants, options.scores))


if __name__ == "__main__":
    main()
