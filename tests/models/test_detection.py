"""Detectors of transformers whose ResNet backbone has attention."""

import copy

import pytest
import torch
from backbones import noise
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetBackbone,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetBackbone,
    RTDetrResNetConfig,
)
from transformers.models.detr import modeling_detr
from transformers.models.rt_detr import modeling_rt_detr

from dia_diffusion import attach, detach
from tiny_unets import open_gates

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SMALL = {
    "d_model": 16,
    "num_queries": 5,
    "num_labels": 3,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def detr_config():
    resnet = ResNetConfig(**RESNET, out_features=["stage4"])
    return DetrConfig(
        backbone_config=resnet, use_timm_backbone=False, encoder_layers=1, dropout=0.0, auxiliary_loss=False, **SMALL
    )


def rt_detr_config():
    return RTDetrConfig(
        backbone_config=RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]),
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 16, 16],
        decoder_in_channels=[16, 16, 16],
        num_denoising=0,
        **SMALL,
    )


class Detector:
    def __init__(self, model_class, make_config, backbone_class, module):
        self.model_class, self.make_config = model_class, make_config
        self.backbone_class, self.module = backbone_class, module

    def make(self):
        return self.model_class(self.make_config())


DETECTORS = {
    "DETR": Detector(DetrForObjectDetection, detr_config, ResNetBackbone, modeling_detr),
    "RT-DETR": Detector(RTDetrForObjectDetection, rt_detr_config, RTDetrResNetBackbone, modeling_rt_detr),
}


@pytest.fixture(params=DETECTORS)
def detector(request):
    return DETECTORS[request.param]


def inputs():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    labels = [{"class_labels": torch.tensor([number]), "boxes": boxes / (1 + number)} for number in range(2)]
    return {"pixel_values": noise(2, 3, 64, 64), "labels": labels}


@torch.no_grad()
def predict(model):
    output = model.eval()(pixel_values=noise(2, 3, 64, 64))
    return output.logits, output.pred_boxes


def assert_equal(some, others):
    assert all(map(torch.equal, some, others))


def without_gradient(model):
    model.train()
    model.zero_grad()
    model(**inputs()).loss.backward()
    return [name for name, parameter in model.dia.named_parameters() if parameter.grad is None]


def test_it_starts_as_the_identity_and_comes_off_again(detector, tmp_path):
    model = detector.make()
    expected = predict(model)
    dia = attach(model, hidden_size=8)
    assert len(dia.widths) == 4
    assert dia.config.family == "transformers ResNet"
    assert_equal(predict(model), expected)
    open_gates(model)
    gated = predict(model)
    assert not torch.allclose(gated[0], expected[0], atol=1e-4)
    dia.save_pretrained(tmp_path)
    detach(model)
    assert_equal(predict(model), expected)
    attach(model, pretrained=tmp_path)
    assert_equal(predict(model), gated)


@pytest.mark.parametrize("arguments", [{}, {"attention": "se", "sharing": "block"}], ids=str)
def test_what_is_attached_is_trained(detector, arguments):
    """DETR freezes its backbone's parameters when it is built; attention that comes afterwards is not among them."""
    model = detector.make()
    attach(model, init="paper", **arguments)
    assert without_gradient(model) == []
    before = copy.deepcopy(model.dia.state_dict())
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    losses = []
    for _ in range(25):
        losses.append(model(**inputs()).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.dia.named_parameters())


def test_the_attention_alone_lowers_the_loss(detector):
    model = detector.make().train()
    model.requires_grad_(False)
    dia = attach(model, hidden_size=8)
    optimizer = torch.optim.AdamW(dia.parameters(), lr=3e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(10):
        losses.append(model(**inputs()).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_the_whole_is_saved_and_loaded_back_in_two_steps(detector, tmp_path):
    """`save_pretrained` of the detector writes the attention's weights beside its own. The detector that is loaded
    has none, and says so; the attention is attached from its own folder."""
    model = detector.make()
    attach(model, hidden_size=8)
    open_gates(model)
    expected = predict(model)
    model.save_pretrained(tmp_path / "detector")
    model.dia.save_pretrained(tmp_path / "attention")
    loaded, report = detector.model_class.from_pretrained(tmp_path / "detector", output_loading_info=True)
    assert not report["missing_keys"]
    assert {name.split(".")[0] for name in report["unexpected_keys"]} == {"dia"}
    detach(model)
    assert_equal(predict(loaded), predict(model))
    attach(loaded, pretrained=tmp_path / "attention")
    assert_equal(predict(loaded), expected)


def test_attached_to_the_backbone_alone(detector):
    """The backbone inside of the detector is a model like any other; its attention has gradients too."""
    model = detector.make()
    expected = predict(model)
    backbone = model.model.backbone.model
    dia = attach(backbone, hidden_size=8)
    assert_equal(predict(model), expected)
    model.dia = dia  # for the names of its parameters
    assert without_gradient(model) == []
    open_gates(backbone)
    assert not torch.allclose(predict(model)[0], expected[0], atol=1e-4)


def test_attached_before_the_detector_is_built(detector, monkeypatch):
    """A detector builds its own backbone. One that is given a backbone with attention replaces its norms, which the
    gates follow, and DETR freezes the attention along with the backbone: it has to be released."""
    config = detector.make_config()
    backbone = detector.backbone_class(config.backbone_config)
    dia = attach(backbone, hidden_size=8)
    monkeypatch.setattr(detector.module, "load_backbone", lambda config: backbone)
    model = detector.model_class(config)
    frozen = detector is DETECTORS["DETR"]
    assert all(parameter.requires_grad != frozen for parameter in dia.parameters())
    dia.requires_grad_(True)
    expected = predict(model)
    open_gates(backbone)
    assert not torch.allclose(predict(model)[0], expected[0], atol=1e-4)
    model.dia = dia
    assert without_gradient(model) == []
