"""Scores against their definitions written out, and whether they see what is wrong with a set of digits."""

import json

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from dia_diffusion.digits import load_digits_dataset
from dia_diffusion.errors import UsageError
from dia_diffusion.features import get_extractor
from dia_diffusion.metrics import METRICS, frechet_distance, kernel_distance, precision_recall, score
from dia_diffusion.pixels import prepare_pixels

KEYS = {"fid", "kid_mean", "kid_std", "precision", "recall", "num_images", "features"}


@pytest.fixture(scope="module")
def digits():
    splits = {}
    for name, rows in load_digits_dataset().items():
        data = prepare_pixels(rows, 8, with_labels=True)
        splits[name] = data.fetch(range(len(data)))
    return splits


@pytest.fixture(scope="module")
def extractor():
    return get_extractor("digits")


@pytest.fixture(scope="module")
def scores_of(digits, extractor):
    """Scores of some images against the training digits."""
    return lambda images: score(images.split(128), digits["train"]["images"].split(512), extractor)


@pytest.fixture(scope="module")
def floor(scores_of, digits):
    return scores_of(digits["test"]["images"])


def gaussian(count, dim, scale=1.0, shift=0.0):
    """Samples of a Gaussian with a covariance of its own; doubles of shape (count, dim)."""
    mixing = torch.randn(dim, dim, dtype=torch.double) / dim**0.5
    return scale * torch.randn(count, dim, dtype=torch.double) @ mixing + shift


def frechet_written_out(x, y):
    root = scipy.linalg.sqrtm((x.T.cov() @ y.T.cov()).numpy())
    spread = x.T.cov().trace() + y.T.cov().trace() - 2 * root.trace().real
    return ((x.mean(0) - y.mean(0)).square().sum() + spread).item()


@pytest.mark.parametrize(
    ("dim", "scale", "shift"), [(2, 1, 0), (16, 1, 0.1), (64, 0.5, 1), (64, 1e-3, 0), (32, 1, 1e4)]
)
def test_fid_agrees_with_the_closed_form(dim, scale, shift):
    x, y = gaussian(500, dim), gaussian(700, dim, scale, shift)
    assert frechet_distance(x, y) == pytest.approx(frechet_written_out(x, y), rel=1e-6)


def test_fid_of_one_dimension():
    x, y = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[3.0], [9.0]]).double()
    # Means 1 and 6, standard deviations sqrt(2) and sqrt(18).
    assert frechet_distance(x, y) == pytest.approx(25 + (18**0.5 - 2**0.5) ** 2, rel=1e-9)


@pytest.mark.parametrize("dim", [20, 100, 300])
def test_fid_of_singular_covariances(dim):
    """An isometry into more dimensions makes the covariances singular and leaves the distance as it was."""
    x, y = gaussian(200, 10), gaussian(200, 10, 0.7, 0.3)
    isometry = torch.linalg.qr(torch.randn(dim, 10, dtype=torch.double)).Q.T
    offset = 100 * torch.randn(dim, dtype=torch.double)
    distance = frechet_distance(x @ isometry + offset, y @ isometry + offset)
    assert distance == pytest.approx(frechet_written_out(x, y), rel=1e-4)


def test_fid_with_fewer_images_than_features():
    """tr (C1 C2)^(1/2) is the nuclear norm of X Y' for centred samples X, Y, which needs no root of a matrix."""
    x, y = gaussian(30, 200), gaussian(40, 200, 1.5)
    a, b = (x - x.mean(0)) / 29**0.5, (y - y.mean(0)) / 39**0.5
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected -= 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-4)


def test_fid_of_constant_features_is_the_distance_of_the_means():
    x = torch.tensor([[1e3, 2.0, 0.0]], dtype=torch.double).expand(10, 3)
    assert frechet_distance(x, x) == 0
    assert frechet_distance(x, x + 2) == pytest.approx(12)
    y = gaussian(50, 3)
    expected = (y.mean(0) - x[0]).square().sum() + y.var(0).sum()
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("dim", [3, 50, 200])
def test_fid_of_a_set_against_itself_is_zero(dim):
    x = gaussian(100, dim) + 50
    distance = frechet_distance(x, x.flip(0))
    assert 0 <= distance < 1e-4


def test_fid_does_not_change_when_both_sets_move_together():
    x, y = gaussian(300, 8), gaussian(300, 8, 1.1)
    assert frechet_distance(x + 1e6, y + 1e6) == pytest.approx(frechet_distance(x, y), rel=1e-6)


def test_kid_agrees_with_the_unbiased_mmd_written_out():
    x, y = gaussian(40, 6), gaussian(40, 6, 1.2, 0.3)

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 6 + 1) ** 3

    def mean_of_pairs(a):
        return sum(kernel(a[i], a[j]) for i in range(40) for j in range(40) if i != j) / (40 * 39)

    expected = mean_of_pairs(x) + mean_of_pairs(y) - 2 * sum(kernel(p, q) for p in x for q in y) / 40**2
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)


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


