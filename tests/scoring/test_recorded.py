"""What a model is compared with by default: the data that its training run records, in its proportions."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from PIL import Image

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main
from dia_diffusion.data.loading import load_pixels
from dia_diffusion.data.recorded import find_recorded_data
from dia_diffusion.options.training import CONFIG
from dia_diffusion.scoring.images import PipelineImages, draw_classes
from tiny_unets import GREY

COLOUR = GREY | {"in_channels": 3, "out_channels": 3}
FEW = ["--num_images", "40", "--steps", "1", "--features", "pixels", "--metrics", "fid"]


def save_run(folder, data, unet=COLOUR, **options):
    """A pipeline with the record of the run that might have trained it."""
    torch.manual_seed(0)
    names = {0: "few", 1: "many"} if unet.get("num_class_embeds") else None
    DIAUNetPipeline(DIAUNet2DModel(**unet), DDIMScheduler(), names).save_pretrained(folder)
    (folder / CONFIG).write_text(yaml.safe_dump({"train_data_dir": str(data), "resolution": 8, **options}))
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Colour images: 18 dark ones of one class and 2 bright ones of another for training, one of each held out."""
    random = np.random.default_rng(0)
    for split, many, few in (("train", 18, 2), ("test", 1, 1)):
        for name, count, low in (("many", many, 0), ("few", few, 128)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "pictures"


def score(tmp_path, *arguments):
    assert main(["evaluate", *map(str, arguments), "--output", str(tmp_path / "e.json")]) == 0
    return json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)


def test_a_run_is_compared_with_the_images_that_it_was_trained_on(pictures, tmp_path, capsys):
    run = save_run(tmp_path / "run", pictures)
    recorded = score(tmp_path, run, *FEW)
    said = capsys.readouterr().out
    assert f"Reference: 20 images of '{pictures}', split train: 8x8 pixels" in said
    assert "taken as 8x8 in colour" in said
    assert recorded["dataset"] == str(pictures)
    assert recorded["settings"]["reference"]["num_images"] == 20
    assert recorded["floor"]["num_images"] == 2
    named = score(tmp_path, run, *FEW, "--dataset", pictures)
    assert (named["fid"], named["settings_hash"]) == (recorded["fid"], recorded["settings_hash"])
    other = score(tmp_path, run, *FEW, "--dataset", "digits")
    assert other["settings"]["reference"]["num_images"] == 1437


def test_images_that_a_run_held_out_itself_are_held_out_of_its_scores(pictures, tmp_path):
    run = save_run(tmp_path / "run", pictures / "train", validation_split=0.25)
    floor = score(tmp_path, run, *FEW)["floor"]
    for name, pixels in zip(("train", "held_out"), load_pixels(find_recorded_data(str(run))), strict=True):
        (tmp_path / name).mkdir()
        for number, image in enumerate(pixels.images_at(range(len(pixels)))):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{number}.png")
    between = score(tmp_path, tmp_path / "held_out", *FEW[4:], "--dataset", tmp_path / "train")
    assert (floor["num_images"], floor["fid"]) == (5, pytest.approx(between["fid"]))


def test_an_analysis_looks_at_the_held_out_images_of_the_run(pictures, tmp_path, capsys):
    run = save_run(tmp_path / "run", pictures)
    assert main(["analyze", str(run), "--output_dir", str(tmp_path / "maps"), "--num_timesteps", "2"]) == 0
    assert f"Images: 2 images of '{pictures}', split test" in capsys.readouterr().out
    (run / CONFIG).unlink()
    assert main(["analyze", str(run), "--output_dir", str(tmp_path / "maps")]) == 2
    assert "does not record which data it was trained on" in capsys.readouterr().err


def test_data_that_moved_is_named_before_the_work(pictures, tmp_path, capsys):
    run = save_run(tmp_path / "run", pictures)
    pictures.rename(tmp_path / "moved")
    assert main(["evaluate", str(run), *FEW]) == 2
    assert f"was trained on the images in '{pictures}', and there is no such folder here" in capsys.readouterr().err
    assert score(tmp_path, run, *FEW, "--dataset", tmp_path / "moved")["floor"]["num_images"] == 2


