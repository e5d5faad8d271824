"""Every sampler with every spacing of its timesteps and many numbers of steps: right images, or a reason at once."""

import inspect
import json

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from dia_diffusion.errors import UsageError
from dia_diffusion.pipelines.noise import NoiseKind
from dia_diffusion.sampling.schedulers import FAMILIES, make_scheduler
from gaussian_unets import MEAN, EDMGaussianUNet, FlowGaussianUNet, GaussianUNet, draw

STEPS = [1, 2, 3, 4, 5, 7, 10, 25, 60]
# For each noise schedule: its options, and what the model predicts.
MODELS = {
    "linear": {"prediction_type": "epsilon"},
    "cosine": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "zero-snr-sample": {"prediction_type": "sample", "rescale_betas_zero_snr": True},
    "cosine-epsilon": {"prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2"},
}
NEVER = {("cosine-epsilon", "pndm")} | {
    ("zero-snr-sample", name) for name in ("pndm", "euler_ancestral", "kdpm2", "kdpm2_ancestral")
}
OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def narrow(unet_class, **arguments):
    """A UNet that knows the answer for a narrow and a wide distribution of pixels, and counts its calls."""

    class Counting(unet_class):
        evaluations = 0

        def noise_level(self, timestep):
            # Between two timesteps log sigma is linear, as where samplers look for the timestep of a level.
            timestep = torch.as_tensor(timestep).double().clamp(0, 999)
            low, logs = timestep.floor().long(), self.sigmas.log()
            return torch.lerp(logs[low], logs[(low + 1).clamp(max=999)], timestep - low).exp()

        def forward(self, sample, timestep, class_labels=None):
            self.evaluations += 1
            return super().forward(sample, timestep, class_labels)

    return Counting(**{"sample_size": 8} | arguments)


@pytest.fixture(autouse=True)
def _widths(monkeypatch):
    """Two images of a distribution so narrow that few steps land on it, and two of a wide one."""
    monkeypatch.setattr("gaussian_unets.STD", torch.tensor([1e-4, 1e-4, 0.4, 0.4]).view(-1, 1, 1, 1).double())


def sweep(unet, scheduler, numbers=STEPS):
    """Return the numbers of steps that were refused, each with the words."""
    refused = {}
    for steps in numbers:
        before = unet.evaluations
        try:
            images = draw(unet, scheduler, steps=steps)
        except UsageError as error:
            refused[steps] = str(error)
        if steps in refused:
            assert unet.evaluations == before, f"refused after a step: {refused[steps]}"
            assert "diverged" not in refused[steps]
            continue
        assert images.isfinite().all(), steps
        if steps == 1 and any(scheduler.config.get(name) for name in OTHER_SIGMAS):
            continue  # A single step of 157 sigma magnifies the rounding of its timestep.
        assert images[:2].mean().item() == pytest.approx(MEAN, abs=0.1), steps
        assert images[:2].std().item() < 0.1, steps
        # Few steps give less contrast than there should be, and never much more.
        assert images[2:].std().item() < 1.3, steps
    return refused


def unet_of(config):
    """A UNet that knows the answer for the noise schedule of a configuration."""
    unet = narrow(GaussianUNet, kind=config.prediction_type)
    signal = DDPMScheduler.from_config(config).alphas_cumprod.double().clamp(min=1e-12)
    unet.sigmas = ((1 - signal) / signal).sqrt()
    return unet


@pytest.mark.parametrize("model", MODELS)
def test_samplers_by_name(model):
    config = DDPMScheduler(clip_sample=False, **MODELS[model]).config
    unet = unet_of(config)
    for name in FAMILIES[NoiseKind.BETAS].samplers:
        refused = sweep(unet, make_scheduler(name, config))
        # Samplers that diffusers wrote for other predictions fail with any number of steps, and others with a few.
        assert len(refused) <= 6 or (model, name) in NEVER, (name, refused)


