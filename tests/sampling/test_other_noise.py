"""The schedulers for EDM and for flows: each lands on a known distribution, and is refused where it does not fit."""

import json

import diffusers
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.errors import UsageError
from dia_diffusion.pipelines.noise import NoiseKind
from dia_diffusion.sampling.schedulers import FAMILIES, make_scheduler
from gaussian_unets import (
    MEAN,
    STD,
    EDMGaussianUNet,
    FlowGaussianUNet,
    ShrinkingUNet,
    assert_is_the_distribution,
    draw,
    generators,
)
from tiny_unets import PLAIN

# For each other kind of noise: a UNet that knows the answer, and the configuration that such a model is saved with.
OTHER_KINDS = {
    NoiseKind.EDM: (EDMGaussianUNet, EDMEulerScheduler()),
    NoiseKind.FLOW: (FlowGaussianUNet, FlowMatchEulerDiscreteScheduler()),
}
NAMED = [(kind, name) for kind in OTHER_KINDS for name in FAMILIES[kind].samplers]


@pytest.mark.parametrize(("kind", "name"), NAMED, ids=str)
def test_every_scheduler_of_edm_and_of_flows_lands_on_the_distribution(kind, name):
    unet, saved = OTHER_KINDS[kind]
    # More pixels than above, and more exact: mean and variance, and no covariance of neighbours or of images.
    images = draw(unet(sample_size=64), make_scheduler(name, saved.config))
    assert images.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert images.std().item() == pytest.approx(STD, abs=0.02)
    deviation = (images - images.mean()) / images.std()
    assert (deviation[..., 1:] * deviation[..., :-1]).mean().abs() < 0.03
    assert (deviation[0] * deviation[1]).mean().abs() < 0.05


@pytest.mark.parametrize("data", [0.2, 0.5, 1.5])
@pytest.mark.parametrize("name", FAMILIES[NoiseKind.EDM].samplers)
def test_sigma_data_goes_from_the_saved_scheduler_to_every_other(name, data):
    unet = EDMGaussianUNet()
    unet.data = data
    scheduler = make_scheduler(name, EDMDPMSolverMultistepScheduler(sigma_data=data, solver_order=3).config)
    assert_is_the_distribution(draw(unet, scheduler))
    assert scheduler.config.sigma_data == data
    assert scheduler.config.get("solver_order", 2) == 2


@pytest.mark.parametrize("name", FAMILIES[NoiseKind.FLOW].samplers)
def test_a_shift_goes_from_the_saved_scheduler_to_every_other(name):
    """The times of all samplers are shifted alike, and the distribution is still that of the data."""
    saved = make_scheduler("dpm", FlowMatchHeunDiscreteScheduler(shift=3.0).config).config
    scheduler = make_scheduler(name, json.loads(json.dumps(dict(saved))))
    assert_is_the_distribution(draw(FlowGaussianUNet(), scheduler))
    middle = scheduler.sigmas[len(scheduler.sigmas) // 2].item()
    assert middle == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("kind", "name"), NAMED, ids=str)
def test_a_pipeline_can_be_called_again_and_with_any_number_of_steps(kind, name, steps):
    """Their place among the steps, and Heun's first half, must not be left over from the call before."""
    unet, saved = OTHER_KINDS[kind]
    pipe = DIAUNetPipeline(unet(sample_size=8), make_scheduler(name, saved.config))
    pipe.set_progress_bar_config(disable=True)
    evaluated = []

    def stop(pipeline, index, timestep, tensors):
        evaluated.append(timestep)
        pipeline._interrupt = len(evaluated) == stop_at
        return tensors

    def images(**arguments):
        return pipe(4, steps, generators(4), output_type="latent", callback_on_step_end=stop, **arguments).images

    stop_at = 2
    images()
    stop_at, evaluated = 0, []
    first = images()
    assert first.isfinite().all()
    # All but the last of Heun's steps are two.
    assert len(evaluated) == (2 * steps - 1 if name == "heun" else steps) == len(pipe.scheduler.timesteps)
    assert torch.equal(images(), first)


@pytest.mark.parametrize("kind", NoiseKind)
@pytest.mark.parametrize("other", NoiseKind)
def test_a_scheduler_of_another_kind_is_refused_in_a_pipeline(kind, other):
    """Fresh, or made from the configuration of the one before: it would give noise, or something near to images."""
    saved = {NoiseKind.BETAS: DDPMScheduler()} | {key: value for key, (_, value) in OTHER_KINDS.items()}
    pipe = DIAUNetPipeline(ShrinkingUNet(), saved[kind])
    for class_name, options in FAMILIES[other].samplers.values():
        for scheduler in (
            getattr(diffusers, class_name)(**options),
            getattr(diffusers, class_name).from_config(json.loads(saved[kind].to_json_string()), **options),
        ):
            pipe.scheduler = scheduler
            if other is kind:
                assert pipe(num_inference_steps=5, output_type="latent").images.isfinite().all()
                continue
            with pytest.raises(UsageError, match=rf"{class_name} does not fit .*{kind.value}\.from_config"):
                pipe(num_inference_steps=2)


@pytest.mark.parametrize(("kind", "name"), NAMED, ids=str)
def test_models_of_edm_and_of_flows_in_half_precision(kind, name):
    unet = DIAUNet2DModel(**PLAIN).to(dtype=torch.bfloat16)
    images = draw(unet, make_scheduler(name, OTHER_KINDS[kind][1].config), steps=4)
    assert images.dtype == torch.bfloat16
    assert images.isfinite().all()
