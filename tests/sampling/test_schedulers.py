"""Every scheduler of diffusers in the pipeline, against a distribution that is known exactly."""

import json

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    schedulers,
)
from diffusers.utils import dummy_torch_and_scipy_objects

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.errors import UsageError
from dia_diffusion.pipelines.noise import NoiseKind
from dia_diffusion.sampling.schedulers import FAMILIES, make_scheduler
from gaussian_unets import MEAN, STD, GaussianUNet, ShrinkingUNet, assert_is_the_distribution, draw
from tiny_unets import PLAIN

# By schedules of betas; those for EDM and for flows are in `test_other_noise.py`.
SCHEDULERS = FAMILIES[NoiseKind.BETAS].samplers
# Those that diffusers has for the prediction of noise and velocity only.
WITHOUT_SAMPLE = {"pndm", "euler_ancestral", "kdpm2", "kdpm2_ancestral"}
# With 20 timesteps of the cosine schedule: refused, for their images have far more contrast than the data.
OVERSHOOTING = {("pndm", 2), ("pndm", 5), ("heun", 2), ("heun", 5), ("kdpm2_ancestral", 2)}
# Accepted by the pipeline, but not for models trained here: see `FAMILIES`.
OTHERS = {
    "CogVideoXDDIMScheduler": "another noise schedule",
    "DDIMParallelScheduler": "DDIM, for another pipeline",
    "DDPMParallelScheduler": "DDPM, for another pipeline",
    "DDIMInverseScheduler": "from images to noise",
    "DPMSolverMultistepInverseScheduler": "from images to noise",
    "DPMSolverSDEScheduler": "draws its noise by itself",
    "LCMScheduler": "for distilled models",
    "TCDScheduler": "for distilled models",
    "UnCLIPScheduler": "one noise schedule only",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in SCHEDULERS
        for kind in ("epsilon", "v_prediction", "sample")
        if kind != "sample" or name not in WITHOUT_SAMPLE
    ],
)
def test_a_scheduler_lands_on_the_distribution(name, kind):
    # Clipping to [-1, 1] would cut off the tails of the distribution.
    scheduler = make_scheduler(name, DDPMScheduler(prediction_type=kind, clip_sample=False).config)
    assert_is_the_distribution(draw(GaussianUNet(kind), scheduler))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_every_timestep_spacing_of_a_scheduler_that_is_given(scheduler_class, spacing):
    config = DDPMScheduler(timestep_spacing=spacing, clip_sample=False).config
    assert_is_the_distribution(draw(GaussianUNet(), scheduler_class.from_config(config)))


@pytest.mark.parametrize("steps", [100, 500, 1000])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm", "dpm_sde", "unipc"])
def test_any_number_of_steps_from_the_highest_noise_level(name, steps):
    """As "leading" 500 steps would start at timestep 500 in some samplers, and 1,000 would be too many."""
    scheduler = make_scheduler(name, DDPMScheduler(timestep_spacing="leading", clip_sample=False).config)
    assert_is_the_distribution(draw(GaussianUNet(sample_size=16), scheduler, steps=steps))
    assert scheduler.timesteps[0] == 999
    assert scheduler.timesteps.min() == 0 or steps < 1000
    assert len(scheduler.timesteps.unique()) == steps
    assert scheduler.config.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("name", "steps", "words"),
    [
        ("ddpm", 61, "below the last timestep.*such as 50"),
        ("dpm_sde", 223, "below the last timestep.*such as 200"),
        ("ddim", 600, "goes down by 1 timesteps where the next one is 1.67 below.*such as 500"),
        ("pndm", 600, "such as 500"),
    ],
)
def test_steps_that_diffusers_would_not_take_from_one_timestep_to_the_next_are_refused(name, steps, words):
    scheduler = make_scheduler(name, DDPMScheduler().config)
    with pytest.raises(UsageError, match=words):
        draw(GaussianUNet(sample_size=16), scheduler, steps=steps)


def test_a_model_in_a_folder_starts_at_the_last_timestep_whatever_it_was_saved_with():
    saved = json.loads(make_scheduler("dpm", DDPMScheduler(timestep_spacing="leading").config).to_json_string())
    for name in SCHEDULERS:
        scheduler = make_scheduler(name, saved | {"timestep_spacing": "leading"})
        scheduler.set_timesteps(500)
        assert scheduler.timesteps[0] == 999, name


