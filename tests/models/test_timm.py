"""Branches of timm's models, as one forward pass shows them. `make test-peers` runs this in its own environment."""

import pytest
import torch

from dia_diffusion import attach, detach, find_branches

# What does not fit together fails with other errors than ImportError.
timm = pytest.importorskip("timm", exc_type=Exception)

# Side of the images, and the number of residual branches where the architecture says it.
MODELS = {
    "resnet18": (64, 8),
    "resnet50": (64, 16),
    "resnext50_32x4d": (64, 16),
    "seresnet18": (64, 8),
    "ecaresnet26t": (64, 8),
    "resnetv2_50": (64, 16),
    "resnetblur50": (64, 16),
    "skresnet18": (64, 8),
    "res2net50_26w_4s": (64, None),
    "regnety_002": (64, 13),
    "mobilenetv2_100": (64, 10),
    "mobilenetv3_small_100": (64, None),
    "efficientnet_b0": (64, 9),
    "tf_efficientnetv2_b0": (64, None),
    "mnasnet_100": (64, 10),
    "convnext_atto": (64, 12),
    "convnextv2_atto": (64, 12),
    "vit_tiny_patch16_224": (224, 24),
    "deit_tiny_patch16_224": (224, 24),
    "beit_base_patch16_224": (224, 24),
    "eva02_tiny_patch14_224": (224, 24),
    "cait_xxs24_224": (224, None),
    "xcit_nano_12_p16_224": (224, None),
    "swin_tiny_patch4_window7_224": (224, 24),
    "pvt_v2_b0": (64, 16),
    "poolformer_s12": (64, 12),  # the pooling has no layer
    "mixer_s32_224": (224, 16),
    "gmlp_ti16_224": (224, 30),
    "resmlp_12_224": (224, 24),
    "coatnet_nano_rw_224": (224, None),
}


def pixels(side):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_branches_are_found_and_gated(name, tmp_path):
    side, count = MODELS[name]
    torch.manual_seed(0)
    model, images = timm.create_model(name, num_classes=10).eval(), pixels(side)
    with torch.no_grad():
        expected = model(images)
        found = find_branches(model, images)
        assert len(found) == count if count is not None else len(found) > 0, found
        dia = attach(model, branches=found, hidden_size=8)
        assert torch.equal(model(images), expected)
        for parameter in dia.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        with dia.record() as maps:
            gated = model(images)
        assert list(maps) == [branch.name for branch in found]
        dia.save_pretrained(tmp_path)
        detach(model)
        assert torch.equal(model(images), expected)
        attach(model, pretrained=tmp_path)
        assert torch.equal(model(images), gated)


def test_the_gate_of_a_se_resnet_comes_behind_its_own_attention():
    dia = attach(timm.create_model("seresnet18", num_classes=10))
    assert all(end.endswith(".se") for end in dia.config.ends)