@pytest.mark.parametrize("kind", [NoiseKind.EDM, NoiseKind.FLOW])
def test_samplers_of_other_kinds_take_any_number_of_steps(kind):
    config = (EDMEulerScheduler() if kind == NoiseKind.EDM else FlowMatchEulerDiscreteScheduler()).config
    unet_class = EDMGaussianUNet if kind == NoiseKind.EDM else FlowGaussianUNet
    for name in FAMILIES[kind].samplers:
        assert not sweep(narrow(unet_class), make_scheduler(name, config)), name


@pytest.mark.parametrize("model", ["linear", "cosine"])
def test_other_spacings_of_schedulers_that_are_given(model):
    # As a saved model gives it: other schedulers have other defaults, and take them for what was not given to this one.
    config = json.loads(DDPMScheduler(clip_sample=False, **MODELS[model]).to_json_string())
    unet = unet_of(DDPMScheduler.from_config(config).config)
    for name, (class_name, options) in FAMILIES[NoiseKind.BETAS].samplers.items():
        scheduler_class = getattr(diffusers, class_name)
        own = inspect.signature(scheduler_class.__init__).parameters
        settings = [{sigmas: True, "timestep_spacing": "trailing"} for sigmas in OTHER_SIGMAS if sigmas in own]
        if "timestep_spacing" in own:
            settings += [{"timestep_spacing": spacing} for spacing in ("leading", "linspace")]
        for setting in settings:
            refused = sweep(unet, scheduler_class.from_config(config, **options, **setting), [1, 2, 7, 25])
            for steps, words in refused.items():
                assert class_name in words, (name, setting)
                assert "num_inference_steps" not in words or f"num_inference_steps {steps} does not fit" in words


@pytest.mark.parametrize(
    ("options", "steps", "words"),
    [
        ({"shift_terminal": 0.1}, 1, "shift_terminal 0.1 sets the last of several times.*such as 2"),
        ({"shift_terminal": 0.1}, 2, None),
        ({"use_dynamic_shifting": True}, 3, None),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 25, None),
        ({"use_karras_sigmas": True}, 4, None),
    ],
)
def test_options_of_a_flow(options, steps, words):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    if words is None:
        images = draw(narrow(FlowGaussianUNet), scheduler, steps=steps)
        assert images[:2].mean().item() == pytest.approx(MEAN, abs=0.05)
        return
    with pytest.raises(UsageError, match=words):
        draw(narrow(FlowGaussianUNet), scheduler, steps=steps)


@pytest.mark.parametrize("size", [8, 32])
def test_the_shift_of_a_flow_follows_the_size_as_in_diffusers(size):
    """`mu` is linear in the number of pixels: 0.5 at 256 of them and 1.15 at 4,096, by the defaults."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    draw(narrow(FlowGaussianUNet, sample_size=size), scheduler, steps=4)
    expected = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    expected.set_timesteps(4, mu=calculate_shift(size * size))
    assert torch.equal(scheduler.sigmas, expected.sigmas)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("kind", [*list(MODELS)[:-1], NoiseKind.EDM, NoiseKind.FLOW])
def test_a_half_precision_network_leaves_the_sampler_in_float32(kind, dtype, tolerance):
    """Input and output of the network are rounded, and the images are nearly those of float32, whichever sampler."""
    saved = {
        NoiseKind.EDM: (EDMGaussianUNet, EDMEulerScheduler()),
        NoiseKind.FLOW: (FlowGaussianUNet, FlowMatchEulerDiscreteScheduler()),
    }
    if kind in saved:
        config = saved[kind][1].config
        full, half = (narrow(saved[kind][0]) for _ in range(2))
    else:
        config = DDPMScheduler(**MODELS[kind]).config
        full, half = unet_of(config), unet_of(config)
    half.to(dtype)
    for name in FAMILIES[kind if kind in saved else NoiseKind.BETAS].samplers:
        try:
            expected = draw(full, make_scheduler(name, config), steps=15, output_type="pt")
        except UsageError:
            assert (kind, name) in NEVER
            continue
        images = draw(half, make_scheduler(name, config), steps=15, output_type="pt")
        assert images.dtype == dtype
        assert expected.std() > 0.05
        assert (images.float() - expected).square().mean().sqrt() < tolerance, name
