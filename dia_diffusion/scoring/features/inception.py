"""Features of large pretrained networks: the Inception of the FID literature, and vision models of transformers."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import UsageError
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
        if path is not None or cached.is_file():
            self.network = _TorchScriptInception(Path(path or cached))
        else:
            self.network = _FidelityInception(cached)
        self.requires_grad_(False).eval()
        # A file may hold another network of the same interface.
        self.num_features = self.network(torch.zeros(1, 3, 299, 299, dtype=torch.uint8)).shape[1]

    def convert(self, images: Tensor) -> Tensor:
        """The images as they are, with three channels."""
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
            reason = "there is no such file" if not path.is_file() else str(error).splitlines()[0]
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
