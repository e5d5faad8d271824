"""Autoguidance: a worse model as an optional component of the pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from autoencoders import random_vae
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.sampling.generation import sample_batch
from dia_diffusion.sampling.loading import load_pipeline
from dia_diffusion.scoring.images import PipelineImages
from environments import run_python
from tiny_unets import GREY


def unet(seed=0, width=16, **arguments):
    torch.manual_seed(seed)
    made = DIAUNet2DModel(**GREY | {"block_out_channels": (width, 2 * width), "dia_hidden_size": 8} | arguments).eval()
    for decoder in made.dia.decoders.values():
        torch.nn.init.normal_(decoder.weight)
    return made


def pipeline(seed=0, scheduler=None, guide=None, **arguments):
    return DIAUNetPipeline(unet(seed, **arguments), scheduler or DDIMScheduler(clip_sample=False), guide=guide)


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_prediction_goes_on_beyond_that_of_the_guide(scheduler, classes):
    pipe = pipeline(0, scheduler(), unet(1, 8, num_class_embeds=classes), num_class_embeds=classes)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = None if classes is None else torch.tensor([0, 2])
    pipe.scheduler.set_timesteps(1)
    timestep = pipe.scheduler.timesteps[0]
    start = latents * getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    seen = getattr(pipe.scheduler, "scale_model_input", lambda sample, timestep: sample)(start, timestep)
    with torch.no_grad():
        good, worse = (model(seen, timestep, labels).sample for model in (pipe.unet, pipe.guide))
    expected = pipe.scheduler.step(2.5 * good + (1 - 2.5) * worse, timestep, start).prev_sample
    arguments = {"batch_size": 2, "num_inference_steps": 1, "latents": latents, "output_type": "latent"}
    arguments["class_labels"] = labels
    torch.testing.assert_close(pipe(guidance_scale=2.5, **arguments).images, expected)
    assert not torch.allclose(pipe(**arguments).images, expected)
    # Whatever the scale, a guide that is no worse changes nothing.
    pipe.guide = pipe.unet
    torch.testing.assert_close(pipe(guidance_scale=2.5, **arguments).images, pipe(**arguments).images)


def test_a_pipeline_with_a_guide_is_saved_whole(tmp_path, diffusers_only):
    guided = pipeline(0, guide=unet(1, 8))
    guided.save_pretrained(tmp_path / "guided")
    pipeline(0).save_pretrained(tmp_path / "alone")
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    expected = guided(generator=torch.Generator().manual_seed(0), **arguments).images
    given = DIAUNetPipeline.from_pretrained(tmp_path / "alone", guide=unet(1, 8))
    for pipe in (DIAUNetPipeline.from_pretrained(tmp_path / "guided"), given, DIAUNetPipeline.from_pipe(guided)):
        images = pipe(generator=torch.Generator().manual_seed(0), **arguments).images
        # The last bits hang on where weights lie in memory.
        np.testing.assert_allclose(images, expected, atol=1e-5)
    assert DIAUNetPipeline.from_pretrained(tmp_path / "alone").guide is None
    code = (
        "import torch; from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('guided', trust_remote_code=True)\n"
        f"print(pipe(generator=torch.Generator().manual_seed(0), **{arguments}).images.tolist())"
    )
    home = {"HF_HOME": str(tmp_path / "home")}
    images = json.loads(run_python(code, python=diffusers_only, folder=tmp_path, **home))
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_guides_that_do_not_fit_are_refused(tmp_path):
    classes = {"num_class_embeds": 4}
    others = {
        "size": pipeline(sample_size=16),
        "classes": pipeline(**classes),
        "prediction": pipeline(scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False)),
        "noise": pipeline(scheduler=FlowMatchEulerDiscreteScheduler()),
        "latents": DIAUNetPipeline(unet(), DDIMScheduler(clip_sample=False), vae=random_vae()),
        "ddpm": DDPMPipeline(unet(), DDPMScheduler(clip_sample=False)),
    }
    for name, other in others.items():
        other.save_pretrained(tmp_path / name)
    pipeline().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    for name, words in (
        ("size", "its sample_size is 16, and the model's 8"),
        ("classes", "its num_class_embeds is 4, and the model's None"),
        ("prediction", "its prediction_type is v_prediction, and the model's epsilon"),
        ("noise", "its kind of noise is"),
        ("latents", "its VAE is"),
        ("nowhere", "cannot load a pipeline from"),
    ):
        with pytest.raises(UsageError, match=words):
            load_pipeline(model, guide=str(tmp_path / name))
    assert isinstance(load_pipeline(model, guide=str(tmp_path / "ddpm")).guide, DIAUNet2DModel)
    with pytest.raises(UsageError, match=r"must be DIAUNetPipelines, but these are .*DDPMPipeline"):
        load_pipeline(str(tmp_path / "ddpm"), guide=model)
    with pytest.raises(UsageError, match="the guide has num_class_embeds 4, and the UNet None"):
        pipeline(guide=unet(**classes))(guidance_scale=2.0)
    with pytest.raises(UsageError, match="or one with a guide"):
        sample_batch(pipeline(), [0], 1, guidance_scale=2.0)


def test_a_guide_on_the_command_line(tmp_path, capsys):
    for name, seed in (("model", 0), ("worse", 1)):
        pipeline(seed).save_pretrained(tmp_path / name)
    model, guide = str(tmp_path / "model"), ["--guide", str(tmp_path / "worse")]
    made = {}
    for name, more in {"alone": [], "guided": [*guide, "--guidance_scale", "3"]}.items():
        options = ["--num_images", "2", "--steps", "3", "--output_dir", str(tmp_path / name), *more]
        assert main(["sample", model, *options]) == 0
        made[name] = np.asarray(Image.open(tmp_path / name / "00001.png"))
        assert ("DDIMScheduler, guidance 3 (by its guide), seed 0" in capsys.readouterr().out) == bool(more)
    assert not np.array_equal(*made.values())
    pipe = DIAUNetPipeline.from_pretrained(model, guide=unet(1))
    # The layout of the weights in memory moves the last bits.
    expected = sample_batch(pipe, [0, 1], 3, guidance_scale=3.0)[1, 0].numpy().astype(int)
    assert np.abs(made["guided"] - expected).max() <= 1
    assert main(["sample", model, *guide, "--output_dir", str(tmp_path / "nothing")]) == 2
    assert "a guide does nothing at guidance_scale 1" in capsys.readouterr().err
    assert (
        main(
            [
                "evaluate",
                str(tmp_path / "alone"),
                "--dataset",
                "digits",
                "--features",
                "pixels",
                *guide,
                "--guidance_scale",
                "2",
            ]
        )
        == 2
    )
    assert "guide have no effect on images that are made already" in capsys.readouterr().err


def test_scores_with_a_guide_are_told_from_those_without():
    """Classifier-free guidance of the same strength is another way to sample, and another guide another origin."""
    classes = {"num_class_embeds": 4}
    pipes = [pipeline(**classes), pipeline(guide=unet(1, **classes), **classes)]
    free, guided = (PipelineImages(pipe, 2, 1, guidance_scale=2.0) for pipe in pipes)
    assert free.settings != guided.settings
    assert free.origin != guided.origin
    unguided = [PipelineImages(pipe, 2, 1).settings for pipe in pipes]
    assert unguided[0] == unguided[1]
