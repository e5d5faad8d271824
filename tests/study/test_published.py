"""The tables of the study and of the README are those of the raw figures in docs/study/: each is computed again."""

import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
from scipy import stats

DOCS = Path(__file__).parents[2] / "docs"
# The command above a table: of the study, or of the table.
STUDY = re.compile(r"^    .*?dia study studies/(\S+)\.yaml")
TABLE = re.compile(r"^    python tools/published_table\.py docs/study/(\S+)\.json")
SCORES = {"held-out loss": "held_out_loss", "Fréchet distance": "fid", "test accuracy": "accuracy", "test loss": "loss"}


def published():
    """Each table: the file of its raw figures, its columns and its rows."""
    waiting, lines = [], iter((DOCS / "study_details.md").read_text().splitlines())
    for line in lines:
        study, table = STUDY.match(line), TABLE.match(line)
        name = table[1] if table else study and study[1].replace("/", "_")
        if name and name not in waiting[-1:]:
            waiting.append(name)
        if line.startswith("| variant |"):
            columns = [cell.strip() for cell in line.strip("|").split("|")]
            next(lines)
            rows = []
            while (line := next(lines, "")).startswith("|"):
                rows.append([cell.strip() for cell in line.strip("|").split("|")])
            yield pytest.param(waiting.pop(0), columns, rows, id=rows[1][0] + " of " + str(len(rows)))


def seeds_of(runs, variant, score):
    found = [run for run in runs if run["variant"] == variant and run.get(score) is not None]
    return {run["seed"] if "seed" in run else run["options"]["seed"]: run[score] for run in found}


def number(text):
    return float(text.replace(",", "").removesuffix("%").split()[0])


def assert_shown(text, value):
    """Whether a number is this value, rounded to the places that are shown."""
    places = len(text.removesuffix("%").partition(".")[2])
    assert number(text) == pytest.approx(value, abs=0.5001 * 10**-places), text


@pytest.mark.parametrize(("name", "columns", "rows"), published())
def test_a_table_is_that_of_its_raw_figures(name, columns, rows):
    raw = json.loads((DOCS / "study" / f"{name}.json").read_text())
    runs = raw if isinstance(raw, list) else raw["runs"]
    first, compared = rows[0][0], 0
    for row in rows:
        score = None
        for column, cell in zip(columns, row, strict=True):
            if column in SCORES:
                score = SCORES[column]
                mine, baseline = seeds_of(runs, row[0], score), seeds_of(runs, first, score)
                # Accuracies are shares, shown in percent, and their differences in points of it.
                unit = 100 if score == "accuracy" else 1
                scale = 100 if score == "accuracy" else 100 / (statistics.mean(baseline.values()) or 1)
            if cell in ("", "-"):
                continue
            if column == "attention parameters":
                assert number(cell) == next(
                    run[c] for run in runs for c in ("attention_parameters",) if row[0] == run["variant"] and c in run
                )
            elif column in SCORES:
                assert_shown(cell, unit * statistics.mean(mine.values()))
                compared += 1
            elif column == "difference":
                pairs = [seed for seed in mine if seed in baseline]
                differences = [scale * (mine[seed] - baseline[seed]) for seed in pairs]
                shown = re.findall(r"[+-][\d.]+%?", cell)
                assert_shown(shown[0], statistics.mean(differences))
                if len(shown) == 3:
                    half = stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(differences) / len(pairs) ** 0.5
                    assert_shown(shown[1], statistics.mean(differences) - half)
                    assert_shown(shown[2], statistics.mean(differences) + half)
            elif column == "p":
                result = stats.ttest_rel(*([scores[seed] for seed in pairs] for scores in (mine, baseline)))
                assert_shown(cell, result.pvalue)
            elif column == "runs":
                assert number(cell) == len(mine)
    assert compared >= 2


def effects():
    """The main effects that `tools/effects.py` names, with what is compared on the same seeds."""
    for group in runpy.run_path(str(DOCS.parent / "tools" / "effects.py"))["EFFECTS"].values():
        yield from group


