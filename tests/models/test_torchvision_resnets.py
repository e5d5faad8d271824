"""ResNets of torchvision and timm. torchvision needs the build of torch that it was made for, so `make test-peers` runs
this in an environment of its own, without the settings of the other tests."""

import copy

import pytest
import torch

from dia_diffusion import attach, detach
from dia_diffusion.errors import UsageError

# What does not fit together fails with other errors than ImportError.
torchvision = pytest.importorskip("torchvision", exc_type=Exception)
timm = pytest.importorskip("timm", exc_type=Exception)

# Basic and bottleneck blocks, and what is made of them.
NAMES = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
MAKERS = {"torchvision": torchvision.models.get_model, "timm": timm.create_model}


@pytest.fixture(params=[(library, name) for library in MAKERS for name in NAMES], ids=" ".join)
def model(request):
    library, name = request.param
    torch.manual_seed(0)
    model = MAKERS[library](name, num_classes=10)
    # timm starts the last norm of each branch at zero, which would hide what is before it.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    model.number = 8 if name == "resnet18" else 16
    return model.eval()


def pixels(size=2):
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def open_gates(model):
    for parameter in model.dia.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


@torch.no_grad()
def test_identity_gates_and_detach(model, tmp_path):
    plain, expected = copy.deepcopy(model), model(pixels())
    dia = attach(model, hidden_size=8)
    assert len(dia.widths) == model.number
    assert sorted(set(dia.levels)) == ["layer1", "layer2", "layer3", "layer4"]
    assert torch.equal(model(pixels()), expected)
    open_gates(model)
    with dia.record() as maps:
        gated = model(pixels())
    assert list(maps) == list(dia.config.names)
    # The same gates by hand: behind the last norm, before the shortcut is added.
    for name, gate in maps.items():
        last = list(plain.get_submodule(name).named_children())
        norms = [module for key, module in last if key.startswith("bn")]
        norms[-1].register_forward_hook(lambda module, args, output, gate=gate: output * gate[:, :, None, None])
    torch.testing.assert_close(plain(pixels()), gated, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(gated, expected, atol=1e-3)
    dia.save_pretrained(tmp_path)
    detach(model)
    assert torch.equal(model(pixels()), expected)
    attach(model, pretrained=tmp_path)
    assert torch.equal(model(pixels()), gated)


def test_every_parameter_has_a_gradient(model):
    attach(model.train(), hidden_size=8)
    open_gates(model)
    model(pixels(4)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.dia.decoders.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_attention_of_one_library_fits_the_model_of_the_other(tmp_path):
    dia = attach(MAKERS["torchvision"]("resnet18", num_classes=10), hidden_size=8)
    dia.save_pretrained(tmp_path)
    attach(MAKERS["timm"]("resnet18", num_classes=10), pretrained=tmp_path)
    with pytest.raises(UsageError, match="made for 8 branches, and ResNet has 16"):
        attach(MAKERS["timm"]("resnet50", num_classes=10), pretrained=tmp_path)


@torch.no_grad()
def test_detectors_and_segmenters_of_torchvision():
    untrained = {"weights": None, "weights_backbone": None}
    for model in (
        torchvision.models.detection.retinanet_resnet50_fpn(**untrained, min_size=64),
        torchvision.models.segmentation.fcn_resnet50(**untrained),
    ):
        model.eval()
        outputs = [torch.utils._pytree.tree_leaves(model(pixels()))]
        dia = attach(model, hidden_size=8)
        assert len(dia.widths) == 16
        outputs.append(torch.utils._pytree.tree_leaves(model(pixels())))
        assert all(map(torch.equal, *outputs))
