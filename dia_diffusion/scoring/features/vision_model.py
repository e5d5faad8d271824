"""Features of the vision models of transformers."""

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UsageError
from .extractor import FeatureExtractor


class VisionModelFeatures(FeatureExtractor):
    """Features of any vision model of transformers, such as `facebook/dinov2-large` (FD-DINOv2, Stein et al. 2023).

    Images are prepared by the image processor that was saved with the model. The feature is the pooled output, or the
    mean of the last hidden state where the model has none; for models of images and text, such as CLIP, the embedding
    of the image.

    Args:
        name_or_path (`str`): Folder or Hub id of the model.

    Raises:
        UsageError: if it cannot be loaded, or sees no images.
    """

    channels = 3

    def __init__(self, name_or_path: str):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.name = name_or_path
        try:
            # The one that needs no torchvision, everywhere: the two differ in how they resize.
            self.processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil")
            self.model = AutoModel.from_pretrained(name_or_path)
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(
                f"'{name_or_path}' is neither the name of features (digits, inception, pixels) nor a vision model of "
                f"transformers that can be loaded: {str(error).splitlines()[0].split('. ')[0]}."
            ) from error
        self.requires_grad_(False).eval()
        self.num_features = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]

    @property
    def settings(self) -> dict[str, Any]:
        """As those of all extractors, and what the processor does, whose own the resizing and the values are."""
        told = {name: value for name, value in self.processor.to_dict().items() if value is not None}
        return {
            "num_features": self.num_features,
            "channels": self.channels,
            "processor": json.loads(json.dumps(told, default=str, sort_keys=True)),
            "weights": self.checksum(),
        }

    def convert(self, images: Tensor) -> Tensor:
        """The images as their processor prepares them, `(B, 3, H, W)`, on the device of the model."""
        images = self.check(images).expand(-1, 3, -1, -1)
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self.processor(pictures, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        return pixels.to(images.device)

    def features(self, images: Tensor) -> Tensor:
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=images)
        else:
            output = self.model(pixel_values=images)
        if isinstance(output, Tensor):
            return output
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean(1) if hidden.ndim == 3 else F.adaptive_avg_pool2d(hidden, 1).flatten(1)
