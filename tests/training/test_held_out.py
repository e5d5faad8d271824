"""The loss on held-out images."""

import datasets
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import nn

from dia_diffusion.data.decoding import to_unit_range
from dia_diffusion.data.pixels import PixelDataset
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.objectives import DDPM, EDM, Flow
from dia_diffusion.training.held_out import _shuffling_stride, held_out_loss


class Zero(nn.Module):
    """Predicts zero, and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.samples, self.timesteps = [], []

    def forward(self, sample, timestep, class_labels=None):
        self.samples.append(sample)
        self.timesteps.append(timestep)
        return UNet2DOutput(sample=torch.zeros_like(sample))


def test_held_out_loss_is_the_same_each_time_and_for_each_batch_size():
    data = prepare_pixels(load_digits_dataset()["test"], 8)
    objective = DDPM()
    unet = Zero().train()
    loss = held_out_loss(unet, objective, data, batch_size=360)
    assert unet.training
    assert held_out_loss(unet, objective, data, batch_size=360) == loss
    assert held_out_loss(unet, objective, data, batch_size=100) == pytest.approx(loss, rel=1e-6)
    assert abs(loss - 1) < 0.02
    # Each part of the schedule is seen equally often.
    histogram = torch.histc(unet.timesteps[0].float(), bins=5, min=0, max=1000)
    assert histogram.min() >= 70


def test_held_out_loss_with_several_draws_spreads_the_timesteps_of_each_image():
    data = prepare_pixels(load_digits_dataset()["test"], 8)
    images = to_unit_range(data.fetch(range(0, 360, 36))["images"])
    objective, unet = DDPM(), Zero()
    loss = held_out_loss(unet, objective, data, batch_size=4, limit=10, draws=4)
    timesteps = torch.cat(unet.timesteps).view(4, 10)
    assert sorted(timesteps.flatten().tolist()) == [12 + 25 * n for n in range(40)]
    # The four of an image lie evenly too, each in a quarter of the schedule of its own.
    assert all(sorted(column.tolist()) == [0, 1, 2, 3] for column in (timesteps // 250).T)
    # The noise that was added, computed back from what the model was shown, is what the loss compares with.
    signal = objective.scheduler.alphas_cumprod[timesteps].view(4, 10, 1, 1, 1)
    noisy = torch.cat(unet.samples).view(4, 10, 1, 8, 8)
    noise = (noisy - signal.sqrt() * images) / (1 - signal).sqrt()
    assert loss == pytest.approx(noise.square().mean().item(), rel=1e-4)
    assert not torch.allclose(noise[0], noise[1], atol=0.1)


@pytest.mark.parametrize("objective", [EDM(sigma_data=0.5), Flow(), Flow(weighting_scheme="none")], ids=str)
def test_continuous_levels_are_spread_evenly_over_those_of_training(objective):
    """Of 400 held-out levels, 40 lie in each tenth of the levels that training draws."""
    data = prepare_pixels(load_digits_dataset()["test"], 8)
    unet = Zero()
    held_out_loss(unet, objective, data, batch_size=100, limit=200, draws=2)
    drawn = objective.draw_levels(200_000, torch.Generator().manual_seed(0), "cpu")
    images = torch.zeros(len(drawn), 1, 1, 1)
    drawn = objective.noised_batch(images, images, drawn).timesteps
    tenths = drawn.quantile(torch.linspace(0, 1, 11)[1:-1])
    counts = torch.bucketize(torch.cat(unet.timesteps), tenths).bincount(minlength=10)
    assert ((counts - 40).abs() <= 1).all(), counts


def class_sorted(count):
    """Images that say which they are."""
    images = [Image.new("L", (2, 2), number % 256) for number in range(count)]
    return prepare_pixels(datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image())), 2)


def record_held_out_loss(data, **options):
    """The timesteps that the model was shown."""
    unet = Zero()
    held_out_loss(unet, DDPM(), data, batch_size=64, **options)
    return torch.cat(unet.timesteps)


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
