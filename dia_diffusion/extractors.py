"""Feature extractors by name."""

from .errors import UsageError
from .features import DigitsFeatures, FeatureExtractor, PixelFeatures
from .pretrained_features import InceptionFeatures, VisionModelFeatures

# Extractors that are made from the resolution and channels of the images.
EXTRACTORS: dict[str, type[FeatureExtractor]] = {
    extractor.name: extractor for extractor in (DigitsFeatures, PixelFeatures)
}
FEATURES = (*EXTRACTORS, InceptionFeatures.name, "a vision model of transformers (folder or Hub id)")


def get_extractor(
    name: str, resolution: int | None = None, channels: int | None = None, inception_path: str | None = None
) -> FeatureExtractor:
    """Makes a feature extractor.

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
    return VisionModelFeatures(name)
