"""Images while they are made."""

import math
import sys

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from autoencoders import random_vae
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.app.gates import draw_gates, gate_table
from dia_diffusion.app.stepwise import Request, StepwiseSampler, vary_noise
from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.sampling.generation import image_generators, sample_batch
from dia_diffusion.sampling.schedulers import make_scheduler
from tiny_unets import GREY


@pytest.fixture
def pipeline():
    torch.manual_seed(1)
    unet = DIAUNet2DModel(**GREY, num_class_embeds=4, dia_init="paper", dia_hidden_size=8)
    return DIAUNetPipeline(unet, make_scheduler("dpm_sde", DDPMScheduler().config))


def last_images(snapshots):
    return list(snapshots)[-1].images()


@pytest.mark.parametrize(
    "settings", [{}, {"class_label": 2}, {"class_label": 2, "guidance_scale": 3.0}, {"scheduler": "ddim"}, {"seed": 5}]
)
def test_the_images_are_those_of_dia_sample(pipeline, settings):
    snapshots = list(StepwiseSampler(pipeline).sample(Request((0, 1, 4), steps=4, **settings)))
    assert [(snapshot.step, snapshot.steps, snapshot.last) for snapshot in snapshots] == [
        *((step, 4, False) for step in range(1, 5)),
        (4, 4, True),
    ]
    other = dict(settings)
    if name := other.pop("scheduler", None):
        pipeline.scheduler = make_scheduler(name, pipeline.scheduler.config)
    assert torch.equal(snapshots[-1].images(), sample_batch(pipeline, (0, 1, 4), 4, **other))
    pictures = [snapshot.images() for snapshot in snapshots]
    assert {(picture.shape, picture.dtype) for picture in pictures} == {((3, 1, 8, 8), torch.uint8)}
    assert not torch.equal(pictures[-1], pictures[0])


def test_a_guide_is_followed(pipeline):
    pipeline.guide = DIAUNet2DModel.from_config(pipeline.unet.config).eval()
    request = Request((0, 1), steps=3, guidance_scale=2.0)
    made = last_images(StepwiseSampler(pipeline).sample(request))
    assert torch.equal(made, sample_batch(pipeline, (0, 1), 3, guidance_scale=2.0))
    assert not torch.equal(made, sample_batch(pipeline, (0, 1), 3))


def test_another_sampler_is_for_one_request(pipeline):
    sampler = StepwiseSampler(pipeline)
    own = last_images(sampler.sample(Request((0,), steps=3)))
    assert not torch.equal(own, last_images(sampler.sample(Request((0,), steps=3, scheduler="ddim"))))
    assert torch.equal(own, last_images(sampler.sample(Request((0,), steps=3))))


def test_gates_are_those_of_the_model_for_the_images_with_their_class(pipeline):
    snapshots = list(StepwiseSampler(pipeline).sample(Request((0, 1), steps=3, class_label=1, guidance_scale=2.0)))
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=one) for one in image_generators(0, (0, 1), "cpu")])
    maps = pipeline.unet.attention_maps(noise, int(snapshots[0].timestep), torch.tensor([1, 1]))
    assert snapshots[0].gates.keys() == maps.keys()
    for name, gate in maps.items():
        mean, spread = snapshots[0].gates[name]
        assert mean == pytest.approx(gate.mean().item(), rel=1e-5)
        assert spread == pytest.approx(gate.numpy().std(), rel=1e-4)
    blocks, timesteps, figures = gate_table(snapshots)
    assert blocks == list(maps)
    assert timesteps == sorted(timesteps, reverse=True)
    assert figures.shape == (2, len(blocks), 3)
    shown = draw_gates(snapshots).axes[0].images[0].get_array()
    assert (shown == figures[0]).all()


def test_without_the_attention_all_gates_are_1(pipeline):
    sampler, request = StepwiseSampler(pipeline), Request((0, 1), steps=4)
    bare = last_images(sampler.sample_without_attention(request))
    plain = DIAUNetPipeline(pipeline.unet.to_unet(), pipeline.scheduler)
    assert torch.equal(bare, sample_batch(plain, (0, 1), 4))
    assert not torch.equal(bare, last_images(sampler.sample(request)))


def test_a_variant_is_near_its_image_and_the_first_is_the_image(pipeline):
    sampler, request = StepwiseSampler(pipeline), Request(tuple(range(6)), steps=4, class_label=1)
    images = last_images(sampler.sample(request))
    varied = request.vary(3)
    assert (varied.numbers, varied.variation) == ((3,) * 6, 1)
    variants = last_images(sampler.sample(varied))
    assert torch.equal(variants[0], images[3])
    assert len({image.numpy().tobytes() for image in variants}) == 6
    assert not torch.equal(last_images(sampler.sample(varied.vary(0)))[1], variants[1])
    assert torch.equal(last_images(sampler.sample(varied)), variants)
    assert (request.vary().numbers, request.vary().again()) == (
        request.numbers,
        Request(request.numbers, 1, 4, class_label=1),
    )


