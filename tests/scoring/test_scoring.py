"""`dia evaluate` as a user meets it: what can be scored against what, by one process or several, and interruptions."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main
from dia_diffusion.data.sources import load_digits_dataset
from forks import start, start_together

ROOT = Path(__file__).parents[2]
FIGURES = "fid fid_infinity kid_mean kid_std is_mean is_std precision recall num_images settings_hash".split()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One small pipeline, as ours and as diffusers' own."""
    torch.manual_seed(0)
    unet = DIAUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    )
    folder = tmp_path_factory.mktemp("models")
    DIAUNetPipeline(unet, DDIMScheduler()).save_pretrained(folder / "dia")
    DDIMPipeline(unet.to_unet(), DDIMScheduler()).save_pretrained(folder / "ddim")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Some digits as files."""
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(load_digits_dataset()["train"][:120]["image"]):
        image.save(folder / f"{number:03d}.png")
    return folder


def score(tmp_path, *arguments):
    output = tmp_path / "scores" / "metrics.json"
    assert main(["evaluate", *map(str, arguments), "--output", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", ["dia", "ddim"])
def test_pipelines_are_scored_against_the_digits(models, name, tmp_path, capsys):
    report = tmp_path / "deep" / "report.html"
    options = ["--num_images", 20, "--steps", 2, "--metrics", "fid,kid", "--report", report]
    scores = score(tmp_path, models / name, "--dataset", "digits", *options)
    assert scores["precision"] is None
    assert scores["floor"]["num_images"] == 360
    assert 0 < scores["floor"]["fid"] < scores["fid"]
    printed = capsys.readouterr().out
    assert f"| Fréchet distance (FID) | {scores['fid']:.4f} | {scores['floor']['fid']:.4f} |" in printed
    assert "outside sampling" in printed
    assert "20 images are too few" in printed
    assert "nearest real" in report.read_text()
    sampling = scores["settings"]["sampling"]
    assert (sampling["scheduler"], sampling["steps"], sampling["guidance_scale"]) == ("DDIMScheduler", 2, 1.0)
    assert scores["origin"]["seed"] == 0
    assert scores["settings"]["features"]["weights"] is not None
    assert "torch" in scores["versions"]


def test_a_folder_against_itself_gives_zero(images, tmp_path):
    scores = score(tmp_path, images, "--dataset", images, "--features", "pixels")
    assert scores["fid"] == pytest.approx(0, abs=1e-5)
    assert (scores["precision"], scores["recall"], scores["num_images"]) == (1, 1, 120)
    assert scores["floor"] is None
    assert scores["settings"]["features"]["num_features"] == 64


def test_a_folder_is_scored_against_published_statistics(images, tmp_path):
    pixels = np.stack([np.asarray(Image.open(path)).ravel() for path in sorted(images.iterdir())]) / 255
    np.savez(tmp_path / "statistics.npz", mu=pixels.mean(0), sigma=np.cov(pixels, rowvar=False))
    options = ["--features", "pixels", "--report", tmp_path / "report.html"]
    scores = score(tmp_path, images, "--dataset", tmp_path / "statistics.npz", *options)
    assert scores["fid"] == pytest.approx(0, abs=1e-5)
    assert scores["kid_mean"] is None


def test_a_folder_of_images_and_the_pipeline_that_made_them_have_the_same_scores(models, tmp_path):
    options = ["--dataset", "digits", "--num_images", 100, "--steps", 2, "--metrics", "FID,is,recall"]
    made = score(tmp_path, models / "dia", *options, "--save_images", tmp_path / "made")
    read = score(tmp_path, tmp_path / "made", "--dataset", "digits", "--metrics", "fid,is,recall")
    for name in ("fid", "is_mean", "recall", "num_images"):
        assert read[name] == pytest.approx(made[name], rel=1e-5)


def exit_status(*arguments):
    """Of `dia`, whether the parser ends it or the command."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def test_two_processes_give_the_scores_of_one(models, tmp_path):
    arguments = [
        models / "dia",
        "--dataset",
        "digits",
        "--num_images",
        50,
        "--steps",
        2,
        "--batch_size",
        8,
        "--metrics",
        "fid,kid,is,recall",
    ]
    one = score(tmp_path, *arguments)
    arguments += ["--output", tmp_path / "two.json", "--save_images", tmp_path / "made"]
    log, words = tmp_path / "two.log", ["evaluate", *map(str, arguments)]
    for process in start_together(2, main, words, output=log, DIA_CACHE=tmp_path / "c"):
        process.join()
        assert process.exitcode == 0, log.read_text()
    assert log.read_text().count("outside sampling") == 1
    assert len(list((tmp_path / "made").glob("*.png"))) == 50
    scores = json.loads((tmp_path / "two.json").read_text())
    assert {name: scores[name] for name in FIGURES} == {name: one[name] for name in FIGURES}
    assert scores["floor"]["fid"] == one["floor"]["fid"]


