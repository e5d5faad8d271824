"""Feature extractors: what they accept, what they make of it, and the classifier that ships with the package."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.errors import UsageError
from dia_diffusion.scoring.features.extractor import PixelFeatures
from dia_diffusion.scoring.features.named import DIGITS_WEIGHTS, EXTRACTORS, DigitsFeatures, get_extractor


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.fixture(scope="module")
def held_out():
    data = prepare_pixels(load_digits_dataset()["test"], 8, with_labels=True)
    return data.fetch(range(len(data)))


@pytest.mark.parametrize("name", EXTRACTORS)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 3, 8, 8), (2, 1, 28, 28), (2, 3, 40, 24), (1, 3, 5, 5)])
def test_every_extractor_takes_images_of_any_size_grey_or_colour(name, shape):
    extractor = get_extractor(name)
    features = extractor(random_images(*shape))
    assert features.shape == (shape[0], extractor.num_features)
    assert features.dtype == torch.float32
    assert features.isfinite().all()


@pytest.mark.parametrize("name", EXTRACTORS)
def test_every_extractor_is_frozen_and_stays_in_evaluation_mode(name):
    extractor = get_extractor(name)
    images = random_images(4, 1, 8, 8)
    before = extractor(images)
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert not before.requires_grad
    torch.testing.assert_close(extractor(images), before, rtol=0, atol=0)


def test_shipped_classifier_reads_held_out_digits(held_out):
    _, logits = DigitsFeatures().classify(held_out["images"])
    assert (logits.argmax(1) == held_out["labels"]).float().mean() >= 0.97
    assert DIGITS_WEIGHTS.stat().st_size < 300_000


def test_digits_features_are_alive_and_of_one_scale(held_out):
    features = DigitsFeatures()(held_out["images"])
    assert (features == 0).float().mean() < 0.01
    assert features.mean(0).abs().max() < 0.5
    assert features.std(0).min() > 0.5
    assert features.std(0).max() < 2


def test_grey_as_colour_and_enlarged_digits_give_the_same_features(held_out):
    extractor = DigitsFeatures()
    grey = held_out["images"][:20]
    torch.testing.assert_close(extractor(grey.expand(-1, 3, -1, -1)), extractor(grey), rtol=1e-4, atol=1e-4)
    # Antialiased reduction of a blocky picture is not exactly the picture, but the digit is still read.
    large = grey.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (extractor.classify(large)[1].argmax(1) == extractor.classify(grey)[1].argmax(1)).float().mean() >= 0.9


def test_pixels_are_the_pixels():
    images = random_images(5, 3, 16, 16)
    features = PixelFeatures(16)(images)
    torch.testing.assert_close(features, images.flatten(1) / 255)


def test_colour_turns_grey_with_the_weights_of_pillow():
    from PIL import Image

    images = random_images(1, 3, 8, 8)
    expected = Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert("L")
    grey = PixelFeatures(8, channels=1)(images).view(8, 8) * 255
    torch.testing.assert_close(grey, torch.tensor(list(expected.tobytes())).view(8, 8).float(), rtol=0, atol=0.51)


def test_reduction_averages_what_it_drops():
    """Without antialiasing, a stripe between the sampled pixels would vanish."""
    images = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    images[..., ::4] = 240
    features = PixelFeatures(8, channels=1)(images).view(1, 1, 8, 8)
    torch.testing.assert_close(features[..., 1:-1, 1:-1], avg_pool2d(images / 255, 4)[..., 1:-1, 1:-1])


def test_pixels_follow_the_images_up_to_32():
    assert get_extractor("pixels", resolution=8, channels=1).num_features == 64
    assert get_extractor("pixels", resolution=8).num_features == 3 * 64
    assert get_extractor("pixels", resolution=256).resolution == 32
    assert get_extractor("digits", resolution=256, channels=3).resolution == 8


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 1, 8, 8), random_images(1, 8, 8), random_images(2, 4, 8, 8)],
    ids=["floats", "no batch", "four channels"],
)
def test_what_is_not_a_batch_of_images_is_refused(images):
    with pytest.raises(UsageError, match="uint8 images of shape"):
        DigitsFeatures()(images)


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(UsageError, match=r"'inceptoin' is neither .*digits, inception, pixels.* vision model"):
        get_extractor("inceptoin")
    with pytest.raises(UsageError, match="belongs to the features 'inception', not to 'digits'"):
        get_extractor("digits", inception_path="x.pt")
    with pytest.raises(UsageError, match="at least 1"):
        PixelFeatures(0)
    with pytest.raises(UsageError, match="1 or 3 channels"):
        PixelFeatures(8, channels=2)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_digest_follows_the_weights_and_nothing_else(name):
    first, second = get_extractor(name), get_extractor(name)
    assert first.settings == second.settings
    for weight in first.parameters():
        weight.view(-1)[0] += 1
        break
    assert (first.settings == second.settings) == (name == "pixels")
