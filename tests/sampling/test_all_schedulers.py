"""Every sampler with every spacing of its timesteps and many numbers of steps: right images, or a reason at once."""

import inspect

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.errors import UsageError
from dia_diffusion.pipelines.noise import NoiseKind
from dia_diffusion.sampling.schedulers import FAMILIES, make_scheduler
from gaussian_unets import MEAN, EDMGaussianUNet, FlowGaussianUNet, GaussianUNet, draw, generators
from tiny_unets import PLAIN

STEPS = [1, 2, 3, 4, 5, 6, 7, 9, 10, 13, 25, 37, 60]
# For each noise schedule: its options, and what the model predicts.
MODELS = {
    "linear": {"prediction_type": "epsilon"},
    "cosine": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "zero-snr-sample": {"prediction_type": "sample", "rescale_betas_zero_snr": True},
    "sigmoid": {"prediction_type": "epsilon", "beta_schedule": "sigmoid"},
}
OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


class NearlyOneImage:
    """A distribution so narrow that few steps land on it: what is left after sampling is the sampler's error."""

    width = 0.02

    def forward(self, sample, timestep, class_labels=None):
        self.evaluations += 1
        return super().forward(sample, timestep, class_labels)


def narrow(unet_class, **arguments):
    unet = type(f"Narrow{unet_class.__name__}", (NearlyOneImage, unet_class), {"evaluations": 0})(
        **{"sample_size": 8} | arguments
    )
    return unet


@pytest.fixture(autouse=True)
def _narrow_distribution(monkeypatch):
    monkeypatch.setattr("gaussian_unets.STD", NearlyOneImage.width)


def sweep(make_unet, make):
    """Return the numbers of steps that were refused, each with the words."""
    refused = {}
    for steps in STEPS:
        unet = make_unet()
        try:
            images = draw(unet, make(), steps=steps)
        except UsageError as error:
            refused[steps] = str(error)
        if steps in refused:
            assert unet.evaluations == 0, f"refused after a step: {refused[steps]}"
            assert "diverged" not in refused[steps]
            continue
        assert images.isfinite().all(), steps
        assert images.mean().item() == pytest.approx(MEAN, abs=0.05), steps
        assert images.std().item() < 0.12, steps
    return refused


def unet_of(config):
    """A UNet that knows the answer for the noise schedule of a configuration."""
    unet = narrow(GaussianUNet, kind=config.prediction_type)
    signal = DDPMScheduler.from_config(config).alphas_cumprod.double().clamp(min=2**-24)
    unet.sigmas = ((1 - signal) / signal).sqrt()
    return unet


@pytest.mark.parametrize("model", MODELS)
def test_samplers_by_name(model):
    config = DDPMScheduler(clip_sample=False, **MODELS[model]).config
    for name in FAMILIES[NoiseKind.BETAS].samplers:
        refused = sweep(lambda: unet_of(config), lambda name=name: make_scheduler(name, config))
        # Those that diffusers wrote for other predictions fail with any number of steps, and others with a few.
        assert len(refused) <= 7 or (len(refused) == len(STEPS) and model == "zero-snr-sample"), (name, refused)


@pytest.mark.parametrize("kind", [NoiseKind.EDM, NoiseKind.FLOW])
def test_samplers_of_other_kinds_take_any_number_of_steps(kind):
    config = (EDMEulerScheduler() if kind == NoiseKind.EDM else FlowMatchEulerDiscreteScheduler()).config
    unet_class = EDMGaussianUNet if kind == NoiseKind.EDM else FlowGaussianUNet
    for name in FAMILIES[kind].samplers:
        assert not sweep(lambda: narrow(unet_class), lambda name=name: make_scheduler(name, config)), name


@pytest.mark.parametrize("model", ["linear", "cosine"])
def test_other_spacings_of_schedulers_that_are_given(model):
    config = DDPMScheduler(clip_sample=False, **MODELS[model]).config
    for name, (class_name, options) in FAMILIES[NoiseKind.BETAS].samplers.items():
        scheduler_class = getattr(diffusers, class_name)
        own = inspect.signature(scheduler_class.__init__).parameters
        settings = [{sigmas: True, "timestep_spacing": "trailing"} for sigmas in OTHER_SIGMAS if sigmas in own]
        if "timestep_spacing" in own:
            settings += [{"timestep_spacing": spacing} for spacing in ("leading", "linspace")]
        for setting in settings:
            refused = sweep(lambda: unet_of(config), lambda: scheduler_class.from_config(config, **options, **setting))
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
        assert images.mean().item() == pytest.approx(MEAN, abs=0.05)
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.005), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("kind", [*MODELS, NoiseKind.EDM, NoiseKind.FLOW])
def test_half_precision_of_the_network_leaves_the_sampler_in_float32(kind, dtype, tolerance):
    """Images of a half-precision UNet are those of the same weights in float32, whichever sampler."""
    saved = {NoiseKind.EDM: EDMEulerScheduler(), NoiseKind.FLOW: FlowMatchEulerDiscreteScheduler()}
    config = (saved.get(kind) or DDPMScheduler(**MODELS[kind])).config
    torch.manual_seed(0)
    half = DIAUNet2DModel(**PLAIN).eval().to(dtype)
    full = DIAUNet2DModel(**PLAIN).eval()
    full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    family = FAMILIES[kind if isinstance(kind, NoiseKind) else NoiseKind.BETAS]
    for name in family.samplers:
        images = []
        for unet in (half, full):
            pipe = DIAUNetPipeline(unet, make_scheduler(name, config))
            pipe.set_progress_bar_config(disable=True)
            try:
                images.append(pipe(2, 10, generators(2), output_type="np").images)
            except UsageError:
                assert unet is half
                assert kind in ("zero-snr-sample", "cosine")
                break
        if len(images) == 2:
            assert abs(images[0] - images[1]).mean() < tolerance, name
            assert images[0].std() > 0.01
