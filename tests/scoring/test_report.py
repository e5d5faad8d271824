"""Tables and pages of scores."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.data.grid import image_grid
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.scoring.evaluation import evaluate
from dia_diffusion.scoring.features.named import get_extractor
from dia_diffusion.scoring.images import FolderImages
from dia_diffusion.scoring.score_report import format_scores, nearest_images, write_report


@pytest.fixture(scope="module")
def digits():
    return [prepare_pixels(load_digits_dataset()[split], 8) for split in ("train", "test")]


@pytest.fixture(scope="module")
def extractor():
    return get_extractor("digits")


@pytest.fixture(scope="module")
def scores(digits, extractor):
    train, test = digits
    return evaluate(FolderImages(test), train, extractor, ["fid", "recall"], held_out=test)


def test_table_shows_what_was_asked_for_with_the_floor_and_the_settings(scores):
    table = format_scores(scores)
    figure = f"{scores['fid']:.4f}"
    assert f"| Fréchet distance (FID) | {figure} | {figure} |" in table
    assert f"| settings | {scores['settings_hash']} | {scores['floor']['settings_hash']} |" in table
    assert f"| 95% interval | {scores['fid_interval'][0]:.4f} to {scores['fid_interval'][1]:.4f} |" in table
    assert "Precision" not in table
    assert "floor" not in format_scores(scores | {"floor": None})
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_nearest_images_are_those_of_brute_force(digits, extractor):
    train, test = digits
    picture, distances = nearest_images(FolderImages(test), train, extractor)
    generated, real = test.images_at(range(10)), train.images_at(range(len(train)))
    all_distances = np.linalg.norm(
        extractor(generated).double().numpy()[:, None] - extractor(real).double().numpy(), axis=2
    )
    assert distances == pytest.approx(all_distances.min(1).tolist())
    rows = []
    for number, row in enumerate(np.argsort(all_distances, axis=1, kind="stable")[:, :4].tolist()):
        rows += [generated[number], *real[row]]
    assert picture.tobytes() == image_grid(torch.stack(rows), columns=5).tobytes()


def test_a_memorised_image_has_a_twin(digits, extractor):
    _, distances = nearest_images(FolderImages(digits[0]), digits[0], extractor)
    assert max(distances) < 1e-5


def test_report_is_one_file_with_table_settings_and_pictures(digits, extractor, scores, tmp_path):
    train, test = digits
    named = scores | {"what": "made", "dataset": "digits"}
    facts, command = {"Reference": "all digits"}, {"command": "dia evaluate <x>"}
    write_report(tmp_path / "report.html", named | command, facts, FolderImages(test), train, extractor)
    page = (tmp_path / "report.html").read_text()
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r"src='data:image/png;base64,(.*?)'", page)
    ]
    assert len(pictures) == 2
    assert pictures[0].tobytes() == image_grid(test.images_at(range(64))).tobytes()
    for words in (
        f"{scores['fid']:.4f}",
        scores["settings_hash"],
        "dia evaluate &lt;x&gt;",
        "bilinear, antialiased",
        "all digits",
    ):
        assert words in page
    assert "<h1>Scores of made against digits</h1>" in page
    assert f"The floor is {scores['floor']['fid']:.2f}: another 360 real images" in page
    assert not re.search(r"<(p|td|th|dd)[^>]*></", page)
    assert "http" not in re.sub("base64,.*?'", "", page)
    write_report(tmp_path / "bare.html", named, facts, FolderImages(test), None, extractor)
    assert (tmp_path / "bare.html").read_text().count("<img") == 1
