"""Features of large pretrained networks: the Inception of the FID literature, and vision models of transformers."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError, first_line
from ...files import cache_dir
from .extractor import FeatureExtractor

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"


class InceptionFeatures(FeatureExtractor):
    """2,048 features and 1,008 logits of the Inception-v3 with which the FID was defined (Heusel et al. 2017).

    Its weights come from one of two conversions of the same TensorFlow file: the TorchScript file of the StyleGAN and
    EDM code, or the package torch-fidelity. Both resize inside, as TensorFlow 1 did (bilinear, not antialiased).

    Args:
        path (`str` or `Path`, *optional*):
            The TorchScript file. By default `inception-2015-12-05.pt` in the cache folder of this package, and where
            that is missing torch-fidelity, which downloads its weights by itself.

    Raises:
        UsageError: if there is neither, or the file is none.
    """

    name = "inception"
    num_features = 2048
    num_classes = 1008
    channels = 3
    resolution = 299
    value_range = (0.0, 255.0)
    resizing = "bilinear of TensorFlow 1, not antialiased, to 299x299"

    def __init__(self, path: str | Path | None = None):
        super().__init__()
        cached = cache_dir() / INCEPTION_FILE
        has_file = path is not None or cached.is_file()
        self.network = _TorchScriptInception(Path(path or cached)) if has_file else _FidelityInception(cached)
        self.requires_grad_(False).eval()
        # A file may hold another network of the same interface.
        self.num_features = self.network(torch.zeros(1, 3, 299, 299, dtype=torch.uint8)).shape[1]

    def convert(self, images: Tensor) -> Tensor:
        """Return the images as they are, with three channels."""
        return self.check(images).expand(-1, 3, -1, -1)

    def features(self, images: Tensor) -> Tensor:
        return self.network(images)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.features_and_logits(images)


class _TorchScriptInception(nn.Module):
    def __init__(self, path: Path):
        super().__init__()
        try:
            self.script = torch.jit.load(path, map_location="cpu")
        except (RuntimeError, ValueError, OSError) as error:
            reason = "there is no such file" if not path.is_file() else first_line(error)
            raise UsageError(f"cannot read the TorchScript file '{path}': {reason}.") from error

    def forward(self, images: Tensor) -> Tensor:
        return self.script(images, return_features=True)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # The file gives probabilities; their logarithm is as good as logits. Without the bias, as the Inception Score
        # has been computed since Salimans et al. 2016.
        probabilities = self.script(images, no_output_bias=True)
        return self(images), probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


class _FidelityInception(nn.Module):
    def __init__(self, cached: Path):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UsageError(
                "the Inception network of the FID literature is not here. Download "
                f"{INCEPTION_URL} to '{cached}' (or name it with --inception_path), or install "
                f"torch-fidelity: pip install 'dia-diffusion[fidelity]'. ({error})"
            ) from error
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(images)


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
            # Always the slow processor, which needs no torchvision: the fast one resizes differently.
            self.processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil")
            self.model = AutoModel.from_pretrained(name_or_path)
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(
                f"'{name_or_path}' is neither the name of features (digits, inception, pixels) nor a vision model of "
                f"transformers that can be loaded: {first_line(error).split('. ')[0]}."
            ) from error
        self.requires_grad_(False).eval()
        try:
            self.num_features = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"'{name_or_path}' cannot be used for features: it fails at an image that its own processor prepared "
                f"({first_line(error)})."
            ) from error

    @property
    def settings(self) -> dict[str, Any]:
        """Settings as in the base class, with those of the processor, which resizes and scales by itself."""
        told = {name: value for name, value in self.processor.to_dict().items() if value is not None}
        return {
            "num_features": self.num_features,
            "channels": self.channels,
            "processor": json.loads(json.dumps(told, default=str, sort_keys=True)),
            "weights": self.digest(),
        }

    def convert(self, images: Tensor) -> Tensor:
        """Return the images as their processor prepares them, `(B, 3, H, W)`, on the device of the model."""
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