@pytest.mark.parametrize("saved_by", SCHEDULERS)
def test_every_scheduler_starts_from_what_every_other_saved(saved_by):
    """Options of one sampler have other values in another: algorithm_type, solver_type, orders, noise levels."""
    trained = DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2", clip_sample=False)
    config = json.loads(make_scheduler(saved_by, trained.config).to_json_string())
    for name in SCHEDULERS:
        fresh = make_scheduler(name, trained.config)
        for steps in (1, 2, 5, 20):
            # Bounded predictions, whatever the model.
            try:
                expected = draw(ShrinkingUNet(), fresh, steps=steps)
            except UsageError:
                assert (name, steps) in OVERSHOOTING
                continue
            images = draw(ShrinkingUNet(), make_scheduler(name, config), steps=steps)
            assert torch.equal(images, expected), (name, steps)
            assert images.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm_type": "dpmsolver", "solver_type": "heun", "solver_order": 3, "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "euler_at_final": True, "lower_order_final": False},
        {"use_exponential_sigmas": True, "use_lu_lambdas": True, "timestep_spacing": "linspace"},
        {"predictor_order": 9, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    ],
)
def test_options_of_another_sampler_do_not_reach_the_one_that_is_named(options):
    plain = json.loads(DDPMScheduler(clip_sample=False).to_json_string())
    for name in SCHEDULERS:
        expected = draw(ShrinkingUNet(), make_scheduler(name, plain), steps=4)
        assert torch.equal(draw(ShrinkingUNet(), make_scheduler(name, plain | options), steps=4), expected), name


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [({"beta_schedule": "sigmoid"}, "epsilon"), ({"rescale_betas_zero_snr": True}, "v_prediction")],
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_noise_schedule_that_not_all_samplers_can_make(name, schedule, kind):
    trained = DDPMScheduler(clip_sample=False, prediction_type=kind, **schedule)
    unet, signal = GaussianUNet(kind, sample_size=16), trained.alphas_cumprod.double().clamp(min=2**-24)
    unet.sigmas = ((1 - signal) / signal).sqrt()
    images = draw(unet, make_scheduler(name, trained.config))
    assert images.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert images.std().item() == pytest.approx(STD, abs=0.06)


@pytest.mark.parametrize(
    ("name", "config", "fitting"),
    [
        ("ddim", EDMEulerScheduler().config, "use euler, dpm, dpm_sde"),
        ("ddim", FlowMatchEulerDiscreteScheduler().config, "use euler, heun, dpm"),
        ("heun", EDMEulerScheduler().config, "use euler, dpm, dpm_sde"),
    ],
)
def test_a_model_of_another_kind_of_noise_is_refused(name, config, fitting):
    with pytest.raises(UsageError, match=f"scheduler '{name}' does not fit this model.*{fitting}"):
        make_scheduler(name, config)
    with pytest.raises(UsageError, match=r"unknown scheduler 'foo'\. Choose one of: euler, "):
        make_scheduler("foo", config)


@pytest.mark.parametrize(
    "config", [{}, {"beta_schedule": "linear", "use_flow_sigmas": True}, {"sigma_data": 0.5, "prediction_type": "v"}]
)
def test_a_model_whose_noise_no_sampler_knows_is_refused(config):
    with pytest.raises(UsageError, match="no scheduler but its own"):
        make_scheduler("ddim", config)


@pytest.mark.parametrize("steps", [0, -1, 21])
def test_steps_that_there_are_not(steps):
    scheduler = make_scheduler("dpm_sde", DDPMScheduler(num_train_timesteps=20).config)
    words = rf"num_inference_steps {steps} does not fit .* \(20\)" if steps > 0 else rf"at least 1, but is {steps}\."
    with pytest.raises(UsageError, match=words):
        draw(ShrinkingUNet(), scheduler, steps=steps)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [True, False])
def test_values_that_are_not_finite_are_no_images(value, clip):
    """An infinite prediction, clipped, would be a white image."""
    unet = ShrinkingUNet()
    unet.factor = value
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(UsageError, match="the model 'ShrinkingUNet' gives values that are not finite"):
            draw(unet, DDIMScheduler(clip_sample=clip), steps=2, output_type=output_type)
    assert draw(unet, DDIMScheduler(clip_sample=clip), steps=2).shape == (4, 1, 4, 4)