def test_scores_of_a_set_against_itself(digits, extractor):
    images = digits["test"]["images"]
    result = score([images], [images], extractor)
    assert result["fid"] == pytest.approx(0, abs=1e-6)
    assert result["kid_mean"] < 0.001
    assert (result["precision"], result["recall"]) == (1, 1)


def test_scores_are_those_of_the_features_in_double_precision(digits, extractor):
    generated, reference = digits["test"]["images"], digits["train"]["images"]
    result = score([generated], [reference], extractor)
    real, fake = extractor(reference).double(), extractor(generated).double()
    assert result["fid"] == frechet_distance(real, fake)
    assert (result["kid_mean"], result["kid_std"]) == kernel_distance(real, fake)
    assert (result["precision"], result["recall"]) == precision_recall(real, fake)


def test_result_is_ready_for_json(floor):
    assert set(floor) == KEYS
    assert floor["num_images"] == 360
    assert floor["features"] == "digits"
    assert json.loads(json.dumps(floor, allow_nan=False)) == floor
    assert all(isinstance(floor[key], float) for key in KEYS - {"num_images", "features"})


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_not_asked_for_are_none(metric, digits, extractor, floor):
    result = score([digits["test"]["images"]], [digits["train"]["images"]], extractor, [metric])
    asked = {"num_images"} | ({"kid_mean", "kid_std"} if metric == "kid" else {metric})
    assert set(result) == KEYS
    for key in KEYS - {"features"}:
        assert result[key] == (pytest.approx(floor[key], rel=1e-4) if key in asked else None)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter_and_one_pass_suffices(batch_size, digits, extractor, floor):
    generated = iter(digits["test"]["images"].split(batch_size))
    reference = iter(digits["train"]["images"].split(10 * batch_size))
    result = score(generated, reference, extractor)
    del result["features"]
    assert result == pytest.approx({key: floor[key] for key in result}, rel=1e-3)


def test_global_random_state_is_neither_used_nor_changed(digits, extractor, floor):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    result = score([digits["test"]["images"]], [digits["train"]["images"]], extractor, ["kid"])
    assert torch.equal(torch.get_rng_state(), before)
    assert result["kid_mean"] == pytest.approx(floor["kid_mean"], rel=1e-4)


def blurred(images):
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    return F.conv2d(images.float(), torch.outer(binomial, binomial)[None, None], padding=1).round().to(torch.uint8)


def noisy(images):
    noise = 32 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def test_digits_scores_see_blur(digits, scores_of, floor):
    result = scores_of(blurred(digits["test"]["images"]))
    assert result["fid"] > 10 * floor["fid"]
    assert result["kid_mean"] > 10 * floor["kid_mean"]
    assert result["recall"] < floor["recall"] / 2


def test_digits_scores_see_noise(digits, scores_of, floor):
    result = scores_of(noisy(digits["test"]["images"]))
    assert result["fid"] > 3 * floor["fid"]
    assert result["precision"] < floor["precision"] - 0.2


def test_digits_scores_see_dropped_classes(digits, scores_of, floor):
    result = scores_of(digits["test"]["images"][digits["test"]["labels"] < 5])
    assert result["fid"] > 5 * floor["fid"]
    assert result["recall"] < floor["recall"] - 0.3
    assert result["precision"] > floor["precision"] - 0.05


@pytest.mark.parametrize("digit", [0, 3, 8])
def test_digits_scores_see_one_class_memorised(digit, digits, scores_of, floor):
    result = scores_of(digits["train"]["images"][digits["train"]["labels"] == digit])
    assert result["fid"] > 20 * floor["fid"]
    assert result["precision"] == 1
    assert result["recall"] < 0.2


def test_digits_scores_see_a_few_images_memorised(digits, scores_of, floor):
    """One image of each class, over and over: every one real, no class missing, and no variety."""
    images, labels = digits["train"]["images"], digits["train"]["labels"]
    one_each = torch.stack([images[labels == digit][0] for digit in range(10)])
    result = scores_of(one_each.repeat(36, 1, 1, 1))
    assert result["fid"] > 5 * floor["fid"]
    assert result["precision"] == 1
    assert result["recall"] < 0.05


def test_mistakes_are_explained(extractor):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(UsageError, match=r"'is'.*fid, kid, precision, recall"):
        score([images], [images], extractor, ["fid", "is"])
    with pytest.raises(UsageError, match="at least 2 generated images, but there are 1"):
        score([images[:1]], [images], extractor)
    with pytest.raises(UsageError, match="at least 2 reference images, but there are 0"):
        score([images], [], extractor)


def test_two_images_on_each_side_suffice(extractor):
    result = score(
        [torch.zeros(2, 1, 8, 8, dtype=torch.uint8)], [torch.zeros(2, 1, 8, 8, dtype=torch.uint8)], extractor
    )
    assert (result["fid"], result["precision"], result["recall"]) == (0, 1, 1)
