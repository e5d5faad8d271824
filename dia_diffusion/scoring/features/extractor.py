"""The base class of feature extractors, which resizes and scales images; and pixels as features."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError
from ...files import weights_digest

# Luma of ITU-R BT.601, with which Pillow turns colour into grey.
_LUMA = (0.299, 0.587, 0.114)


class FeatureExtractor(nn.Module):
    """Maps images to feature vectors: frozen, always in evaluation mode, without gradients.

    A subclass sets `name`, `num_features`, the `channels` (1 or 3) and the `resolution` that its `features` expects,
    and `num_classes` if it is a classifier.

    Args:
        resolution, channels (`int`, *optional*):
            Of the images to come. An extractor may follow them; one with a fixed input has images converted instead.
    """

    name: str
    num_features: int
    num_classes: int | None = None
    channels: int
    resolution: int
    value_range = (0.0, 1.0)
    interpolation = "bilinear"

    def __init__(self, resolution: int | None = None, channels: int | None = None):
        super().__init__()

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Ignore `mode` and stay in evaluation mode: training statistics must not leak into a score."""
        return super().train(False)

    @property
    def resizing(self) -> str:
        """Resizing of images to the input size of a network."""
        return f"{self.interpolation}, antialiased, to {self.resolution}x{self.resolution}"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of comparable features, ready for JSON. A model is identified by its weights, not its name."""
        return {
            "num_features": self.num_features,
            "channels": self.channels,
            "value_range": list(self.value_range),
            "resizing": self.resizing,
            "weights": self.digest(),
        }

    def digest(self) -> str | None:
        """Return the SHA-256 of all weights, by name; `None` where there are none."""
        weights = self.state_dict()
        return weights_digest(weights) if weights else None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images `(B, C, H, W)` of any size, C 1 or 3, to float32 features `(B, num_features)`.

        Raises:
            UsageError: if the images are not of that type and shape.
        """
        return self.features(self.convert(images)).float()

    @torch.no_grad()
    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features as `forward` makes them, and float32 logits `(B, num_classes)`."""
        features, logits = self.features_and_logits(self.convert(images))
        return features.float(), logits.float()

    def convert(self, images: Tensor) -> Tensor:
        """Return the images in [0, 1], `(B, channels, resolution, resolution)`, on the device of the extractor."""
        images = self.check(images).float() / 255
        if images.shape[1] > self.channels:
            images = torch.einsum("bchw,c->bhw", images, images.new_tensor(_LUMA)).unsqueeze(1)
        size = (self.resolution, self.resolution)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode=self.interpolation, antialias=True)
        return images.expand(-1, self.channels, -1, -1)

    def check(self, images: Tensor) -> Tensor:
        """Return the images on the device of the extractor, if they are a batch of uint8 images."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UsageError(
                "features are taken of uint8 images of shape (B, 1 or 3, H, W), but these are "
                f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}."
            )
        return images.to(next(self.parameters(), images).device)

    def features(self, images: Tensor) -> Tensor:
        """Map what `convert` made to features `(B, num_features)`."""
        raise NotImplementedError

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map what `convert` made to features and logits, in a classifier."""
        raise NotImplementedError


_LARGEST_PIXELS = 32


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
