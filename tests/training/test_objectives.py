"""Each objective against its formulas, and with a network that is right."""

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from dia_diffusion.errors import UsageError
from dia_diffusion.objectives import DDPM, EDM, OBJECTIVES, Flow


class Constant(nn.Module):
    """Predicts the same image whatever it sees, and remembers what that was."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = nn.Parameter(prediction)

    def forward(self, sample, timestep, class_labels=None):
        self.seen = sample, timestep, class_labels
        return UNet2DOutput(sample=self.prediction)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddpm_agrees_with_the_formulas(kind):
    objective = DDPM(ddpm_beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    images, noise, prediction = torch.randn(3, 4, 1, 8, 8).unbind()
    timesteps = torch.tensor([0, 10, 500, 998])
    unet = Constant(prediction)
    loss = objective.loss(unet, images, noise, timesteps)
    betas = objective.scheduler.betas.double()
    alpha_bar = (1 - betas).cumprod(0)[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(unet.seen[0].double(), noisy, atol=1e-4, rtol=1e-4)
    error = {
        "epsilon": (prediction - noise) ** 2,
        "v_prediction": (prediction - (alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * images)) ** 2,
        "sample": alpha_bar / (1 - alpha_bar) * (prediction - images) ** 2,
    }[kind].mean()
    torch.testing.assert_close(loss.double(), error.double(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_sample_alike_for_every_prediction(kind):
    """Hang et al. 2023, eq. 4: whatever is predicted, the error of x_0 that it implies counts min(SNR, gamma) times."""
    objective = DDPM(prediction_type=kind, snr_gamma=5.0)
    images, noise, prediction = torch.randn(3, 4, 1, 8, 8).unbind()
    timesteps = torch.tensor([5, 100, 400, 800])
    loss = objective.loss(Constant(prediction), images, noise, timesteps)
    alpha_bar = objective.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise
    implied = {
        "epsilon": (noisy - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt(),
        "v_prediction": alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * prediction,
        "sample": prediction,
    }[kind]
    weights = (alpha_bar / (1 - alpha_bar)).clamp(max=5.0)
    torch.testing.assert_close(loss, (weights * (implied - images) ** 2).mean(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("data", [0.25, 0.5, 2.0])
def test_edm_agrees_with_the_formulas(data):
    """Karras et al. 2022, eq. 7 and 8, with the coefficients of table 1: `lambda |D(y + sigma n) - y|²`."""
    images, noise, prediction = torch.randn(3, 6, 1, 8, 8).unbind()
    sigmas = torch.tensor([0.002, 0.01, 0.3, 1.0, 5.0, 80.0])
    unet = Constant(prediction)
    loss = EDM(sigma_data=data).loss(unet, images, noise, sigmas)
    y, n, f, sigma = images.double(), noise.double(), prediction.double(), sigmas.double()[:, None, None, None]
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2).sqrt()
    c_in = 1 / (sigma**2 + data**2).sqrt()
    c_noise = sigmas.double().log() / 4
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    x = y + sigma * n
    denoised = c_skip * x + c_out * f
    torch.testing.assert_close(unet.seen[0].double(), c_in * x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unet.seen[1].double(), c_noise, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss.double(), (weight * (denoised - y) ** 2).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_a_right_answer_to_edm_is_the_image_to_the_schedulers_of_diffusers(scheduler_class):
    objective = EDM(sigma_data=0.4)
    images, noise = torch.randn(2, 5, 3, 4, 4)
    sigmas = torch.tensor([0.02, 0.1, 0.6, 3.0, 20.0])
    sample, timesteps, target, weights = objective.noised_batch(images, noise, sigmas)
    scheduler = scheduler_class.from_config(objective.scheduler.config)
    sigma = sigmas[:, None, None, None]
    noisy = images + sigma * noise
    torch.testing.assert_close(sample, scheduler.precondition_inputs(noisy, sigma))
    torch.testing.assert_close(timesteps, scheduler.precondition_noise(sigmas))
    torch.testing.assert_close(scheduler.precondition_outputs(noisy, target, sigma), images, atol=1e-4, rtol=1e-4)
    assert weights is None


def test_the_target_of_edm_has_unit_variance_at_every_level():
    """What sigma_data is for (appendix B.6): images of that standard deviation."""
    images, noise = 0.3 * torch.randn(6, 1, 64, 64), torch.randn(6, 1, 64, 64)
    sample, _, target, _ = EDM(sigma_data=0.3).noised_batch(
        images, noise, torch.tensor([2e-3, 0.05, 0.3, 1.0, 5.0, 80.0])
    )
    torch.testing.assert_close(target.std((1, 2, 3)), torch.ones(6), atol=0.04, rtol=0)
    torch.testing.assert_close(sample.std((1, 2, 3)), torch.ones(6), atol=0.04, rtol=0)


def test_flow_agrees_with_the_formulas():
    """Esser et al. 2024, eq. 13: `z_t = (1 - t) x_0 + t n`, whose derivative by t is `n - x_0`."""
    images, noise, prediction = torch.randn(3, 4, 1, 8, 8).unbind()
    times = torch.tensor([1e-4, 0.2, 0.7, 0.9999])
    unet = Constant(prediction)
    loss = Flow().loss(unet, images, noise, times)
    for number, time in enumerate(times.tolist()):
        path = [(1 - t) * images[number].double() + t * noise[number].double() for t in (time, time + 1e-3)]
        torch.testing.assert_close(unet.seen[0][number].double(), path[0], atol=1e-6, rtol=1e-5)
        slope = (path[1] - path[0]) / 1e-3
        torch.testing.assert_close(
            Flow().noised_batch(images, noise, times).target[number].double(), slope, atol=1e-5, rtol=1e-4
        )
    torch.testing.assert_close(unet.seen[1], 1000 * times)
    torch.testing.assert_close(loss, (prediction - (noise - images)).square().mean())


# A Gaussian data set: pixels are independent, of this mean and standard deviation.
MEAN, STD = 0.3, 0.4
# For each objective x = a y + b n at levels, with a and b, and what is predicted, p y + q n, written out.
GAUSSIAN = {
    "epsilon": (DDPM(), [0, 10, 300, 999]),
    "v_prediction": (DDPM(prediction_type="v_prediction"), [0, 10, 300, 999]),
    "edm": (EDM(sigma_data=0.5), [0.01, 0.1, 1.0, 20.0]),
    "flow": (Flow(), [0.01, 0.3, 0.7, 0.99]),
}


def coefficients(name, objective, level):
    """`(a, b, p, q)` of a level, in numbers of Python."""
    if isinstance(objective, EDM):
        data = objective.sigma_data
        root = (level**2 + data**2) ** 0.5
        return 1 / root, level / root, level / (data * root), -data / root
    if isinstance(objective, Flow):
        return 1 - level, level, -1.0, 1.0
    a = objective.scheduler.alphas_cumprod[level].item() ** 0.5
    b = (1 - a**2) ** 0.5
    return (a, b, 0.0, 1.0) if name == "epsilon" else (a, b, -b, a)


class BestOfGaussian(nn.Module):
    """The conditional mean of `p y + q n` given `x = a y + b n`, all Gaussian: the best that any network can do."""

    def __init__(self, a, b, p, q):
        super().__init__()
        variance = a**2 * STD**2 + b**2
        self.slope = (p * a * STD**2 + q * b) / variance
        self.offset = p * MEAN - self.slope * a * MEAN
        # What is left: the variance of p y + q n, less that which x explains.
        self.error = p**2 * STD**2 + q**2 - self.slope**2 * variance

    def forward(self, sample, timestep, class_labels=None):
        return UNet2DOutput(sample=self.slope * sample + self.offset)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_best_denoiser_of_a_gaussian_has_the_loss_it_must_have(name):
    objective, levels = GAUSSIAN[name]
    images, noise = MEAN + STD * torch.randn(50, 1, 64, 64), torch.randn(50, 1, 64, 64)
    for level in levels:
        best = BestOfGaussian(*coefficients(name, objective, level))
        of_batch = torch.tensor([level] * 50)
        loss = objective.loss(best, images, noise, of_batch).item()
        # 204,800 pixels: three standard errors of a variance are 0.9%.
        assert loss == pytest.approx(best.error, rel=0.01), level
        # And it is the best: any other line does worse.
        best.slope *= 1.1
        assert objective.loss(best, images, noise, of_batch).item() > loss


def test_sigma_data_is_that_of_the_images_where_it_is_not_given():
    assert EDM().fitted(lambda: 0.123456).sigma_data == 0.1235
    assert EDM(sigma_data=0.7).fitted(lambda: pytest.fail("measured")).sigma_data == 0.7
    with pytest.raises(UsageError, match=r"are equal.*give --sigma_data"):
        EDM().fitted(lambda: 1e-9)
    for objective in (DDPM(), Flow()):
        assert objective.fitted(lambda: pytest.fail("measured")) is objective


def test_every_objective_says_what_it_is_with_all_its_options():
    for name, kind in OBJECTIVES.items():
        words = kind().describe()
        assert "arXiv" in words
        assert all(option in words for option in kind.option_names()), name


def test_no_signal_with_a_prediction_of_noise_is_refused():
    with pytest.raises(UsageError, match="use it with --prediction_type v_prediction"):
        DDPM(rescale_betas_zero_snr=True)
