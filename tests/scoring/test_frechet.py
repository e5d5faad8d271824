"""Fréchet distance and its uncertainty: against the closed form, and against what repeated samples show."""

import time

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from dia_diffusion.scoring.frechet import (
    GROUPS,
    FrechetDistanceTo,
    Gaussian,
    Moments,
    frechet_uncertainty,
    is_uncertainty_too_long,
)


def gaussian(count, dim, scale=1.0, shift=0.0):
    """Samples of a Gaussian with a covariance of its own; doubles of shape (count, dim)."""
    mixing = torch.randn(dim, dim, dtype=torch.double) / dim**0.5
    return scale * torch.randn(count, dim, dtype=torch.double) @ mixing + shift


def moments(features, groups=1, batch_size=64):
    result = Moments(features.shape[1], groups)
    for batch in features.split(batch_size):
        result.update(batch)
    return result


def distance(x, y):
    """The distance that is reported, with which torchmetrics must agree."""
    real, generated = moments(x).gaussian(), moments(y).gaussian()
    value = FrechetDistanceTo(real)(generated)
    scale = (real.covariance.trace() + generated.covariance.trace()).item()
    assert distance_of_torchmetrics(x, y) == pytest.approx(value, rel=1e-4, abs=1e-6 * scale)
    return value


def distance_of_torchmetrics(x, y):
    features = torch.nn.Identity()
    features.num_features = x.shape[1]
    fid = FrechetInceptionDistance(features)
    # Around the mean of one of them its sums lose no digits.
    fid.update(x - x.mean(0), real=True)
    fid.update(y - x.mean(0), real=False)
    return fid.compute().item()


def frechet_written_out(x, y):
    root = scipy.linalg.sqrtm((x.T.cov() @ y.T.cov()).numpy())
    spread = x.T.cov().trace() + y.T.cov().trace() - 2 * root.trace().real
    return ((x.mean(0) - y.mean(0)).square().sum() + spread).item()


@pytest.mark.parametrize(
    ("dim", "scale", "shift"), [(2, 1, 0), (16, 1, 0.1), (64, 0.5, 1), (64, 1e-3, 0), (32, 1, 1e4)]
)
def test_fid_agrees_with_the_closed_form(dim, scale, shift):
    x, y = gaussian(500, dim), gaussian(700, dim, scale, shift)
    assert distance(x, y) == pytest.approx(frechet_written_out(x, y), rel=1e-6)


def test_fid_of_one_dimension():
    x, y = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[3.0], [9.0]]).double()
    # Means 1 and 6, standard deviations sqrt(2) and sqrt(18).
    assert distance(x, y) == pytest.approx(25 + (18**0.5 - 2**0.5) ** 2, rel=1e-9)


@pytest.mark.parametrize("dim", [20, 100, 300])
def test_fid_of_singular_covariances(dim):
    """An isometry into more dimensions makes the covariances singular and leaves the distance as it was."""
    x, y = gaussian(200, 10), gaussian(200, 10, 0.7, 0.3)
    isometry = torch.linalg.qr(torch.randn(dim, 10, dtype=torch.double)).Q.T
    offset = 100 * torch.randn(dim, dtype=torch.double)
    value = distance(x @ isometry + offset, y @ isometry + offset)
    assert value == pytest.approx(frechet_written_out(x, y), rel=1e-4)


def test_fid_with_fewer_images_than_features():
    """tr (C1 C2)^(1/2) is the nuclear norm of X Y' for centred samples X, Y, which needs no root of a matrix."""
    x, y = gaussian(30, 200), gaussian(40, 200, 1.5)
    a, b = (x - x.mean(0)) / 29**0.5, (y - y.mean(0)) / 39**0.5
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected -= 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    assert distance(x, y) == pytest.approx(expected.item(), rel=1e-4)


def test_fid_of_constant_features_is_the_distance_of_the_means():
    x = torch.tensor([[1e3, 2.0, 0.0]], dtype=torch.double).expand(10, 3)
    assert distance(x, x) == 0
    assert distance(x, x + 2) == pytest.approx(12)
    y = gaussian(50, 3)
    expected = (y.mean(0) - x[0]).square().sum() + y.var(0).sum()
    assert distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("dim", [3, 50, 200])
def test_fid_of_a_set_against_itself_is_zero(dim):
    x = gaussian(100, dim) + 50
    assert 0 <= distance(x, x.flip(0)) < 1e-4


def test_fid_does_not_change_when_both_sets_move_together():
    x, y = gaussian(300, 8), gaussian(300, 8, 1.1)
    assert distance(x + 1e6, y + 1e6) == pytest.approx(distance(x, y), rel=1e-6)


@pytest.mark.parametrize("groups", [1, 7, GROUPS])
@pytest.mark.parametrize("batch_size", [1, 33, 1000])
def test_moments_are_the_mean_and_covariance_whatever_the_batches(groups, batch_size):
    x = gaussian(500, 6) + 1e6
    mean, covariance, count = moments(x, groups, batch_size).gaussian()
    assert count == 500
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(covariance, x.T.cov(), rtol=1e-7, atol=1e-9)


