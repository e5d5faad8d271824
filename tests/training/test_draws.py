"""The randomness of a step."""

import pytest
import torch

from dia_diffusion.objectives import DDPM, EDM, Flow
from dia_diffusion.randomness import step_seed
from dia_diffusion.training.batches import draw_step

OBJECTIVES = [DDPM(), EDM(), Flow()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_draws_depend_on_seed_and_step_alone(objective):
    shape = (8, 1, 4, 4)
    first = draw_step(1, 5, shape, objective, "cpu")
    torch.randn(100)
    assert all(torch.equal(a, b) for a, b in zip(first, draw_step(1, 5, shape, objective, "cpu"), strict=True))
    for other in (draw_step(1, 6, shape, objective, "cpu"), draw_step(2, 5, shape, objective, "cpu")):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.levels, other.levels)
    part = first.rows(slice(2, 4))
    assert torch.equal(part.noise, first.noise[2:4])
    assert len({step_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def test_the_draws_of_ddpm_are_those_of_every_version():
    """A run that an earlier version began goes on with the same noise."""
    draws = draw_step(3, 7, (4, 1, 2, 2), DDPM(ddpm_num_steps=100), "cpu")
    generator = torch.Generator().manual_seed(step_seed(3, 7))
    assert torch.equal(draws.levels, torch.randint(0, 100, (4,), generator=generator))
    assert torch.equal(draws.noise, torch.randn(4, 1, 2, 2, generator=generator))
    assert torch.equal(draws.flips, torch.rand(4, generator=generator) < 0.5)
    assert torch.equal(draws.label_drops, torch.rand(4, generator=generator))


def test_draws_have_the_distributions_they_should():
    draws = draw_step(0, 0, (20000, 1, 2, 2), DDPM(), "cpu")
    assert draws.levels.min() == 0
    assert draws.levels.max() == 999
    assert abs(draws.levels.float().mean() - 499.5) < 10
    assert abs(draws.noise.mean()) < 0.02
    assert abs(draws.noise.std() - 1) < 0.02
    assert abs(draws.flips.float().mean() - 0.5) < 0.02
    assert abs((draws.label_drops < 0.1).float().mean() - 0.1) < 0.01


@pytest.mark.parametrize(
    ("objective", "to_normal", "mean", "std"),
    [
        # Karras et al. 2022, table 1: ln(sigma) ~ N(P_mean, P_std²).
        (EDM(), torch.log, -1.2, 1.2),
        (EDM(p_mean=0.5, p_std=0.3), torch.log, 0.5, 0.3),
        # Esser et al. 2024, eq. 19.
        (Flow(), torch.logit, 0.0, 1.0),
        (Flow(logit_mean=-0.4, logit_std=2.0), torch.logit, -0.4, 2.0),
        (Flow(weighting_scheme="none"), torch.special.ndtri, 0.0, 1.0),
    ],
    ids=["edm", "edm, moved", "flow", "flow, moved", "flow, uniform"],
)
def test_levels_are_distributed_as_in_the_papers(objective, to_normal, mean, std):
    levels = draw_step(0, 0, (50000, 1, 1, 1), objective, "cpu").levels
    assert levels.isfinite().all()
    assert levels.min() > 0
    standard = ((to_normal(levels.double()) - mean) / std).sort().values
    places = (torch.arange(50000) + 0.5) / 50000
    # Kolmogorov and Smirnov: the largest difference to the normal distribution, below 1.63 / sqrt(n) in 99 of 100.
    assert (torch.special.ndtr(standard) - places).abs().max() < 1.63 / 50000**0.5


def test_a_draw_of_zero_is_no_level_of_zero(monkeypatch):
    """torch.rand gives 0 once in 16 million, which would be a sigma of 0 or a logit of -inf, and a NaN."""
    monkeypatch.setattr(torch, "rand", lambda count, **arguments: torch.zeros(count))
    for objective in (EDM(sigma_data=0.5), Flow(), Flow(weighting_scheme="none")):
        levels = objective.draw_levels(1, None, "cpu")
        noised = objective.noised_batch(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), levels)
        assert noised.sample.isfinite().all()
        assert noised.timesteps.isfinite().all()
        assert noised.target.isfinite().all()