@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_other_noise_levels(sigmas):
    config = DDPMScheduler(clip_sample=False).config
    assert_is_the_distribution(draw(GaussianUNet(), EulerDiscreteScheduler.from_config(config, **{sigmas: True})))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_eta_adds_the_noise_of_ddim(eta):
    scheduler = DDIMScheduler(clip_sample=False)
    images = draw(GaussianUNet(), scheduler, eta=eta)
    assert_is_the_distribution(images)
    assert (images - draw(GaussianUNet(), scheduler)).abs().max() > 0.1


def test_the_sde_solver_with_its_own_noise():
    pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler needs torchsde")
    scheduler = diffusers.DPMSolverSDEScheduler.from_config({"beta_start": 1e-4, "beta_end": 0.02})
    assert_is_the_distribution(draw(GaussianUNet(), scheduler, steps=50))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_does_not_change_with_the_scheduler(name):
    """The betas of a configuration that was never saved are kept too, where another scheduler has other defaults."""
    trained = DDPMScheduler()
    scheduler = make_scheduler(name, trained.config)
    torch.testing.assert_close(scheduler.betas, trained.betas)
    assert scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("class_name", "options", "words"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "does not follow the noise schedule 'linear'"),
        ("FlowMatchHeunDiscreteScheduler", {}, "does not follow the noise schedule 'linear'"),
        ("FlowMatchLCMScheduler", {}, "for models of another kind"),
        ("CMStochasticIterativeScheduler", {}, "no prediction_type"),
        ("IPNDMScheduler", {}, "no prediction_type"),
        ("ScoreSdeVeScheduler", {}, "no prediction_type"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow matching"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow matching"),
        ("EDMEulerScheduler", {}, "does not follow the noise schedule 'linear'"),
        ("CogVideoXDPMScheduler", {}, "its steps need .*old_pred_original_sample"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(class_name, options, words):
    saved = json.loads(DDPMScheduler().to_json_string())
    scheduler = getattr(diffusers, class_name).from_config(saved, **options)
    with pytest.raises(UsageError, match=rf"{class_name} does not fit .*{words}.*DDIMScheduler\.from_config"):
        draw(GaussianUNet(), scheduler)


@pytest.mark.parametrize("name", sorted(WITHOUT_SAMPLE))
def test_a_prediction_type_that_a_scheduler_does_not_have_is_refused(name):
    scheduler = make_scheduler(name, DDPMScheduler(prediction_type="sample").config)
    with pytest.raises(UsageError, match=r"cannot be used here: prediction_type.*sample"):
        draw(GaussianUNet("sample"), scheduler)


def test_a_scheduler_whose_package_is_missing(monkeypatch):
    # What diffusers puts in its place where scipy is not installed.
    stand_in = dummy_torch_and_scipy_objects.LMSDiscreteScheduler
    monkeypatch.setattr("diffusers.utils.import_utils._scipy_available", False)
    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", stand_in)
    message = "scheduler 'lms' cannot be used here: .*LMSDiscreteScheduler requires the scipy library"
    with pytest.raises(UsageError, match=message):
        make_scheduler("lms", DDPMScheduler().config)


def test_every_scheduler_of_diffusers_has_a_name_or_a_reason():
    named = {class_name for family in FAMILIES.values() for class_name, _ in family.samplers.values()}
    for class_name in (name for name in dir(schedulers) if name.endswith("Scheduler") and name not in named):
        scheduler_class = getattr(schedulers, class_name)
        if not issubclass(scheduler_class, SchedulerMixin):
            # A stand-in for a class that needs a package that is not installed.
            assert class_name in {*OTHERS, "CosineDPMSolverMultistepScheduler"}
            continue
        try:
            scheduler = scheduler_class()
        except (TypeError, KeyError):  # It needs arguments of its own, and is not for images.
            continue
        try:
            draw(GaussianUNet(), scheduler, steps=2)
            accepted = True
        except UsageError:
            accepted = False
        assert accepted == (class_name in OTHERS), class_name


def test_more_steps_than_a_scheduler_has():
    with pytest.raises(UsageError, match="num_inference_steps 1001 does not fit DDPMScheduler"):
        draw(GaussianUNet(), DDPMScheduler(), steps=1001)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_in_half_precision(name):
    unet = DIAUNet2DModel(**PLAIN).to(dtype=torch.bfloat16)
    images = draw(unet, make_scheduler(name, DDPMScheduler().config), steps=4)
    assert images.dtype == torch.bfloat16
    assert images.isfinite().all()
