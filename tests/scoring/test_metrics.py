"""Scores on feature sets against their definitions written out."""

import pytest
import torch

from dia_diffusion.scoring.metrics import inception_score, kernel_distance, precision_recall


def gaussian(count, dim, scale=1.0, shift=0.0):
    """Samples of a Gaussian with a covariance of its own; doubles of shape (count, dim)."""
    mixing = torch.randn(dim, dim, dtype=torch.double) / dim**0.5
    return scale * torch.randn(count, dim, dtype=torch.double) @ mixing + shift


def test_kid_agrees_with_the_unbiased_mmd_written_out():
    x, y = gaussian(40, 6), gaussian(40, 6, 1.2, 0.3)

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 6 + 1) ** 3

    def mean_of_pairs(a):
        return sum(kernel(a[i], a[j]) for i in range(40) for j in range(40) if i != j) / (40 * 39)

    expected = mean_of_pairs(x) + mean_of_pairs(y) - 2 * sum(kernel(p, q) for p in x for q in y) / 40**2
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert std is None


def test_kid_of_one_distribution_is_near_zero_and_may_be_negative():
    values = [kernel_distance(torch.randn(200, 4).double(), torch.randn(300, 4).double())[0] for _ in range(8)]
    assert min(values) < 0 < max(values)
    assert max(map(abs, values)) < 0.2


def share_inside_written_out(points, centres, k):
    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = sorted((centre - other).norm().item() for j, other in enumerate(centres) if j != i)
            if (point - centre).norm().item() <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_brute_force(k):
    real, generated = gaussian(50, 4), gaussian(41, 4, 0.6, 0.4)
    expected = share_inside_written_out(generated, real, k), share_inside_written_out(real, generated, k)
    assert precision_recall(real, generated, k) == expected
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    # Float32, far from the origin.
    assert precision_recall(real.float() + 10, generated.float() + 10, k) == expected


def test_blocks_of_rows_change_nothing():
    real, generated = gaussian(5000, 4), gaussian(4500, 4, 0.7, 0.2)
    inside = torch.cdist(generated, real) <= torch.cdist(real, real).kthvalue(4).values
    covered = torch.cdist(real, generated) <= torch.cdist(generated, generated).kthvalue(4).values
    expected = inside.any(1).double().mean().item(), covered.any(1).double().mean().item()
    assert precision_recall(real, generated) == pytest.approx(expected, abs=1e-9)


def test_precision_and_recall_of_the_paper_are_not_symmetric():
    real = torch.cat([torch.randn(100, 2), torch.randn(100, 2) + 50])
    generated = torch.randn(100, 2)
    precision, recall = precision_recall(real, generated)
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    assert precision_recall(generated, real) == (recall, precision)


@pytest.mark.parametrize("dim", [19, 255, 440, 1350])
def test_twins_lie_within_balls_of_radius_zero(dim):
    """Images that repeat more than k times have radius 0; rounding must not throw their copies out."""
    for count in range(10, 60, 7):
        few = 30 * torch.randn(count, dim)
        real, copies = few.repeat(6, 1)[torch.randperm(6 * count)], few.repeat(5, 1)[torch.randperm(5 * count)]
        assert precision_recall(real, copies) == (1, 1)
        assert precision_recall(real, copies + 0.1) == (0, 0)


def test_manifold_of_a_tiny_set_reaches_to_its_last_neighbour():
    assert precision_recall(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.5], [2.5]])) == (0.5, 0.5)


@pytest.mark.parametrize("classes", [2, 10])
def test_inception_score_of_certain_predictions_is_the_number_of_classes(classes):
    logits = 100.0 * torch.eye(classes).repeat(500, 1)
    mean, std = inception_score(logits)
    assert mean == pytest.approx(classes, rel=0.01)
    assert inception_score(torch.zeros(100, classes))[0] == pytest.approx(1)
    assert std < 0.1


def test_inception_score_agrees_with_its_definition_written_out():
    """For parts of one size in which every image occurs, the order does not matter: all parts are the same."""
    few = torch.randn(1, 5, dtype=torch.double)
    assert inception_score(few.repeat(50, 1)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    logits = torch.randn(8, 5, dtype=torch.double)
    p = logits.softmax(1)
    # Eight images make eight parts of one image each, and with that no divergence.
    assert inception_score(logits)[0] == pytest.approx(1)
    many = logits.repeat(4000, 1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert inception_score(many)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("metric", [kernel_distance, lambda real, fake: inception_score(fake)])
def test_global_random_state_is_neither_used_nor_changed(metric):
    real, fake = torch.randn(200, 4), torch.randn(150, 4)
    torch.manual_seed(1)
    first = metric(real, fake)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert metric(real, fake) == first
    assert torch.equal(torch.get_rng_state(), before)
