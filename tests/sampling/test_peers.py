"""The pipeline against those of diffusers: the same images to the bit, and their pipelines with our model."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    KarrasVePipeline,
    KarrasVeScheduler,
    PNDMPipeline,
    PNDMScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
)

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from gaussian_unets import draw, generators, name_of
from tiny_unets import PLAIN


@pytest.mark.parametrize(
    ("scheduler", "peer", "options"),
    [
        (DDPMScheduler(), DDPMPipeline, {}),
        (DDPMScheduler(prediction_type="v_prediction", variance_type="fixed_large"), DDPMPipeline, {}),
        (DDIMScheduler(), DDIMPipeline, {}),
        (DDIMScheduler(), DDIMPipeline, {"eta": 0.7}),
        (
            DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
            DDIMPipeline,
            {},
        ),
        (PNDMScheduler(), PNDMPipeline, {}),
        (PNDMScheduler(skip_prk_steps=True, prediction_type="v_prediction"), PNDMPipeline, {}),
    ],
    ids=name_of,
)
def test_images_equal_those_of_diffusers_bit_for_bit(scheduler, peer, options):
    unet = UNet2DModel(**PLAIN).eval()
    ours = DIAUNetPipeline(DIAUNet2DModel.from_unet(unet, dia_attention="none"), scheduler)
    arguments = {"batch_size": 2, "num_inference_steps": 7, "output_type": "np"} | options
    expected = peer(unet, scheduler)(generator=torch.Generator().manual_seed(0), **arguments).images
    assert np.array_equal(ours(generator=torch.Generator().manual_seed(0), **arguments).images, expected)


@pytest.mark.parametrize(
    ("peer", "scheduler", "time"),
    [
        (DDPMPipeline, DDPMScheduler(), "positional"),
        (ScoreSdeVePipeline, ScoreSdeVeScheduler(), "fourier"),
        (KarrasVePipeline, KarrasVeScheduler(), "fourier"),
    ],
    ids=name_of,
)
def test_the_pipelines_of_diffusers_run_the_model(peer, scheduler, time):
    """Also those whose timesteps are noise levels, and that this project's pipeline has no loop for."""
    unet = UNet2DModel(**PLAIN, time_embedding_type=time).eval()
    model = DIAUNet2DModel.from_unet(unet)
    first, second = (
        peer(network, scheduler)(
            batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        for network in (unet, model)
    )
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), EulerDiscreteScheduler(), EDMEulerScheduler()], ids=name_of)
def test_latents_are_the_noise_that_would_be_drawn(scheduler):
    """They are scaled to the scheduler's first noise level here, as in diffusers' other pipelines."""
    unet = DIAUNet2DModel(**PLAIN).eval()
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators(4)])
    assert torch.equal(draw(unet, scheduler, steps=3, latents=noise), draw(unet, scheduler, steps=3))
