"""A study of anything: a Python file says how its runs are trained."""

import json

import numpy as np
import pytest
import yaml

from browser import open_browser
from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.study.description import load_study

TRAINER = """
import beside
from dia_diffusion.errors import UsageError

SCORES = {"accuracy": "higher", "some_error": "lower"}


def check(options):
    if options["width"] < 0:
        raise UsageError(f"width must be at least 0, but is {options['width']}.")


def train(options):
    assert options["output_dir"].endswith(f"seed-{options['seed']}")
    error = float("nan") if options["width"] == 13 else 1 / (1 + options["width"]) + beside.NOISE[options["seed"]]
    return {"accuracy": 0.5 + options["width"] / 100, "some_error": error, "note": "as it is", "parameters": 5}
"""
VARIANTS = {"plain": {"width": 1}, "wide": {"width": 3}}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "beside.py").write_text("NOISE = [0.0, 0.01, 0.03]\n")

    def write(**changes):
        study = {"trainer": "trainer.py", "baseline": "plain", "seeds": [0, 1, 2], "variants": VARIANTS} | changes
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({name: value for name, value in study.items() if value}))
        return tmp_path / "study.yaml"

    return write


def run(path, *options):
    return main(["study", str(path), "--output_dir", str(path.parent / "out"), "--jobs", "1", *options])


def test_figures_are_compared_over_seeds(write, tmp_path, capfd):
    assert run(write()) == 0
    said = capfd.readouterr().out
    summary = json.loads((tmp_path / "out" / "study.json").read_text(), parse_constant=pytest.fail)
    assert summary["scores"] == {"accuracy": "higher", "some_error": "lower"}
    assert summary["study"] == yaml.safe_load((tmp_path / "study.yaml").read_text()) | {"common": {}}
    wide = summary["variants"]["wide"]
    assert wide["some_error"]["difference"] == pytest.approx(-0.25)
    assert wide["accuracy"]["mean"] == pytest.approx(0.53)
    assert summary["runs"][0]["note"] == "as it is"
    # Shares in points, others in percent of the baseline's mean, and both in their own unit too.
    mean = np.mean([0.5, 0.51, 0.53])
    assert "| wide | 53.00 | +2.00 | +2.00 | - | 3 |" in said
    assert f"| {-0.25 / mean:+.2%} | -0.250" in said.replace(" [-0.2500, -0.2500]", "")
    assert "step time" not in said
    assert "| wide | 5 | 3 | 0 |" in said
    page = (tmp_path / "out" / "study.html").read_text()
    assert "test accuracy (higher is better)" in page
    # Done once.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    assert len(before) == 6
    assert run(write()) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    assert run(write(variants=VARIANTS | {"wide": {"width": 4}})) == 2
    assert "was trained with other options: remove it" in capfd.readouterr().err


def test_a_score_that_is_not_finite_is_a_run_that_diverged(write, tmp_path):
    assert run(write(variants=VARIANTS | {"odd": {"width": 13}})) == 0
    summary = json.loads((tmp_path / "out" / "study.json").read_text())
    assert summary["variants"]["odd"]["diverged"] == 3
    assert summary["variants"]["odd"]["accuracy"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": "nowhere.py"}, "there is no trainer '.*nowhere.py'"),
        ({"trainer": "beside.py"}, r"beside.py' must define train\(options\), which returns figures, and SCORES"),
        ({"trainer": "scores.py"}, r"scores.py' must define train\(options\)"),
        ({"trainer": ["a.py"]}, r"trainer must be the name of a Python file, but is \['a.py'\]"),
        ({"trainer": "broken.py"}, "broken.py' cannot be imported: SyntaxError"),
        ({"variants": VARIANTS | {"bad": {"width": -1}}}, "width must be at least 0, but is -1"),
        ({"variants": {"plain": {}}}, r"variant 'plain': check\(\) of the trainer fails: KeyError: 'width'"),
        ({"num_images": 5}, "num_images has no effect"),
        ({"common": {"seed": 3}}, "'seed' cannot be set for the runs of a study"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(write, tmp_path, changes, words):
    (tmp_path / "scores.py").write_text("SCORES = {'a': ['lower']}\n\ndef train(options):\n    return {}\n")
    (tmp_path / "broken.py").write_text("def train(:\n")
    with pytest.raises(UsageError, match=words):
        load_study(write(**changes))


def test_a_figure_that_is_missing_is_named(write, tmp_path, capfd):
    path = write()
    (tmp_path / "trainer.py").write_text(TRAINER.replace('"some_error": error', '"some_errors": error'))
    assert run(path) == 2
    assert "returned no number 'some_error'. Did you mean 'some_errors'?" in capfd.readouterr().err


def test_the_page_fits_its_window(write, tmp_path):
    """Nothing is cut at a desktop's width; on a phone tables scroll inside of the page."""
    variants = {f"a-variant-with-a-long-name-{number}": {"width": number} for number in range(1, 5)}
    assert run(write(variants=VARIANTS | variants, seeds=[0, 1])) == 0
    with open_browser() as browser:
        for width, scheme in ((1280, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.goto((tmp_path / "out" / "study.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            cut = page.evaluate("[...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth)")
            assert len(cut) == 4
            assert width < 1280 or cut == [0] * 4
            assert "fewer than 3 pairs" in page.inner_text("body")
            assert "2 †" in page.inner_text("body")
