"""The commands from Python: the same options, checks and results as on the command line."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

import dia_diffusion
from dia_diffusion import analyze, evaluate, sample, train
from dia_diffusion.errors import UsageError
from dia_diffusion.options.training import OPTION_NAMES
from training_runs import TINY

TINIER = TINY | {"dataset_name": "digits", "block_out_channels": [8, 16], "unet_arguments": {"norm_num_groups": 4}}


def test_a_model_is_trained_sampled_scored_and_looked_at_in_one_process(tmp_path, monkeypatch):
    """Twice, with another precision: the state that accelerate keeps for a process is no hindrance."""
    monkeypatch.chdir(tmp_path)
    for precision, name in (("no", "one"), ("bf16", "two")):
        options = {"max_train_steps": 2, "mixed_precision": precision, "recipe": "digits", "score_num_images": 20}
        run = train(**TINIER | options | {"output_dir": tmp_path / name, "score_features": "pixels"})
        assert run.figures["step"] == 2
        assert run.figures["fid"] > 0
        assert run.pipeline.class_names == list("0123456789")
        images = sample(run.folder, num_images=3, steps=2, class_label=7, device=torch.device("cpu"))
        assert [image.size for image in images] == [(8, 8)] * 3
        written = sample(run.folder, num_images=3, steps=2, class_label=7, output_dir=tmp_path / f"{name} images")
        assert [image.tobytes() for image in written] == [image.tobytes() for image in images]
        scores = evaluate(run.folder, n=20, num_inference_steps=2, features="pixels", metrics=["fid"])
        assert set(scores["floor"]) >= {"fid"}
        assert "command" not in scores
    # One class for all, or several in turn, in whatever holds them.
    labels = ([3, "7"], (3, 7), np.array([3, 7]), torch.tensor([3, 7]))
    several = [sample(run.folder, num_images=torch.tensor(3), steps=2, class_label=label) for label in labels]
    assert all([image.tobytes() for image in made] == [image.tobytes() for image in several[0]] for made in several)
    assert several[0][1].tobytes() == images[1].tobytes() != several[0][0].tobytes()
    assert analyze(run.folder, num_images=4, num_timesteps=2, output_dir="maps")
    assert {path.name for path in tmp_path.iterdir()} >= {"one", "two", "one images", "two images", "maps"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (train, {"learning_rat": 1}, "train has no option 'learning_rat'. Did you mean 'learning_rate'?"),
        (train, {"lr": 1}, "Did you mean 'learning_rate'?"),
        (train, {"train_data_dir": "x", "label_dropout": 0.2}, "label_dropout has no effect without --class_cond"),
        (train, {"seed": -1}, "seed must be at least 0, but is -1"),
        (train, {"dataset": "digits", "dataset_name": "digits"}, "are one option"),
        (sample, {"model": "m", "num_sampels": 3}, "sample has no option 'num_sampels'. Did you mean 'num_images'?"),
        (sample, {"model": None}, "sample needs model"),
        (sample, {"model": "m", "class_label": [[1], [2]]}, "name or the number of a class, or a list of them, but is"),
        (sample, {"model": "m", "class_label": 3.0}, "name or the number of a class, or a list of them, but is 3.0"),
        (sample, {"model": "m", "scheduler": ""}, "scheduler is empty"),
        (sample, {"model": "m", "scheduler": dict}, "scheduler must be text (put it in quotes), but is of type type"),
        (evaluate, {"what": "tests", "guidance": 2}, "Did you mean 'guidance_scale'?"),
        (analyze, {"model": "m", "attention": "a", "num_timesteps": 3}, "num_timesteps has no effect on a classifier"),
    ],
)
def test_a_wrong_option_is_refused_with_advice(function, options, words):
    with pytest.raises(UsageError) as raised:
        function(**options)
    assert words in str(raised.value)


def test_functions_show_their_options_and_import_nothing_before_they_are_called():
    assert set(inspect.signature(train).parameters) == OPTION_NAMES | {"recipe", "config"}
    assert next(iter(inspect.signature(sample).parameters)) == "model"
    assert inspect.signature(evaluate).parameters["steps"].default == 25
    assert {"train", "sample", "evaluate", "analyze", "attach", "DIAUNet2DModel"} <= set(dir(dia_diffusion))
    heavy = "{'torch', 'diffusers', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)"
    code = f"import sys; from dia_diffusion import train, sample, evaluate, analyze; print({heavy} or 'light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "light\n"
