"""The description of a study: what it means, and what is refused in it."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dia_diffusion.errors import UsageError
from dia_diffusion.study.description import load_study
from dia_diffusion.study.dia_study import run_study
from dia_diffusion.training.architecture import build_unet
from small_studies import runs_of, write_study

STUDIES = Path(__file__).parents[2] / "studies"


def test_unet_arguments_of_common_and_of_a_variant_are_merged(tmp_path):
    """A variant says what it has otherwise, whichever way the arguments are written."""
    variants = {
        "plain": {},
        "text": {"unet_arguments": "{norm_num_groups: 8}"},
        "flat": {"norm_eps": 0.1, "act_fn": "relu"},
        "both": {"unet_arguments": {"norm_eps": 0.1}, "act_fn": "relu"},
    }
    common = {"unet_arguments": {"norm_num_groups": 16, "norm_eps": 1e-3}, "act_fn": "gelu"}
    path = write_study(tmp_path / "study.yaml", variants, common, seeds=[0])
    arguments = {run.variant: run.config.model.unet_arguments for run in runs_of(path, tmp_path)[1]}
    assert arguments["plain"] == {"norm_num_groups": 16, "norm_eps": 1e-3, "act_fn": "gelu"}
    assert arguments["text"] == {"norm_num_groups": 8, "norm_eps": 1e-3, "act_fn": "gelu"}
    assert arguments["flat"] == arguments["both"] == {"norm_num_groups": 16, "norm_eps": 0.1, "act_fn": "relu"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "plane"}, "the baseline 'plane' must be one of"),
        ({"baseline": ["plain"]}, "must be one of the study's variants"),
        ({"seeds": [1, 1]}, "seeds must be a list of different numbers"),
        ({"variants": {"plain": {"dia_atention": "none"}}}, "variant 'plain': 'dia_atention' is neither"),
        ({"variants": {"plain": {"seed": 3}}}, "'seed' cannot be set for the runs of a study: list 'seeds'"),
        ({"variants": {"plain": {}, "../up": {}}}, r"variant '../up': its name may have"),
        *(
            ({"variants": {"plain": {}, name: {}}}, f"variant '{re.escape(name)}': a name is also a folder's")
            for name in ("..", ".", ".hidden", "end.", "con", "NUL.txt", 101 * "x")
        ),
        ({"variants": {"plain": {}, "study.json": {}}}, "variant 'study.json': that file holds the report"),
        ({"variants": {"plain": {}, "Plain": {}}}, "variants 'plain' and 'Plain' would have one folder"),
        ({"variants": {"plain": {}, "long": {"max_train_steps": 9}}}, "a study compares at equal steps"),
        (
            {"variants": {"plain": {"max_train_steps": 24}}, "common": {"max_train_steps": None}},
            "in 'common', and in no",
        ),
        ({"variants": {"plain": {}, "other": 5}}, "'other' must list options, each with its value, but is 5"),
        ({"seeds": 3}, "seeds must be a list of numbers from 0"),
        ({"seeds": [-1]}, "each of the seeds must be at least 0, but is -1"),
        ({"seeds": ["one"]}, "each of the seeds must be a whole number, but is 'one'"),
        ({"num_images": "many"}, "num_images must be a whole number, but is 'many'"),
        ({"num_images": True}, "num_images must be a whole number, but is 'True'"),
        ({"variants": {"plain": {}, "idle": {"lr_power": 2}}}, "variant 'idle': lr_power has no effect"),
        ({"variants": {"plain": {"hub_token": "secret"}}}, "'hub_token' cannot be set for the runs of a study"),
        ({"num_images": 1}, "num_images is 1, and a distance needs 2"),
        ({"loss_draws": 0}, "loss_draws must be at least 1, but is 0"),
        ({"sedes": [1]}, "must have the keys baseline, seeds, variants"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, words):
    path = write_study(tmp_path / "study.yaml", **changes)
    with pytest.raises(UsageError, match=words):
        load_study(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_out_channels": [8] * 6}, "variant 'bad': resolution .* does not fit a UNet"),
        ({"norm_num_groups": 5}, "variant 'bad': no UNet can be built as asked"),
        ({"train_data_dir": "none"}, "variant 'bad': --train_data_dir 'none' is not a folder"),
        ({"dataset_name": "nowhere"}, "variant 'bad': cannot load images from 'nowhere'"),
        ({"vae": "nowhere"}, "variant 'bad': cannot load a VAE from 'nowhere'"),
        ({"init_from": "nowhere"}, "variant 'bad': cannot load a UNet from 'nowhere'"),
        ({"image_column": "label"}, "variant 'bad': 'label' is not a column of images"),
        ({"ddpm_num_inference_steps": 61}, "variant 'bad': ddpm_num_inference_steps 61 goes below"),
        ({"class_embed_type": "identity"}, "variant 'bad': class_embed_type 'identity' has no embedding"),
        ({"mixed_precision": "fp16"}, "variant 'bad': mixed_precision 'fp16' needs a GPU"),
        ({"channels": 3, "train_data_dir": "images"}, "variant 'bad': a study needs held-out"),
        ({"features": "nonsense"}, "variant 'plain': 'nonsense' is neither the name of features"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works there")
def test_what_a_variant_lacks_is_found_before_the_others_are_trained(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.new("RGB", (8, 8)).save("images/a.png")
    scored = {"num_images": 2, "features": options.pop("features", "digits")}
    path = write_study(tmp_path / "study.yaml", {"plain": {}, "bad": options}, seeds=[0], **scored)
    with pytest.raises(UsageError, match=words):
        run_study(path, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    path = write_study(tmp_path / "study.yaml")
    path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert yaml.safe_load(path.read_text())["common"]["learning_rate"] == "1e-3"
    assert {run.config.optimisation.learning_rate for run in runs_of(path, tmp_path)[1]} == {1e-3}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_come_with_the_project_can_be_built(path):
    study = load_study(path)
    for variant in study.variants if study.trainer is None else ():
        config = study.config(variant, study.seeds[0], Path("study"))
        build_unet(config.model, config.data.resolution, channels=1, num_classes=None)
