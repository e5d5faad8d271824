"""The pixels as features."""

from torch import Tensor

from ...errors import UsageError
from .extractor import FeatureExtractor

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
