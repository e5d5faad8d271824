"""Large pretrained networks, here with random weights in the same files."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    MobileViTImageProcessorPil,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessorPil,
)

from dia_diffusion.errors import UsageError
from dia_diffusion.files import cache_dir
from dia_diffusion.scoring.features.named import get_extractor


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


PROCESSORS = {
    "crop": BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
        resample=Image.Resampling.BICUBIC,
    ),
    "not normalised": ViTImageProcessorPil(size={"height": 28, "width": 28}, do_normalize=False),
    "rescaled otherwise": ViTImageProcessorPil(size={"height": 28, "width": 28}, rescale_factor=1 / 127.5, resample=0),
    "not rescaled": ViTImageProcessorPil(size={"height": 28, "width": 28}, do_rescale=False, do_normalize=False),
    "blue first": MobileViTImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "a share of it": ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.7, resample=1),
}


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


@pytest.mark.parametrize(
    ("kind", "preparation"),
    [("dinov2", name) for name in PROCESSORS] + [("resnet", "crop"), ("clip", "not normalised")],
)
@torch.no_grad()
def test_vision_models_see_the_image_as_their_processor_prepares_it(tmp_path, kind, preparation):
    model, expected = vision_model(kind)
    model.eval().save_pretrained(tmp_path / "model")
    processor = PROCESSORS[preparation]
    processor.save_pretrained(tmp_path / "model")
    extractor = get_extractor(str(tmp_path / "model"))
    for size, channels in ((28, 3), (50, 3), (12, 1)):
        images = torch.randint(256, (3, channels, size, size), dtype=torch.uint8)
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.expand(-1, 3, -1, -1)]
        pixels = processor(pictures, return_tensors="pt").pixel_values
        features = extractor(images)
        assert features.shape == (3, extractor.num_features)
        torch.testing.assert_close(features, expected(model, pixels))
    assert extractor.settings["processor"]["rescale_factor"] == processor.rescale_factor
    assert extractor.settings["weights"] is not None
    json.dumps(extractor.settings)
