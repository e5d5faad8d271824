"""Feature extractors by name: the spaces in which sets of images are compared. Each is a short subclass of
`FeatureExtractor` in a file of its own."""

from ...errors import UsageError
from ...suggestions import nearest
from .digits import DigitsFeatures
from .extractor import FeatureExtractor
from .inception import InceptionFeatures
from .pixels import PixelFeatures
from .vision_model import VisionModelFeatures

# Extractors that are made from the resolution and channels of the images.
EXTRACTORS: dict[str, type[FeatureExtractor]] = {
    extractor.name: extractor for extractor in (DigitsFeatures, PixelFeatures)
}
_NAMES = (*EXTRACTORS, InceptionFeatures.name)
FEATURES = (*_NAMES, "a vision model of transformers (folder or Hub id)")


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
    try:
        return VisionModelFeatures(name)
    except UsageError as error:
        raise UsageError(f"{error}{nearest(name, _NAMES)}") from error
