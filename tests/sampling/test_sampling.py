"""What `dia sample` and scoring refuse before they begin, and models that give no images."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main
from tiny_unets import TINY


def save(folder, pipeline_class, weight=None, clip=True):
    scheduler = DDIMScheduler if pipeline_class is DDIMPipeline else DDPMScheduler
    unet = DIAUNet2DModel(**TINY)
    if weight is not None:
        torch.nn.init.constant_(unet.conv_out.bias, weight)
    unet = unet if pipeline_class is DIAUNetPipeline else unet.to_unet()
    pipeline_class(unet, scheduler(num_train_timesteps=20, clip_sample=clip)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pipeline_class", [DIAUNetPipeline, DDIMPipeline])
@pytest.mark.parametrize("steps", ["0", "-1", "21"])
def test_steps_that_there_are_not_are_refused_before_the_work(tmp_path, capsys, pipeline_class, steps):
    model = save(tmp_path / "model", pipeline_class)
    for command in ("sample", "evaluate"):
        place = {
            "sample": ["--output_dir", str(tmp_path / "out")],
            "evaluate": ["--save_images", str(tmp_path / "out")],
        }
        try:
            status = main([command, model, "--steps", steps, *place[command]])
        except SystemExit as end:
            status = end.code
        assert status == 2
        assert f"is {steps}." in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pipeline_class", [DIAUNetPipeline, DDIMPipeline, DDPMPipeline])
@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_model_that_gives_nothing_finite_gives_no_images(tmp_path, capsys, pipeline_class, weight):
    model = save(tmp_path / "model", pipeline_class, weight)
    assert main(["sample", model, "--steps", "2", "--num_images", "2", "--output_dir", str(tmp_path / "out")]) == 2
    assert f"the model '{model}' gives values that are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))
    assert main(["evaluate", model, "--dataset", "digits", "--steps", "2", "--num_images", "2"]) == 2
    assert f"the model '{model}' gives values that are not finite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_images(tmp_path, capsys):
    model = save(tmp_path / "model", DIAUNetPipeline)
    pixels = {}
    for name, flags in (("plain", []), ("compiled", ["--compile_mode", "reduce-overhead"])):
        folder = tmp_path / name
        # The last batch is smaller.
        arguments = ["--num_images", "3", "--batch_size", "2", "--steps", "2", "--output_dir", str(folder)]
        assert main(["sample", model, *arguments, *flags]) == 0
        assert ("compiled (reduce-overhead)" in capsys.readouterr().out) == (name == "compiled")
        pixels[name] = np.stack([np.asarray(Image.open(path), dtype=float) for path in sorted(folder.iterdir())])
    assert pixels["plain"].std() > 10
    assert np.abs(pixels["plain"] - pixels["compiled"]).max() <= 1
    assert main(["evaluate", str(tmp_path / "plain"), "--compile"]) == 2
    assert "compile has no effect on images that are made already" in capsys.readouterr().err
