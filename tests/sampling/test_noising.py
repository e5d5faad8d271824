"""Images are noised for the analysis as they were in training."""

import pytest
import torch

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.analysis.maps import collect_maps
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.objectives import DDPM, EDM, Flow
from dia_diffusion.sampling.schedulers import (
    make_noising_scheduler,
    make_scheduler,
    noise_images,
    scheduler_names,
    spread_timesteps,
)
from tiny_unets import TINY

OBJECTIVES = {
    "ddpm": (DDPM(ddpm_num_steps=200), lambda timestep: timestep),
    "edm": (EDM(sigma_data=0.4), lambda timestep: (4 * timestep).exp()),
    "flow": (Flow(), lambda timestep: timestep / 1000),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_network_sees_is_what_its_objective_showed_it(name):
    objective, level_of = OBJECTIVES[name]
    images, noise = torch.randn(2, 3, 1, 4, 4)
    names = scheduler_names(objective.scheduler.config)
    assert len(names) >= 3
    for sampler in names:
        # Whichever sampler the model was saved with.
        scheduler = make_noising_scheduler(make_scheduler(sampler, objective.scheduler.config).config)
        timesteps = spread_timesteps(scheduler, 5)
        assert (timesteps.diff() > 0).all()
        for timestep in timesteps:
            expected, told, _, _ = objective.noised_batch(images, noise, level_of(timestep).expand(3))
            torch.testing.assert_close(noise_images(scheduler, images, noise, timestep), expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(timestep.expand(3), told)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_maps_of_every_objective(name):
    digits = prepare_pixels(load_digits_dataset()["test"], 8)
    unet = DIAUNet2DModel(**TINY | {"in_channels": 1, "out_channels": 1})
    scheduler = make_noising_scheduler(OBJECTIVES[name][0].scheduler.config)
    maps, timesteps = collect_maps(unet, scheduler, digits, num_images=4, num_timesteps=3)
    assert len(timesteps) == 3
    assert timesteps == sorted(timesteps)
    assert all(gates.shape[:2] == (3, 4) for gates in maps.values())
