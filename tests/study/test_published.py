"""The tables of docs/study.md are those of the raw figures beside it: each number is computed again."""

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
STUDY = re.compile(r"^    .*?(?:dia study|compare_classifiers\.py|(places)\.py) studies/(\S+)\.yaml")
TABLE = re.compile(r"^    python tools/published_table\.py docs/study/(\S+)\.json")
SCORES = {
    "held-out loss": "held_out_loss",
    "Fréchet distance": "fid",
    "test accuracy": "accuracy",
    "test loss": "loss",
}


def published():
    """Each table: the file of its raw figures, its columns and its rows."""
    waiting, lines = [], iter((DOCS / "study.md").read_text().splitlines())
    for line in lines:
        study, table = STUDY.match(line), TABLE.match(line)
        name = table[1] if table else study and (study[1] or study[2].replace("/", "_"))
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
