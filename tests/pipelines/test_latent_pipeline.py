"""DIAUNetPipeline with a VAE behind its UNet."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from autoencoders import PatchVAE, random_tiny, random_vae
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.sampling.generation import sample_images
from dia_diffusion.sampling.loading import load_pipeline
from environments import REFERENCE, digest

TINY = {
    "sample_size": 4,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "dia_hidden_size": 8,
}
FREE = DDIMScheduler(clip_sample=False)


def latent_pipeline(vae=None, scheduler=FREE, **arguments):
    vae = vae or random_vae(scaling_factor=0.5, shift_factor=0.1)
    torch.manual_seed(0)
    channels = vae.config.latent_channels
    unet = DIAUNet2DModel(**TINY | {"in_channels": channels, "out_channels": channels} | arguments).eval()
    return DIAUNetPipeline(unet, scheduler, vae=vae)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("make_vae", [random_vae, random_tiny, PatchVAE])
def test_images_are_what_the_vae_makes_of_the_latents(make_vae):
    pipe = latent_pipeline(make_vae())
    arguments = {"batch_size": 3, "num_inference_steps": 2}
    latents = pipe(**arguments, generator=generator(), output_type="latent").images
    assert latents.shape == (3, pipe.vae.config.latent_channels, 4, 4)
    # Noise of another model's range than pixels is not cut off.
    assert latents.abs().max() > 1
    config = pipe.vae.config
    decoded = pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
    images = pipe(**arguments, generator=generator(), output_type="pt").images
    assert images.shape == (3, 1, 8, 8)
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    pictures = pipe(**arguments, generator=generator()).images
    assert [picture.size for picture in pictures] == [(8, 8)] * 3


def test_slices_and_tiles_give_the_same_images():
    pipe = latent_pipeline(random_vae(sample_size=8), sample_size=16)
    whole = pipe(batch_size=2, num_inference_steps=2, generator=generator(), output_type="np").images
    pipe.vae.enable_slicing()
    sliced = pipe(batch_size=2, num_inference_steps=2, generator=generator(), output_type="np").images
    np.testing.assert_allclose(sliced, whole, atol=1e-5)
    pipe.vae.enable_tiling()
    tiled = pipe(batch_size=2, num_inference_steps=2, generator=generator(), output_type="np").images
    # Normalised tile by tile: as near as diffusers comes.
    assert tiled.shape == whole.shape
    assert np.abs(tiled - whole).max() > 0


@pytest.mark.parametrize("make_vae", [random_vae, random_tiny])
def test_a_saved_pipeline_brings_its_vae_along(tmp_path, make_vae):
    """`test_self_contained.py` loads one with diffusers alone."""
    pipe = latent_pipeline(make_vae())
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", type(pipe.vae).__name__]
    loaded = DIAUNetPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is type(pipe.vae)
    # Weights that lie otherwise in memory may be added in another order.
    torch.testing.assert_close(*[p(2, 3, generator(), output_type="pt").images for p in (pipe, loaded)])


def test_a_pipeline_without_a_vae_says_so_and_an_old_one_has_none(tmp_path):
    assert DIAUNetPipeline.from_pretrained(REFERENCE).vae is None
    pipe = latent_pipeline()
    plain = DIAUNetPipeline(pipe.unet, pipe.scheduler)
    plain.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [None, None]
    assert DIAUNetPipeline.from_pretrained(tmp_path).vae is None
    assert DIAUNetPipeline.from_pretrained(tmp_path, vae=pipe.vae).vae is pipe.vae


def test_the_vae_goes_along_when_pipelines_are_made_from_each_other():
    pipe = latent_pipeline()
    again = DIAUNetPipeline.from_pipe(pipe)
    assert again.vae is pipe.vae
    assert digest(again) == digest(pipe)
    ddpm = DDPMPipeline(pipe.unet, DDPMScheduler())
    assert DIAUNetPipeline.from_pipe(ddpm).vae is None
    assert DIAUNetPipeline.from_pipe(ddpm, vae=pipe.vae).vae is pipe.vae


def test_what_does_not_fit_the_vae_is_refused_in_words():
    pipe = latent_pipeline()
    for scheduler in (DDIMScheduler(), DDPMScheduler(clip_sample=False, thresholding=True)):
        pipe.scheduler = scheduler
        with pytest.raises(UsageError, match=r"within the range of pixels .*=False"):
            pipe(num_inference_steps=2)
    # What the configuration of another scheduler holds besides does not count.
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)
    assert len(pipe(num_inference_steps=2).images) == 1
    pipe.vae = random_vae(latent_channels=4)
    with pytest.raises(UsageError, match="the UNet makes 2 channels, and the VAE decodes 4"):
        pipe(num_inference_steps=2)
    pipe = latent_pipeline()
    pipe.vae.decoder.conv_out.bias += torch.inf
    with pytest.raises(UsageError, match="values that are not finite"):
        pipe(num_inference_steps=2)
    assert pipe(num_inference_steps=2, output_type="latent").images.isfinite().all()


def test_commands_sample_score_and_analyze_in_pixels(tmp_path, capsys):
    latent_pipeline().save_pretrained(tmp_path / "model")
    loaded = load_pipeline(str(tmp_path / "model"))
    assert loaded.vae.use_slicing
    assert next(sample_images(loaded, 2, 2)).shape == (2, 1, 8, 8)
    model, few = str(tmp_path / "model"), ["--num_images", "6"]
    steps = ["--steps", "2"]
    assert main(["sample", model, *few, *steps, "--output_dir", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 6
    scores = str(tmp_path / "scores.json")
    assert main(["evaluate", model, "--dataset", "digits", *few, *steps, "--metrics", "fid", "--output", scores]) == 0
    scored = json.loads((tmp_path / "scores.json").read_text())
    assert scored["fid"] > 0
    assert scored["settings"]["reference"]["resolution"] == 8
    maps = ["--num_timesteps", "2", "--output_dir", str(tmp_path / "maps")]
    assert main(["analyze", model, "--dataset", "digits", *few, *maps]) == 0
    assert "taken as 8x8 in grey" in capsys.readouterr().out


def test_diffusers_itself_loads_only_with_trust(tmp_path):
    latent_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path)