def differences(effect):
    """The paired differences of an effect, in percent of the baseline's mean, or in points of accuracy."""
    raw = json.loads((DOCS / "study" / f"{effect.file}.json").read_text())
    runs = raw if isinstance(raw, list) else raw["runs"]
    score = "accuracy" if effect.file.startswith("classification") else "held_out_loss"
    mine, baseline = (seeds_of(runs, name, score) for name in (effect.variant, effect.baseline))
    scale = 100 if score == "accuracy" else 100 / statistics.mean(baseline.values())
    return [scale * (mine[seed] - baseline[seed]) for seed in mine if seed in baseline]


@pytest.mark.parametrize("effect", effects(), ids=lambda effect: f"{effect.what}, {effect.where}, {effect.file}")
def test_a_main_effect_is_that_of_its_raw_figures(effect):
    (line,) = re.findall(
        rf"^\| {effect.what} \| {effect.where} \| (.*) \| (\d) \|$", (DOCS / "study.md").read_text(), re.M
    )
    paired = differences(effect)
    half = stats.t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / len(paired) ** 0.5
    mean, low, high = re.findall(r"[+-][\d.]+", line[0])
    for text, value in ((mean, 0.0), (low, -half), (high, half)):
        assert_shown(text, statistics.mean(paired) + value)
    assert int(line[1]) == len(paired)


def test_the_readme_has_the_figures_of_the_study():
    """Its rows are main effects, with the sign turned where less is better."""
    study = {}
    for line in (DOCS / "study.md").read_text().splitlines():
        if len(figures := re.findall(r"[+-]\d+\.\d+", line)) == 3:
            study[line.split(" | ")[0].strip("| "), line.split(" | ")[1]] = [float(figure) for figure in figures]
    rows = {
        "default UNet, CIFAR-10 at 16x16": ("DIA", "default UNet, CIFAR-10 16x16"),
        "default UNet, digits at 8x8": ("DIA", "default UNet, digits"),
        "UNet with scale-shift, CIFAR-10 at 16x16": ("DIA", "scale-shift, CIFAR-10 16x16"),
        "ResNet-32, CIFAR-10, 3 epochs": ("DIA as in the paper", "ResNet-32"),
        "ResNet-56, the same, two seeds": ("DIA as in the paper", "ResNet-56"),
    }
    readme = (DOCS.parent / "README.md").read_text()
    for where, effect in rows.items():
        gain = re.search(rf"^\| {where} \| (.*?) \|", readme, re.M)[1]
        mean, low, high = study[effect]
        expected = [mean, low, high] if "points" in gain else [-mean, -high, -low]
        shown = re.findall(r"-?\d+\.\d+", gain)
        for text, value in zip(shown, expected, strict=True):
            assert_shown(text, value)


def test_the_tool_prints_tables_in_this_form(monkeypatch, capsys):
    figures, variants = str(DOCS / "study" / "digits_slope.json"), ["plain", "se-block-slope-16"]
    monkeypatch.setattr(sys, "argv", ["published_table.py", figures, "--variants", *variants])
    runpy.run_path(str(DOCS.parent / "tools" / "published_table.py"), run_name="__main__")
    header, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == variants
    test_a_table_is_that_of_its_raw_figures("digits_slope", header, rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.json"], "there is no file 'nowhere.json'."),
        (
            [str(DOCS / "study" / "digits_slope.json"), "--variants", "plain", "nobody"],
            "has no variant 'nobody', only: ",
        ),
        (
            [str(DOCS / "study" / "digits_slope.json"), "--scores", "accuracy"],
            "has no accuracy: choose other --scores.",
        ),
    ],
)
def test_what_the_tool_cannot_show_is_refused(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["published_table.py", *arguments])
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(DOCS.parent / "tools" / "published_table.py"), run_name="__main__")
    assert refusal.value.code == 2
    assert words in capsys.readouterr().err


def test_a_variant_that_diverged_is_shown_without_figures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["published_table.py", str(DOCS / "study" / "cifar10_32_rate.json")])
    runpy.run_path(str(DOCS.parent / "tools" / "published_table.py"), run_name="__main__")
    assert "| rate-0.004 | - | - |  |  | 1 |" in capsys.readouterr().out