def test_pictures_are_not_written_among_the_images_of_the_data(pictures, tmp_path, capsys):
    run = save_run(tmp_path / "run", pictures)
    for place in (pictures, pictures / "test" / "made"):
        assert main(["evaluate", str(run), *FEW, "--save_images", str(place)]) == 2
        assert "the folder of the images, and pictures there would become images" in capsys.readouterr().err
        assert main(["analyze", str(run), "--output_dir", str(place)]) == 2
        assert "the folder of the images, and pictures there would become images" in capsys.readouterr().err
    assert {path.name for path in pictures.iterdir()} == {"train", "test"}
    assert not (pictures / "test" / "made").exists()
    (run / CONFIG).write_text("dataset_name: digits\n")
    assert main(["evaluate", str(run), *FEW, "--dataset_config_name", "x"]) == 2
    assert "an embedded data set, in which there is no 'x' to choose" in capsys.readouterr().err


def test_a_record_of_another_version_is_read_as_far_as_it_is_known(tmp_path):
    (tmp_path / CONFIG).write_text("dataset_name: digits\nresolution: 8\nof_tomorrow: 3\n")
    assert find_recorded_data(str(tmp_path)).dataset_name == "digits"
    (tmp_path / CONFIG).write_text("learning_rate: 1.0\n")
    assert find_recorded_data(str(tmp_path)) is None


def test_classes_are_drawn_as_often_as_the_reference_has_them(pictures, tmp_path, capsys):
    """A model that knows its classes perfectly has a distance near zero then, and not with classes in equal parts."""
    run = save_run(tmp_path / "run", pictures, COLOUR | {"num_class_embeds": 3}, class_conditional=True)
    scores = score(tmp_path, run, *FEW)
    assert "drawn as often as the reference has them (few 10.0%, many 90.0%)" in capsys.readouterr().out
    assert scores["settings"]["sampling"]["class_shares"] == [0.1, 0.9]
    by_name = score(tmp_path, run, *FEW, "--dataset", tmp_path / "pictures" / "train")
    assert by_name["settings"]["sampling"]["class_shares"] == [0.1, 0.9]
    even = score(tmp_path, run, *FEW, "--class_proportions", "even")
    assert "Classes: all are drawn alike." in capsys.readouterr().out
    assert "class_shares" not in even["settings"]["sampling"]
    assert even["settings_hash"] != scores["settings_hash"]


def test_drawn_classes_have_their_shares_and_depend_on_their_number_alone():
    shares = [0.89, 0.0, 0.1, 0.01]
    drawn = draw_classes(shares, range(5000), 3)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 5000, shares, atol=0.001)
    assert draw_classes(shares, range(70, 90), 3) == drawn[70:90]
    assert draw_classes(shares, range(5000), 4) != drawn


def test_a_pipeline_is_asked_for_the_classes_that_were_drawn():
    torch.manual_seed(0)
    pipeline = DIAUNetPipeline(DIAUNet2DModel(**GREY | {"num_class_embeds": 3}), DDIMScheduler())
    images = PipelineImages(pipeline, 12, 1, 5, class_shares=[0.25, 0.75])
    labels = draw_classes([0.25, 0.75], range(12), 5)
    assert set(labels) == {0, 1}
    assert torch.equal(images.images_at(range(4, 12)), images.images_at(range(12))[4:])
    for label in (0, 1):
        of_label = PipelineImages(pipeline, 12, 1, 5, class_shares=[1 - label, label]).images_at(range(12))
        which = [number for number in range(12) if labels[number] == label]
        assert torch.equal(images.images_at(range(12))[which], of_label[which])
    # Equal shares are classes in turn.
    in_turn = PipelineImages(pipeline, 4, 1, 5, class_shares=[0.5, 0.5])
    assert in_turn.settings == PipelineImages(pipeline, 4, 1, 5).settings
