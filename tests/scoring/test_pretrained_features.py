"""Large pretrained networks, here with random weights in the same files."""

import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers.utils import is_torchvision_available
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
)

from dia_diffusion.errors import UsageError
from dia_diffusion.files import cache_dir
from dia_diffusion.scoring import get_extractor


class StandIn(nn.Module):
    """A small network with the interface of the Inception file."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(12, 7)
        self.output = nn.Linear(7, 5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = self.body(F.adaptive_avg_pool2d(img.float() / 128 - 1, 2).flatten(1))
        if return_features:
            return x
        logits = F.linear(x, self.output.weight) if no_output_bias else self.output(x)
        return logits.softmax(1)


@pytest.fixture
def script(tmp_path):
    network = StandIn()
    torch.jit.script(network).save(tmp_path / "inception.pt")
    return network, tmp_path / "inception.pt"


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_a_torchscript_file_gives_features_and_class_probabilities(script, channels):
    network, path = script
    extractor = get_extractor("inception", inception_path=str(path))
    assert extractor.num_features == 7
    images = torch.randint(256, (4, channels, 16, 16), dtype=torch.uint8)
    colour = images.expand(-1, 3, -1, -1)
    features, logits = extractor.classify(images)
    torch.testing.assert_close(features, network(colour, return_features=True))
    torch.testing.assert_close(extractor(images), features)
    torch.testing.assert_close(logits.softmax(1), network(colour, no_output_bias=True))


def test_the_torchscript_file_is_found_in_the_cache_and_its_weights_are_told_apart(script, tmp_path, monkeypatch):
    monkeypatch.setenv("DIA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    script[1].rename(cache_dir() / "inception-2015-12-05.pt")
    settings = get_extractor("inception").settings
    assert settings["resizing"].startswith("bilinear of TensorFlow 1")
    torch.jit.script(StandIn()).save(tmp_path / "other.pt")
    assert get_extractor("inception", inception_path=tmp_path / "other.pt").settings["weights"] != settings["weights"]


def test_without_an_inception_network_the_message_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("DIA_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(
        UsageError, match=r"Download https://.*--inception_path.*pip install 'dia-diffusion\[fidelity\]'"
    ):
        get_extractor("inception")
    (tmp_path / "broken.pt").write_text("no TorchScript")
    with pytest.raises(UsageError, match="cannot read the TorchScript file"):
        get_extractor("inception", inception_path=tmp_path / "broken.pt")
    with pytest.raises(UsageError, match="there is no such file"):
        get_extractor("inception", inception_path=tmp_path / "nowhere.pt")


def processor(size):
    return BitImageProcessorPil(
        size={"shortest_edge": size + 4},
        crop_size={"height": size, "width": size},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
        resample=Image.Resampling.BICUBIC,
    )


def vision_model(kind):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**small)), lambda model, pixels: model(pixels).last_hidden_state[:, 0]
    if kind == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        return ResNetModel(config), lambda model, pixels: model(pixels).last_hidden_state.mean((2, 3))
    text = CLIPTextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99
    )
    vision = CLIPVisionConfig(**small, intermediate_size=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    return CLIPModel(config), lambda model, pixels: model.visual_projection(model.vision_model(pixels).pooler_output)


@pytest.mark.skipif(is_torchvision_available(), reason="then transformers prefers another processor")
@pytest.mark.parametrize("kind", ["dinov2", "resnet", "clip"])
@pytest.mark.parametrize("size", [28, 50, 12])
@torch.no_grad()
def test_vision_models_see_the_image_as_their_processor_prepares_it(tmp_path, kind, size):
    model, expected = vision_model(kind)
    model.eval().save_pretrained(tmp_path / "model")
    processor(28).save_pretrained(tmp_path / "model")
    extractor = get_extractor(str(tmp_path / "model"))
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    # The whole image, by Pillow.
    resized = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((28, 28), Image.BICUBIC) for image in images]
    pixels = processor(28)(resized, do_resize=False, return_tensors="pt").pixel_values
    features = extractor(images)
    assert features.shape == (3, extractor.num_features)
    # Pillow rounds to eight bits after resizing.
    torch.testing.assert_close(features, expected(model, pixels), rtol=0.02, atol=1e-5 if size == 28 else 0.02)
    assert extractor.settings["resizing"] == "bicubic, antialiased, to 28x28"
    assert extractor.settings["weights"] is not None
