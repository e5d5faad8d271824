"""Scores of generated images: those of their features, and whether they see what is wrong with digits."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.errors import UsageError
from dia_diffusion.options.commands import METRICS
from dia_diffusion.sampling.generation import sample_images
from dia_diffusion.scoring.evaluation import DEFAULT_METRICS, evaluate
from dia_diffusion.scoring.features.named import get_extractor
from dia_diffusion.scoring.frechet import FrechetDistanceTo, Moments
from dia_diffusion.scoring.images import PipelineImages
from dia_diffusion.scoring.metrics import inception_score, kernel_distance, precision_recall
from dia_diffusion.scoring.reference import read_published
from tiny_unets import GREY

FIGURES = {
    "fid": ["fid", "fid_low", "fid_high", "fid_infinity"],
    "kid": ["kid_mean", "kid_std"],
    "is": ["is_mean", "is_std"],
    "precision": ["precision"],
    "recall": ["recall"],
}


class TensorImages:
    """Generated images that are there already."""

    def __init__(self, images):
        self.images = images
        self.origin = {}
        self.settings = {}

    def __len__(self):
        return len(self.images)

    def images_at(self, numbers):
        return self.images[numbers.start : numbers.stop]


@pytest.fixture(scope="module")
def digits():
    return {split: prepare_pixels(rows, 8, with_labels=True) for split, rows in load_digits_dataset().items()}


@pytest.fixture(scope="module")
def train(digits):
    return digits["train"].fetch(range(len(digits["train"])))


@pytest.fixture(scope="module")
def test(digits):
    return digits["test"].fetch(range(len(digits["test"])))


@pytest.fixture(scope="module")
def extractor():
    return get_extractor("digits")


@pytest.fixture(scope="module")
def scores_of(digits, extractor):
    """Scores of some images against the training digits."""
    return lambda images, metrics=METRICS, **options: evaluate(
        TensorImages(images), digits["train"], extractor, metrics, **options
    )


@pytest.fixture(scope="module")
def floor(scores_of, test):
    return scores_of(test["images"])


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    unet = DIAUNet2DModel(**GREY | {"block_out_channels": (32, 32), "norm_num_groups": 8}).eval()
    return DIAUNetPipeline(unet, DDIMScheduler())


def figures(scores):
    """The scores alone, the bounds of the interval one by one."""
    low, high = scores["fid_interval"] or (None, None)
    return {name: scores[name] for names in FIGURES.values() for name in names if name in scores} | {
        "fid_low": low,
        "fid_high": high,
    }


def test_scores_are_those_of_the_features(extractor, floor, train, test):
    real, fake = extractor(train["images"]), extractor(test["images"])
    gaussians = []
    for features in (real, fake):
        moments = Moments(32)
        moments.update(features)
        gaussians.append(moments.gaussian())
    assert floor["fid"] == pytest.approx(FrechetDistanceTo(gaussians[0])(gaussians[1]), rel=1e-4)
    assert (floor["kid_mean"], floor["kid_std"]) == pytest.approx(kernel_distance(real, fake), rel=1e-3)
    assert (floor["precision"], floor["recall"]) == precision_recall(real, fake)
    assert (floor["is_mean"], floor["is_std"]) == pytest.approx(inception_score(extractor.classify(test["images"])[1]))
    assert floor["bytes_kept"] == 4 * (32 * (1437 + 360) + 10 * 360)


def test_held_out_images_make_the_floor(scores_of, digits, floor, test):
    result = scores_of(test["images"][:50], held_out=digits["test"])["floor"]
    assert figures(result) == pytest.approx(figures(floor), rel=1e-4)
    assert (result["num_images"], result["features"]) == (360, "digits")
    assert scores_of(test["images"][:50])["floor"] is None


def test_a_pipeline_is_scored_by_its_images(digits, extractor, pipeline, scores_of):
    scores = evaluate(PipelineImages(pipeline, 30, 2, seed=4), digits["train"], extractor, METRICS, batch_size=7)
    images = torch.cat(list(sample_images(pipeline, 30, 2, seed=4, batch_size=7)))
    assert figures(scores) == figures(scores_of(images, batch_size=7))
    assert scores["num_images"] == 30
    assert scores["fid_interval"] is None
    assert 0 < scores["seconds"]["sampling"] < scores["seconds"]["total"]


def test_result_is_ready_for_json(floor):
    assert {"fid", "kid_mean", "kid_std", "precision", "recall", "num_images", "features", "floor"} < set(floor)
    assert json.loads(json.dumps(floor, allow_nan=False)) == floor


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_not_asked_for_are_none(metric, scores_of, floor, test):
    result = scores_of(test["images"], [metric])
    for name, figure in figures(result).items():
        assert figure == (pytest.approx(figures(floor)[name], rel=1e-4) if name in FIGURES[metric] else None)
    if metric == "fid":
        assert result["bytes_kept"] == 0


@pytest.mark.parametrize("batch_size", [1, 7, 250])
def test_batch_size_does_not_matter(batch_size, scores_of, floor, test):
    assert figures(scores_of(test["images"], batch_size=batch_size)) == pytest.approx(figures(floor), rel=1e-3)


def test_a_set_against_itself(digits, extractor):
    images = TensorImages(digits["test"].images_at(range(360)))
    result = evaluate(images, digits["test"], extractor, DEFAULT_METRICS)
    assert result["fid"] == pytest.approx(0, abs=1e-6)
    assert result["kid_mean"] < 0.001
    assert (result["precision"], result["recall"]) == (1, 1)


def test_settings_hash_tells_what_can_be_compared(digits, extractor, pipeline):
    def settings_hash(reference=digits["train"], features=extractor, steps=2, num_images=4, seed=0, **options):
        images = PipelineImages(pipeline, num_images, steps, seed, **options)
        return evaluate(images, reference, features, ["fid"])["settings_hash"]

    first = settings_hash()
    assert settings_hash(seed=1) == first
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1
    assert settings_hash() == first
    others = [
        settings_hash(steps=3),
        settings_hash(num_images=5),
        settings_hash(reference=digits["test"]),
        settings_hash(features=get_extractor("pixels", 8, 1)),
        settings_hash(features=get_extractor("pixels", 8, 3)),
    ]
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    others.append(settings_hash())
    with torch.no_grad():
        extractor.classifier.head[1].bias[0] += 1
    others.append(settings_hash())
    with torch.no_grad():
        extractor.classifier.head[1].bias[0] -= 1
    assert len({first, *others}) == 1 + len(others)


def test_few_images_are_warned_of(scores_of, test, floor):
    assert "20 images are too few" in scores_of(test["images"][:20], ["fid"])["warnings"][0]
    assert floor["warnings"] == []
    pixels = get_extractor("pixels", 8, 3)
    few = prepare_pixels(load_digits_dataset()["test"].select(range(100)), 8)
    (warning,) = evaluate(TensorImages(test["images"]), few, pixels, ["fid"])["warnings"]
    assert "100 reference images are too few" in warning
    assert evaluate(TensorImages(test["images"]), few, pixels, ["recall"])["warnings"] == []


def test_an_inception_score_of_few_images_is_left_out(scores_of, test):
    """Five images in five parts would give 1.0000 ± 0.0000, whatever they show."""
    few = scores_of(test["images"][:99], ["is"])
    assert (few["is_mean"], few["is_std"]) == (None, None)
    assert "99 images are too few for an Inception Score" in few["warnings"][0]
    enough = scores_of(test["images"][:100], ["is"])
    assert enough["is_mean"] > 2
    assert enough["warnings"] == []


def blurred(images):
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    return F.conv2d(images.float(), torch.outer(binomial, binomial)[None, None], padding=1).round().to(torch.uint8)


def noisy(images):
    noise = 32 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def test_digits_scores_see_blur(scores_of, floor, test):
    result = scores_of(blurred(test["images"]))
    assert result["fid"] > 10 * floor["fid"]
    assert result["kid_mean"] > 10 * floor["kid_mean"]
    assert result["recall"] < floor["recall"] / 2


def test_digits_scores_see_noise(scores_of, floor, test):
    result = scores_of(noisy(test["images"]))
    assert result["fid"] > 3 * floor["fid"]
    assert result["precision"] < floor["precision"] - 0.2


def test_digits_scores_see_dropped_classes(scores_of, floor, test):
    result = scores_of(test["images"][test["labels"] < 5])
    assert result["fid"] > 5 * floor["fid"]
    assert result["recall"] < floor["recall"] - 0.3
    assert result["precision"] > floor["precision"] - 0.05
    assert result["is_mean"] < 5.5 < floor["is_mean"]


@pytest.mark.parametrize("digit", [0, 3, 8])
def test_digits_scores_see_one_class_memorised(digit, scores_of, floor, train):
    result = scores_of(train["images"][train["labels"] == digit])
    assert result["fid"] > 20 * floor["fid"]
    assert result["precision"] == 1
    assert result["recall"] < 0.2
    assert result["is_mean"] < 2


def test_digits_scores_see_a_few_images_memorised(scores_of, floor, train):
    """One image of each class, over and over: every one real, no class missing, and no variety."""
    one_each = torch.stack([train["images"][train["labels"] == digit][0] for digit in range(10)])
    result = scores_of(one_each.repeat(36, 1, 1, 1))
    assert result["fid"] > 5 * floor["fid"]
    assert result["precision"] == 1
    assert result["recall"] < 0.05


def test_mistakes_are_explained(scores_of, test, pipeline, tmp_path, extractor):
    with pytest.raises(UsageError, match=r"'fiddle'.*fid, kid, is, precision, recall"):
        scores_of(test["images"], ["fid", "fiddle"])
    with pytest.raises(UsageError, match="needs a classifier, and the features 'pixels' have none"):
        evaluate(TensorImages(test["images"]), None, get_extractor("pixels", 8, 1), ["is"])
    with pytest.raises(UsageError, match="at least 2 generated images, but num_images is 1"):
        PipelineImages(pipeline, 1, 2)
    torch.save({}, tmp_path / "x.npz")
    with pytest.raises(UsageError, match=r"holds neither statistics \('mu' and 'sigma'\)"):
        read_published(tmp_path / "x.npz", extractor)