def test_the_noise_of_variants_is_standard_normal_and_correlated_with_the_first(pipeline):
    large = DIAUNetPipeline(UNet2DModel(**GREY | {"sample_size": 128}), DDPMScheduler())
    noise = vary_noise(large, Request((7,) * 3, variation=1), image_generators(0, (7,) * 3, "cpu")).flatten(1)
    assert noise.std(dim=1).tolist() == pytest.approx([1.0] * 3, abs=0.02)
    correlation = torch.corrcoef(noise)
    near = math.cos(0.4 * math.pi / 2)
    assert correlation[0, 1:].tolist() == pytest.approx([near] * 2, abs=0.02)
    assert correlation[1, 2].item() == pytest.approx(near**2, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 2000}, "steps must be at most 1000"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"class_label": 9}, "class_labels must lie between 0 and 3"),
        ({"scheduler": "fast"}, "unknown scheduler 'fast'"),
    ],
)
def test_what_the_pipeline_refuses_is_refused_in_its_words(pipeline, settings, words):
    sampler = StepwiseSampler(pipeline)
    with pytest.raises(UsageError, match=words):
        list(sampler.sample(Request((0,), **settings)))
    assert last_images(sampler.sample(Request((0,), steps=1))).shape == (1, 1, 8, 8)


def test_who_stops_listening_stops_the_work(pipeline):
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    snapshots = StepwiseSampler(pipeline).sample(Request((0,), steps=1000))
    for _ in range(3):
        next(snapshots)
    snapshots.close()
    done = len(calls)
    assert done < 1000
    assert len(list(StepwiseSampler(pipeline).sample(Request((0,), steps=2)))) == 3
    assert len(calls) == done + 2


def test_pipelines_of_diffusers_are_shown_or_refused():
    torch.manual_seed(0)
    plain = DDPMPipeline(UNet2DModel(**GREY), DDIMScheduler())
    sampler = StepwiseSampler(plain)
    assert not sampler.has_attention
    snapshots = list(sampler.sample(Request((0, 1), steps=2)))
    assert snapshots[0].gates == {}
    with pytest.raises(UsageError, match="no attention"):
        sampler.sample_without_attention(Request((0,)))
    with pytest.raises(UsageError, match="class_labels were given"):
        list(sampler.sample(Request((0,), steps=2, class_label=1)))

    class Other(DDPMPipeline):
        def __call__(self, prompt):
            raise AssertionError

    with pytest.raises(UsageError, match="images of 4 channels, and pictures have 1 or 3"):
        StepwiseSampler(DIAUNetPipeline(UNet2DModel(**GREY | {"in_channels": 4, "out_channels": 4}), DDIMScheduler()))
    with pytest.raises(UsageError, match="choose an unconditional pipeline"):
        StepwiseSampler(Other(UNet2DModel(**GREY), DDIMScheduler()))


def test_a_new_request_stops_one_that_nobody_listens_to(pipeline):
    sampler = StepwiseSampler(pipeline)
    left = sampler.sample(Request((0,), steps=1000))
    next(left)
    assert last_images(sampler.sample(Request((0,), steps=2))).shape == (1, 1, 8, 8)
    with pytest.raises(UsageError, match="a newer request"):
        list(left)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: the page needs Gradio: pip install 'dia-diffusion[app]'.\n"


@pytest.mark.parametrize("kind", ["flow", "latents"])
def test_other_kinds_of_pipelines_are_shown_as_they_are_sampled(kind):
    torch.manual_seed(1)
    if kind == "flow":
        pipeline = DIAUNetPipeline(DIAUNet2DModel(**GREY, dia_init="paper"), FlowMatchEulerDiscreteScheduler())
    else:
        unet = DIAUNet2DModel(**GREY | {"in_channels": 2, "out_channels": 2}, dia_init="paper")
        scheduler = DDIMScheduler(clip_sample=False)
        pipeline = DIAUNetPipeline(unet, scheduler, vae=random_vae())
    snapshots = list(StepwiseSampler(pipeline).sample(Request((0, 5), steps=3)))
    assert torch.equal(snapshots[-1].images(), sample_batch(pipeline, (0, 5), 3))
    assert snapshots[0].images().shape == snapshots[-1].images().shape
    assert len(snapshots[0].gates) == 8


def test_a_model_that_no_sampler_fits_is_refused_before_its_page_is_shown():
    pipeline = ConsistencyModelPipeline(UNet2DModel(**GREY), CMStochasticIterativeScheduler())
    with pytest.raises(UsageError, match="CMStochasticIterativeScheduler, does not fit"):
        StepwiseSampler(pipeline)
