"""Feature extractors: the spaces in which sets of images are compared.

Another one is a short subclass of `FeatureExtractor` and its entry in `EXTRACTORS`. Nothing is downloaded here.
"""

from collections import OrderedDict
from importlib.resources import files

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError

DIGITS_WEIGHTS = files(__package__) / "weights" / "digits_features.safetensors"
_LARGEST_PIXELS = 32
# Luma of ITU-R BT.601, with which Pillow turns colour into grey.
_LUMA = (0.299, 0.587, 0.114)


class FeatureExtractor(nn.Module):
    """Maps images to feature vectors: frozen, always in evaluation mode, without gradients.

    A subclass sets `name`, `num_features`, and the `channels` (1 or 3) and `resolution` that its `features` expects.

    Args:
        resolution, channels (`int`, *optional*):
            Of the images to come. An extractor may follow them; one with a fixed input has images converted instead.
    """

    name: str
    num_features: int
    channels: int
    resolution: int

    def __init__(self, resolution: int | None = None, channels: int | None = None):
        super().__init__()

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in evaluation mode, whatever is asked: training statistics must not leak into a score."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 images `(B, C, H, W)` of any size, C 1 or 3, to float32 features `(B, num_features)`.

        Raises:
            UsageError: if the images are not of that type and shape.
        """
        return self.features(self.convert(images)).float()

    def convert(self, images: Tensor) -> Tensor:
        """The images as floats in [0, 1], `(B, channels, resolution, resolution)`, on the device of the extractor."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UsageError(
                "features are taken of uint8 images of shape (B, 1 or 3, H, W), but these are "
                f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}."
            )
        images = images.to(next(self.parameters(), images).device).float() / 255
        if images.shape[1] > self.channels:
            images = torch.einsum("bchw,c->bhw", images, images.new_tensor(_LUMA)).unsqueeze(1)
        size = (self.resolution, self.resolution)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images.expand(-1, self.channels, -1, -1)

    def features(self, images: Tensor) -> Tensor:
        """Maps what `convert` made to features `(B, num_features)`."""
        raise NotImplementedError


def digits_classifier() -> nn.Sequential:
    """A classifier of 8x8 grey digits with fresh weights: `body` maps `(B, 1, 8, 8)` to 32 features, `head` to logits.

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
    channels = 1
    resolution = 8

    def __init__(self, resolution: int | None = None, channels: int | None = None):
        super().__init__()
        self.classifier = digits_classifier()
        self.classifier.load_state_dict(safetensors.torch.load(DIGITS_WEIGHTS.read_bytes()))
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> Tensor:
        return self.classifier.body(images)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Maps uint8 images `(B, C, H, W)` to the logits of the ten digits, `(B, 10)`."""
        return self.classifier(self.convert(images))


class PixelFeatures(FeatureExtractor):
    """The pixels themselves, in [0, 1]: no model to trust or to load, but blind to what the images show.

    Args:
        resolution (`int`, *optional*, defaults to 32): Size to look at, from 1 to 32; larger images are made smaller.
        channels (`int`, *optional*, defaults to 3): 1 or 3. Grey images as colour give three times the FID.
    """

    name = "pixels"

    def __init__(self, resolution: int | None = None, channels: int | None = None):
        super().__init__()
        self.resolution = min(_LARGEST_PIXELS if resolution is None else resolution, _LARGEST_PIXELS)
        self.channels = 3 if channels is None else channels
        if self.resolution < 1 or self.channels not in (1, 3):
            raise UsageError(
                "pixels need a resolution of at least 1 and 1 or 3 channels, "
                f"not resolution {self.resolution} and {self.channels} channels."
            )
        self.num_features = self.channels * self.resolution**2

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


EXTRACTORS: dict[str, type[FeatureExtractor]] = {
    extractor.name: extractor for extractor in (DigitsFeatures, PixelFeatures)
}


def get_extractor(name: str, resolution: int | None = None, channels: int | None = None) -> FeatureExtractor:
    """Makes a feature extractor.

    Args:
        name (`str`): One of `EXTRACTORS`.
        resolution, channels (`int`, *optional*): Of the images to come, for extractors that follow them (`pixels`).

    Raises:
        UsageError: if there is none of that name.
    """
    if name not in EXTRACTORS:
        raise UsageError(f"there are no features named '{name}'; choose one of: {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name](resolution, channels)
