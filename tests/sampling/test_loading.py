"""Pipelines as commands load them: variants of the weights, pipelines of diffusers, compiled ones."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.sampling.generation import check_sampling, find_advice, is_compiled, sample_images
from dia_diffusion.sampling.loading import load_pipeline
from dia_diffusion.sampling.schedulers import make_scheduler
from tiny_unets import GREY


def make_pipeline():
    torch.manual_seed(0)
    return DIAUNetPipeline(DIAUNet2DModel(**GREY, dia_hidden_size=8).eval(), DDIMScheduler())


def test_a_folder_with_one_variant_of_the_weights_loads_without_its_name(tmp_path):
    pipeline = make_pipeline()
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    expected = pipeline.unet.state_dict()
    for variant in (None, "fp16"):
        loaded = load_pipeline(str(tmp_path / "half"), variant=variant).unet
        assert loaded.dtype == torch.float32
        assert all(torch.equal(tensor, expected[name].float()) for name, tensor in loaded.state_dict().items())
    with pytest.raises(UsageError, match=r"no weights of the variant bf16\. Those here: fp16"):
        load_pipeline(str(tmp_path / "half"), variant="bf16")
    out = ["--steps", "1", "--num_images", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["sample", str(tmp_path / "half"), "--variant", "fp16", *out]) == 0
    # Where there are both, those without a variant count.
    make_pipeline().save_pretrained(tmp_path / "half")
    loaded = load_pipeline(str(tmp_path / "half")).unet.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in make_pipeline().unet.state_dict().items())


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "euler", "heun", "dpm_sde"])
def test_pipelines_of_diffusers_take_every_sampler(tmp_path, pipeline_class, scheduler):
    torch.manual_seed(0)
    unet, saved = UNet2DModel(**GREY).eval(), DDIMScheduler()
    pipeline_class(unet, saved).save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path), scheduler)
    assert loaded.name_or_path == str(tmp_path)
    ours = DIAUNetPipeline(unet, make_scheduler(scheduler, saved.config))
    (images,), (expected,) = (list(sample_images(pipeline, 2, 3)) for pipeline in (loaded, ours))
    assert (images.int() - expected.int()).abs().max() <= 1


def test_few_steps_of_a_sampler_for_many_are_warned_of(tmp_path, capsys):
    pipeline = DDPMPipeline(UNet2DModel(**GREY), DDPMScheduler())
    assert "DDPMScheduler is meant for 1,000 steps, and 25 give worse images" in find_advice(pipeline, 25)
    assert find_advice(pipeline, 250) is None
    assert find_advice(DDIMPipeline(pipeline.unet, DDIMScheduler()), 25) is None
    assert find_advice(make_pipeline(), 1) is None
    pipeline.save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--num_images", "1", "--output_dir", str(tmp_path / "out")]) == 0
    assert "warning: DDPMScheduler is meant for 1,000 steps" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [4, 6])
def test_models_of_many_channels_make_no_pictures(channels):
    unet = UNet2DModel(**GREY | {"in_channels": channels, "out_channels": channels})
    for pipeline in (DIAUNetPipeline(unet, DDIMScheduler()), DDIMPipeline(unet, DDIMScheduler())):
        with pytest.raises(UsageError, match=f"makes images of {channels} channels, and pictures have 1 or 3"):
            check_sampling(pipeline, 5)


def test_steps_that_a_scheduler_cannot_take_are_refused_for_any_pipeline():
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    unet = UNet2DModel(**GREY)
    for pipeline in (DIAUNetPipeline(unet, DDIMScheduler()), DDPMPipeline(unet, DDPMScheduler())):
        pipeline.scheduler = make_scheduler("kdpm2_ancestral", config)
        with pytest.raises(UsageError, match=r"num_inference_steps 5 does not fit KDPM2Anc.*not finite, whatever the"):
            check_sampling(pipeline, 5)


@pytest.mark.parametrize("classes", [None, 3])
def test_a_compiled_model_is_compiled_once_for_all_batches(classes):
    """The last batch is smaller, and the images are those of the model that is not compiled."""
    pipeline = make_pipeline()
    if classes:
        pipeline = DIAUNetPipeline(DIAUNet2DModel(**GREY, num_class_embeds=classes).eval(), DDIMScheduler())
    expected = torch.cat(list(sample_images(pipeline, 7, 3, batch_size=3)))
    compiled = []

    def count(module, inputs):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    pipeline.unet.compile(backend=count, fullgraph=True)
    assert is_compiled(pipeline)
    images = torch.cat(list(sample_images(pipeline, 7, 3, batch_size=3)))
    assert len(compiled) == 1
    assert images.shape == expected.shape
    assert np.abs(images.numpy().astype(int) - expected.numpy()).max() <= 1
    assert len(list(sample_images(pipeline, 4, 3, batch_size=250))) == 1
