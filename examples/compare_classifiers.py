"""Variants of an image classifier over seeds, as a YAML file lists them: `image_classification.py` for each.

    python examples/compare_classifiers.py studies/cifar10_classification.yaml --jobs 2

`seeds`, `common` options, a `baseline` and `variants`, with the options of `image_classification.py`. What was
stopped goes on with the runs that have no result yet. The table (`study.md`) and the figures of all runs (`study.json`)
grow with each run; differences are paired by seed.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dia_diffusion.errors import UsageError
from dia_diffusion.files import replace_text
from dia_diffusion.study import compare
from dia_diffusion.training import read_yaml

PROGRAM = Path(__file__).with_name("image_classification.py")


def command(study: dict, variant: str, seed: int, folder: Path) -> list[str]:
    options = (study.get("common") or {}) | (study["variants"][variant] or {}) | {"seed": seed, "output_dir": folder}
    words = []
    for name, value in options.items():
        words += [f"--{name if value is not False else f'no-{name}'}"]
        words += [] if isinstance(value, bool) else [str(value)]
    return [sys.executable, str(PROGRAM), *words]


def finish(words: list[str], folder: Path) -> str | None:
    """Does a run unless it has a result; returns what is to be said if it failed."""
    record = folder / "command.json"
    if record.exists() and json.loads(record.read_text()) != words[2:]:
        return f"'{folder}' was trained with other options: remove it, or choose another --output_dir."
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(record, json.dumps(words[2:]))
    if not (folder / "result.json").exists():
        with (folder / "log.txt").open("w") as log:
            status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode
        if status:
            return f"'{folder}': status {status}, see log.txt there."
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
    replace_text(folder / "study.json", json.dumps({"study": study, "runs": runs}, indent=1))


def score_cells(figures: dict, form: str) -> list[str]:
    mean = format(figures["mean"], form)
    if figures["difference"] is None:
        return [mean, "", ""]
    difference = format(figures["difference"], f"+{form}")
    if figures["difference_interval"]:
        difference += " [{}, {}]".format(*(format(bound, f"+{form}") for bound in figures["difference_interval"]))
    return [mean, difference, "" if figures["p_value"] is None else f"{figures['p_value']:.3f}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side; OMP_NUM_THREADS says of how many threads"
    )
    parser.add_argument("--output_dir", type=Path, help="runs/NAME OF THE FILE by default")
    options = parser.parse_args(arguments)
    try:
        study = read_yaml(options.study)
    except UsageError as error:
        parser.error(str(error))
    if not isinstance(study, dict) or not {"baseline", "seeds", "variants"} <= study.keys():
        parser.error(f"'{options.study}' must have the keys baseline, seeds and variants.")
    if study["baseline"] not in study["variants"]:
        parser.error(f"the baseline '{study['baseline']}' must be one of the variants.")
    root = options.output_dir or Path("runs") / options.study.stem
    # Seed by seed, so that each finished seed is a comparison of all variants.
    folders = {
        root / variant / f"seed-{seed}": (variant, seed) for seed in study["seeds"] for variant in study["variants"]
    }
    failures = []
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(folders), unit="run") as bar:
        for failure in pool.map(lambda each: finish(command(study, *each[1], each[0]), each[0]), folders.items()):
            failures += [failure] if failure else []
            summarise(study, root)
            bar.update()
    print((root / "study.md").read_text(), *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
