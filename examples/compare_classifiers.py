"""Variants of an image classifier over seeds, as a YAML file lists them: `image_classification.py` for each.

    python examples/compare_classifiers.py studies/classification/cifar10.yaml --jobs 2

`seeds`, `common` options, a `baseline` and `variants`, with the options of `image_classification.py`. What was
stopped goes on with the runs that have no result yet. The table (`study.md`) and the figures of all runs (`study.json`)
grow with each run; differences are paired by seed.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

import image_classification
from dia_diffusion.errors import UsageError
from dia_diffusion.files import replace_text, write_json
from dia_diffusion.options.training import read_yaml
from dia_diffusion.process.signals import end_with_parent
from dia_diffusion.study.comparison import compare
from helpers import flags


def load(path: Path) -> dict:
    study = read_yaml(path)
    if not isinstance(study, dict) or not {"baseline", "seeds", "variants"} <= study.keys():
        raise UsageError(f"'{path}' must have the keys baseline, seeds and variants.")
    if not isinstance(study["variants"], dict) or study["baseline"] not in study["variants"]:
        raise UsageError(
            f"the baseline '{study['baseline']}' must be one of the variants, each a name with its options."
        )
    if not isinstance(study["seeds"], list) or not study["seeds"]:
        raise UsageError(f"seeds must be a list of numbers, for example [0, 1, 2], but is {study['seeds']}.")
    return study


def command_line(study: dict, variant: str, seed: int, folder: Path) -> list[str]:
    """The arguments of `image_classification.py` for a run."""
    options = (study.get("common") or {}) | (study["variants"][variant] or {}) | {"seed": seed, "output_dir": folder}
    words = []
    for name, value in options.items():
        words += [f"--{name if value is not False else f'no-{name}'}"]
        words += [] if isinstance(value, bool) else [str(value)]
    return words


def is_done(words: list[str], folder: Path) -> bool:
    """Whether a run has a result already.

    Raises:
        UsageError: if it was trained with other options.
    """
    record = folder / "command.json"
    if record.exists() and json.loads(record.read_text()) != words:
        raise UsageError(f"'{folder}' was trained with other options: remove it, or choose another --output_dir.")
    return record.exists()


def train(words: list[str], folder: Path) -> str | None:
    """Does a run; returns what is to be said if it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            status = image_classification.main(words)
        except SystemExit as refusal:
            status = refusal.code
    if status:
        return f"'{folder}': {(folder / 'log.txt').read_text().splitlines()[-1]}"
    write_json(folder / "command.json", words)
    return None


def summarise(study: dict, folder: Path) -> None:
    """Writes the table and the figures of the runs that are finished."""
    results = {name: {} for name in study["variants"]}
    for name, of_variant in results.items():
        for seed in study["seeds"]:
            path = folder / name / f"seed-{seed}" / "result.json"
            if path.exists():
                of_variant[seed] = json.loads(path.read_text())
    rows = [
        "| variant | parameters | of attention | test accuracy | difference | p | test loss | difference | p | runs |"
    ]
    rows.append("| --- |" + " ---: |" * 9)
    for name, of_variant in results.items():
        first = next(iter(of_variant.values()), None)
        if first is None:
            continue
        cells = [name, f"{first['parameters']:,}", f"{first['attention_parameters']:,}"]
        for score, form in (("accuracy", ".2%"), ("loss", ".4f")):
            values, baseline = (
                {seed: result[score] for seed, result in results[which].items()} for which in (name, study["baseline"])
            )
            cells += score_cells(compare(values, baseline if name != study["baseline"] else {}), form)
        rows.append("| " + " | ".join([*cells, str(len(of_variant))]) + " |")
    replace_text(folder / "study.md", "\n".join(rows) + "\n")
    runs = [result | {"variant": name} for name, of_variant in results.items() for result in of_variant.values()]
    write_json(folder / "study.json", {"study": study, "runs": runs})


def score_cells(figures: dict, form: str) -> list[str]:
    mean = format(figures["mean"], form)
    if figures["difference"] is None:
        return [mean, "", ""]
    difference = format(figures["difference"], f"+{form}")
    if figures["difference_interval"]:
        difference += " [{}, {}]".format(*(format(bound, f"+{form}") for bound in figures["difference_interval"]))
    return [mean, difference, "" if figures["p_value"] is None else f"{figures['p_value']:.3f}"]


def do(study: dict, root: Path, total: int, waiting: list[tuple[list[str], Path]], jobs: int) -> list[str]:
    """Does the runs that have no result yet; returns what is to be said of those that failed."""
    failures = []
    with (
        # Workers that outlived this process would go on with what another one does.
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool,
        tqdm(total=total, initial=total - len(waiting), unit="run") as bar,
    ):
        for ended in as_completed([pool.submit(train, *run) for run in waiting]):
            failures += [ended.result()] if ended.result() else []
            summarise(study, root)
            bar.update()
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--jobs", type=flags.count, default=1, help="runs side by side; OMP_NUM_THREADS says of how many threads"
    )
    parser.add_argument("--output_dir", type=flags.folder, help="runs/NAME OF THE FILE by default")
    options = parser.parse_args(arguments)
    try:
        study = load(options.study)
        root = options.output_dir or Path("runs") / options.study.stem
        # Seed by seed, so that each finished seed is a comparison of all variants.
        places = [(root / name / f"seed-{seed}", name, seed) for seed in study["seeds"] for name in study["variants"]]
        runs = [(command_line(study, name, seed, folder), folder) for folder, name, seed in places]
        waiting = [run for run in runs if not is_done(*run)]
    except UsageError as error:
        parser.error(str(error))
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            failures = do(study, root, len(runs), waiting, options.jobs)
    except Timeout:
        parser.error(f"another process is at work in '{root}': wait for it, or stop it.")
    summarise(study, root)
    print((root / "study.md").read_text(), *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
