"""Feature extractors by name, and that of the digits, whose network ships with the package."""

from collections import OrderedDict
from importlib.resources import files

import safetensors.torch
from torch import Tensor, nn

from ...errors import UsageError, nearest
from .extractor import FeatureExtractor, PixelFeatures
from .pretrained import InceptionFeatures, VisionModelFeatures

DIGITS_WEIGHTS = files(__package__) / "weights" / "digits_features.safetensors"


def digits_classifier() -> nn.Sequential:
    """Build a fresh classifier of 8x8 grey digits: `body` maps `(B, 1, 8, 8)` to 32 features, `head` to logits.

    The features end in a normalisation, not in an activation: they have mean 0 and variance 1 over digits, and none is
    stuck at zero, so that a Gaussian (FID) describes them well and each of them counts alike.
    """
    body = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.BatchNorm1d(32, affine=False),
    )
    return nn.Sequential(OrderedDict(body=body, head=nn.Sequential(nn.SiLU(), nn.Linear(32, 10))))


class DigitsFeatures(FeatureExtractor):
    """32 features of 8x8 grey digits, bright on dark; their weights ship with the package.

    They are the penultimate layer of a classifier that `tools/train_digits_features.py` trained.
    """

    name = "digits"
    num_features = 32
    num_classes = 10
    channels = 1
    resolution = 8

    def __init__(self, resolution: int | None = None, channels: int | None = None):
        super().__init__()
        self.classifier = digits_classifier()
        self.classifier.load_state_dict(safetensors.torch.load(DIGITS_WEIGHTS.read_bytes()))
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> Tensor:
        return self.classifier[0](images)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.classifier[1](features)


# Extractors that are made from the resolution and channels of the images.
EXTRACTORS: dict[str, type[FeatureExtractor]] = {
    extractor.name: extractor for extractor in (DigitsFeatures, PixelFeatures)
}
_NAMES = (*EXTRACTORS, InceptionFeatures.name)
FEATURES = (*_NAMES, "a vision model of transformers (folder or Hub id)")


def get_extractor(
    name: str, resolution: int | None = None, channels: int | None = None, inception_path: str | None = None
) -> FeatureExtractor:
    """Make a feature extractor.

    Args:
        name (`str`): `digits`, `pixels`, `inception`, or the folder or Hub id of a vision model of transformers.
        resolution, channels (`int`, *optional*): Of the images to come, for extractors that follow them (`pixels`).
        inception_path (`str`, *optional*): TorchScript file for `inception`.

    Raises:
        UsageError: if there is none of that name.
    """
    if inception_path is not None and name != InceptionFeatures.name:
        raise UsageError(f"inception_path belongs to the features 'inception', not to '{name}'.")
    if name == InceptionFeatures.name:
        return InceptionFeatures(inception_path)
    if name in EXTRACTORS:
        return EXTRACTORS[name](resolution, channels)
    try:
        return VisionModelFeatures(name)
    except UsageError as error:
        raise UsageError(f"{error}{nearest(name, _NAMES)}") from error
