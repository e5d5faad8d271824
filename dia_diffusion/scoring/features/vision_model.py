"""Features of the vision models of transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UsageError
from .extractor import FeatureExtractor

# Values of PIL.Image.Resampling, which processors of transformers store.
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


class VisionModelFeatures(FeatureExtractor):
    """Features of any vision model of transformers, such as `facebook/dinov2-large` (FD-DINOv2, Stein et al. 2023).

    The whole image is resized to the input size of the model, without cropping, and normalised as its preprocessor
    says. The feature is the pooled output, or the mean of the last hidden state where the model has none; for models of
    images and text, such as CLIP, the embedding of the image.

    Args:
        name_or_path (`str`): Folder or Hub id of the model.

    Raises:
        UsageError: if it cannot be loaded, or sees no images.
    """

    channels = 3

    def __init__(self, name_or_path: str):
        super().__init__()
        from transformers import AutoModel, ImageProcessingMixin

        self.name = name_or_path
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
            self.model = AutoModel.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"'{name_or_path}' is neither the name of features (digits, inception, pixels) nor a vision model of "
                f"transformers that can be loaded: {str(error).splitlines()[0].split('. ')[0]}."
            ) from error
        self.resolution = _input_size(processor, self.model.config)
        self.interpolation = _INTERPOLATIONS.get(processor.get("resample"), "bicubic")
        for name in ("mean", "std"):
            values = processor.get(f"image_{name}", [0.5] * 3)
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))
        self.requires_grad_(False).eval()
        self.num_features = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]

    def features(self, images: Tensor) -> Tensor:
        # Bicubic interpolation overshoots, which eight-bit images would not hold.
        pixels = (images.clamp(0, 1) - self.mean) / self.std
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixels)
        else:
            output = self.model(pixel_values=pixels)
        if isinstance(output, Tensor):
            return output
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean(1) if hidden.ndim == 3 else F.adaptive_avg_pool2d(hidden, 1).flatten(1)


def _input_size(processor: dict[str, Any], config: Any) -> int:
    """The side of the square that the model was made for."""
    for size in (processor.get("crop_size") if processor.get("do_center_crop") else None, processor.get("size")):
        if isinstance(size, int):
            return size
        for key in ("height", "shortest_edge"):
            if size and key in size:
                return size[key]
    return getattr(config, "image_size", 224)
