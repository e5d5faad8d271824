"""The objective against its formulas, and the randomness of a step."""

import datasets
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import nn

from dia_diffusion.data import PixelDataset, prepare_pixels, to_unit_range
from dia_diffusion.data.embedded import load_digits_dataset
from dia_diffusion.randomness import step_seed
from dia_diffusion.training import diffusion_loss, draw_step, held_out_loss
from dia_diffusion.training.objective import _shuffling_stride


class Constant(nn.Module):
    """Predicts the same image whatever it sees, and remembers what that was."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = nn.Parameter(prediction)

    def forward(self, sample, timestep, class_labels=None):
        self.seen = sample, timestep, class_labels
        return UNet2DOutput(sample=self.prediction)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_loss_agrees_with_the_formulas(kind):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    images, noise, prediction = torch.randn(3, 4, 1, 8, 8).unbind()
    timesteps = torch.tensor([0, 10, 500, 998])
    unet = Constant(prediction)
    loss = diffusion_loss(unet, scheduler, images, noise, timesteps)
    betas = scheduler.betas.double()
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
    scheduler = DDPMScheduler(prediction_type=kind)
    images, noise, prediction = torch.randn(3, 4, 1, 8, 8).unbind()
    timesteps = torch.tensor([5, 100, 400, 800])
    loss = diffusion_loss(Constant(prediction), scheduler, images, noise, timesteps, snr_gamma=5.0)
    alpha_bar = scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise
    implied = {
        "epsilon": (noisy - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt(),
        "v_prediction": alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * prediction,
        "sample": prediction,
    }[kind]
    weights = (alpha_bar / (1 - alpha_bar)).clamp(max=5.0)
    torch.testing.assert_close(loss, (weights * (implied - images) ** 2).mean(), atol=1e-4, rtol=1e-3)


def test_draws_depend_on_seed_and_step_alone():
    shape = (8, 1, 4, 4)
    first = draw_step(1, 5, shape, 1000, "cpu")
    torch.randn(100)
    assert all(torch.equal(a, b) for a, b in zip(first, draw_step(1, 5, shape, 1000, "cpu"), strict=True))
    for other in (draw_step(1, 6, shape, 1000, "cpu"), draw_step(2, 5, shape, 1000, "cpu")):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.timesteps, other.timesteps)
    part = first.rows(slice(2, 4))
    assert torch.equal(part.noise, first.noise[2:4])
    assert len({step_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def test_draws_have_the_distributions_they_should():
    draws = draw_step(0, 0, (20000, 1, 2, 2), 1000, "cpu")
    assert draws.timesteps.min() == 0
    assert draws.timesteps.max() == 999
    assert abs(draws.timesteps.float().mean() - 499.5) < 10
    assert abs(draws.noise.mean()) < 0.02
    assert abs(draws.noise.std() - 1) < 0.02
    assert abs(draws.flips.float().mean() - 0.5) < 0.02
    assert abs((draws.label_drops < 0.1).float().mean() - 0.1) < 0.01


def test_held_out_loss_is_the_same_each_time_and_for_each_batch_size():
    data = prepare_pixels(load_digits_dataset()["test"], 8)
    scheduler = DDPMScheduler()

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, sample, timestep, class_labels=None):
            steps.append(timestep)
            return UNet2DOutput(sample=torch.zeros_like(sample))

    steps = []
    unet = Zero().train()
    loss = held_out_loss(unet, scheduler, data, batch_size=360)
    assert unet.training
    assert held_out_loss(unet, scheduler, data, batch_size=360) == loss
    assert held_out_loss(unet, scheduler, data, batch_size=100) == pytest.approx(loss, rel=1e-6)
    assert abs(loss - 1) < 0.02
    # Each part of the schedule is seen equally often.
    histogram = torch.histc(steps[0].float(), bins=5, min=0, max=1000)
    assert histogram.min() >= 70


def test_held_out_loss_with_several_draws_spreads_the_timesteps_of_each_image():
    data = prepare_pixels(load_digits_dataset()["test"], 8)
    images = to_unit_range(data.fetch(range(0, 360, 36))["images"])
    seen = []

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, sample, timestep, class_labels=None):
            seen.append((sample, timestep))
            return UNet2DOutput(sample=torch.zeros_like(sample))

    scheduler = DDPMScheduler()
    loss = held_out_loss(Recording(), scheduler, data, batch_size=4, limit=10, draws=4)
    timesteps = torch.cat([timestep for _, timestep in seen]).view(4, 10)
    assert sorted(timesteps.flatten().tolist()) == [12 + 25 * n for n in range(40)]
    # The four of an image lie evenly too, each in a quarter of the schedule of its own.
    assert all(sorted(column.tolist()) == [0, 1, 2, 3] for column in (timesteps // 250).T)
    # The noise that was added, computed back from what the model was shown, is what the loss compares with.
    signal = scheduler.alphas_cumprod[timesteps].view(4, 10, 1, 1, 1)
    noisy = torch.cat([sample for sample, _ in seen]).view(4, 10, 1, 8, 8)
    noise = (noisy - signal.sqrt() * images) / (1 - signal).sqrt()
    assert loss == pytest.approx(noise.square().mean().item(), rel=1e-4)
    assert not torch.allclose(noise[0], noise[1], atol=0.1)


def class_sorted(count):
    """Images that say which they are."""
    images = [Image.new("L", (2, 2), number % 256) for number in range(count)]
    return prepare_pixels(datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image())), 2)


def record_held_out_loss(data, **options):
    """The images that the model was shown, by the noise that was taken off again, and the timesteps."""
    seen = []

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, sample, timestep, class_labels=None):
            seen.append(timestep)
            return UNet2DOutput(sample=torch.zeros_like(sample))

    held_out_loss(Recording(), DDPMScheduler(), data, batch_size=64, **options)
    return torch.cat(seen)


def test_held_out_loss_is_spread_over_the_images(monkeypatch):
    data = class_sorted(100)
    fetched = []
    fetch = data.fetch
    monkeypatch.setattr(data, "fetch", lambda rows: fetched.extend(rows) or fetch(rows))
    record_held_out_loss(data, limit=20)
    assert fetched == list(range(0, 100, 5))
    fetched.clear()
    record_held_out_loss(data, limit=100)
    assert fetched == list(range(100))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 360, 3959, 7918, 7919, 15838])
def test_the_timesteps_of_the_held_out_loss_are_spread_for_any_number_of_images(count):
    places = torch.arange(count) * _shuffling_stride(count) % count
    assert sorted(places.tolist()) == list(range(count))
    if count >= 360:
        # Also within any part of the images, such as those of a class.
        part = places[: count // 4].float() / count
        assert abs(part.mean() - 0.5) < 0.1
        assert part.std() > 0.2


def test_as_many_images_as_the_stride_are_noised_to_all_timesteps():
    data = PixelDataset(class_sorted(1).prepared.select([0] * 7919), 2, 1)
    assert len(record_held_out_loss(data, limit=7919).unique()) == 1000
