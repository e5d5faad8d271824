"""What `dia sample` and scoring refuse before they begin, and models that give no images."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

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
    assert main(["evaluate", model, "--steps", "2", "--num_images", "2"]) == 2
    assert f"the model '{model}' gives values that are not finite" in capsys.readouterr().err