def test_interrupted_scoring_goes_on_with_the_images_that_it_has_written(models, tmp_path):
    arguments = [str(models / "dia"), *"--dataset digits --num_images 60 --steps 20 --batch_size 5".split()]
    expected = score(tmp_path, *arguments)
    made = tmp_path / "made"
    process = start(main, ["evaluate", *arguments, "--save_images", str(made)])
    deadline = time.monotonic() + 120
    while len(list(made.glob("*.png"))) < 10:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    before = {path.name: path.stat().st_mtime_ns for path in made.glob("*.png")}
    assert len(before) < 60
    scores = score(tmp_path, *arguments, "--save_images", made)
    after = {path.name: path.stat().st_mtime_ns for path in made.glob("*.png")}
    assert len(after) == 60
    # All but those of the batch in which it was killed.
    assert sum(after[name] == time for name, time in before.items()) >= len(before) - 5
    assert {name: scores[name] for name in FIGURES} == {name: expected[name] for name in FIGURES}


def test_mistakes_end_before_the_work_begins(models, images, tmp_path, capsys):
    digits = ["--dataset", "digits"]
    cases = [
        ([models / "dia", "--dataset", images], "name the features to compare in: --features digits, pixels"),
        ([models / "dia"], "does not record which data it was trained on: name the data to compare with"),
        ([images], "does not record which data it was trained on"),
        ([models / "dia", *digits, "--metrics", "is", "--features", "pixels"], "needs a classifier"),
        ([models / "dia", *digits, "--metrics", ","], "name at least one metric of: fid, kid"),
        ([models / "dia", "--output", tmp_path], "is a folder: name the file to write"),
        ([models / "dia", "--seed", "-1"], "seed must be at least 0, but is -1"),
        ([tmp_path / "none" / "there"], "there is no such folder."),
        ([models / "dia", "--batch_size", "0"], "batch_size must be at least 1"),
        ([models / "dia", *digits, "--dataset_config_name", "x"], "dataset_config_name has no effect on an embedded"),
        ([images, "--save_images", tmp_path / "x"], "save_images has no effect on images that are made already"),
        (
            [images, *digits, "--steps", "9", "--seed", "0"],
            "steps and seed have no effect on images that are made already",
        ),
        ([images, *digits, "--scheduler", "ddim", "--guide", "g"], "guide does nothing at guidance_scale 1"),
        ([images / "000.png", *digits], "000.png' is a file: name a pipeline, a folder of images (or of"),
        ([images, "--dataset", images / "000.png"], "000.png' is a file: name a folder (of archives, too), a data set"),
        (
            [models / "dia", *digits, "--output", images / "000.png" / "e.json"],
            "000.png' is a file, and a folder is needed",
        ),
        ([models / "dia", *digits, "--class_proportions", "even"], "--class_proportions needs a class-conditional"),
        (
            [models / "dia", "--dataset", tmp_path / "no.npz", "--features", "digits"],
            "cannot be read: there is no such file",
        ),
    ]
    for arguments, words in cases:
        assert exit_status("evaluate", *map(str, arguments)) == 2
        assert words in capsys.readouterr().err