def test_groups_are_even_disjoint_and_the_same_whatever_the_batches():
    x = torch.eye(200).double()
    one, other = moments(x, GROUPS, 200), moments(x, GROUPS, 7)
    torch.testing.assert_close(one.sums, other.sums)
    assert one.counts.tolist() == [10] * GROUPS
    members = one.sums + one.counts[:, None] * one.origin
    assert torch.equal(members.round().sum(0), torch.ones(200).double())
    # Classes that come in turn do not gather in one group.
    for group in members.round().bool():
        assert len(set((group.nonzero().flatten() % 10).tolist())) > 3
    part = one.gaussian([0, 3])
    rows = x[members.round()[[0, 3]].sum(0).bool()]
    torch.testing.assert_close(part.mean, rows.mean(0))
    torch.testing.assert_close(part.covariance, rows.T.cov())


@pytest.mark.parametrize(("dim", "shift", "count"), [(4, 0.5, 400), (16, 0.1, 400)])
def test_uncertainty_is_what_repeated_samples_show(dim, shift, count):
    """The second case has few images for its features: most of the distance is bias there."""
    mixing = torch.randn(dim, dim, dtype=torch.double) / dim**0.5
    real = Gaussian(torch.zeros(dim).double(), mixing.T @ mixing, None)
    true = FrechetDistanceTo(real)(Gaussian(real.mean + shift, 1.1 * real.covariance, None))
    plain, errors, infinity = [], [], []
    for _ in range(40):
        generated = moments(1.1**0.5 * torch.randn(count, dim).double() @ mixing + shift, GROUPS)
        plain.append(FrechetDistanceTo(real)(generated.gaussian()))
        (low, high), extrapolated = frechet_uncertainty(FrechetDistanceTo(real), generated)
        assert (low + high) / 2 == pytest.approx(plain[-1], abs=1e-6)
        errors.append((high - low) / 2 / 2.093)
        infinity.append(extrapolated)
    assert 0.7 < np.mean(errors) / np.std(plain) < 1.6
    # Four standard errors of the mean of forty.
    assert abs(np.mean(infinity) - true) < 4 * np.std(infinity) / 40**0.5 + 0.1 * (np.mean(plain) - true)
    assert abs(np.mean(infinity) - true) < abs(np.mean(plain) - true)


def test_too_few_images_have_no_uncertainty():
    real = moments(gaussian(50, 3)).gaussian()
    assert frechet_uncertainty(FrechetDistanceTo(real), moments(gaussian(2 * GROUPS - 1, 3), GROUPS)) is None
    assert frechet_uncertainty(FrechetDistanceTo(real), moments(gaussian(2 * GROUPS, 3), GROUPS)) is not None


def test_memory_does_not_grow_with_the_number_of_images():
    few, many = moments(gaussian(100, 5), GROUPS), moments(gaussian(5000, 5), GROUPS)
    size = [sum(value.nbytes for value in vars(m).values()) for m in (few, many)]
    assert size[0] == size[1]


def jackknife_written_out(x, y, groups):
    """The interval and the extrapolated value, from the closed form with each group left out."""
    value = frechet_by_nuclear_norm(x, y)
    values = np.array([frechet_by_nuclear_norm(x, y[groups != group]) for group in range(GROUPS)])
    half = 2.0930 * ((GROUPS - 1) * values.var()) ** 0.5
    return value - half, value + half, GROUPS * value - (GROUPS - 1) * values.mean()


def frechet_by_nuclear_norm(x, y):
    a, b = (x - x.mean(0)) / (len(x) - 1) ** 0.5, (y - y.mean(0)) / (len(y) - 1) ** 0.5
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")).item()


@pytest.mark.parametrize(("count", "dim"), [(40, 200), (50, 50), (51, 50), (90, 30)])
def test_uncertainty_written_out_for_fewer_and_for_more_images_than_features(count, dim):
    x, y = gaussian(120, dim), gaussian(count, dim, 1.3, 0.2)
    generated = moments(y, GROUPS, 17)
    groups = generated._groups(0, count).numpy()
    interval, infinity = frechet_uncertainty(FrechetDistanceTo(moments(x).gaussian()), generated)
    assert (*interval, infinity) == pytest.approx(jackknife_written_out(x, y, groups), rel=1e-4)


def test_forty_images_in_three_thousand_features_do_not_take_minutes():
    """Twenty roots of 3,072 rows took more than two minutes: with forty images there are forty rows."""
    generated = moments(torch.randn(40, 3072), GROUPS)
    assert sum(value.nbytes for value in vars(generated).values()) < 3e6
    distance = FrechetDistanceTo(Gaussian(torch.zeros(2), torch.eye(2), None))
    # As it would be computed in half a minute.
    distance.reference = Gaussian(torch.zeros(3072).double(), torch.eye(3072).double(), None)
    distance.root = distance.reference.covariance
    start = time.process_time()
    assert frechet_uncertainty(distance, generated) is not None
    assert time.process_time() - start < 10


def test_an_interval_that_would_take_minutes_is_left_out():
    generated = Moments(2049, 1)
    generated.counts += 5000
    assert is_uncertainty_too_long(generated)
    generated.counts.fill_(2048)
    assert not is_uncertainty_too_long(generated)
