"""`dia analyze` of an image classifier with attention attached."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dia_diffusion import attach
from dia_diffusion.cli import main
from dia_diffusion.data.sources import load_digits_dataset
from tiny_unets import open_gates

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
MODELS = {
    "ViT": lambda: ViTForImageClassification(ViTConfig(**VIT, num_hidden_layers=3, num_channels=1)),
    "ResNet": lambda: ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    ),
    "DINOv2, found": lambda: Dinov2Model(
        Dinov2Config(**{k: v for k, v in VIT.items() if "inter" not in k}, num_hidden_layers=2, num_channels=1)
    ),
}
GROUPS = {
    "ViT": {"every pair", "level 0", "attention-attention", "attention-mlp", "mlp-attention", "mlp-mlp"},
    "ResNet": {"every pair", "level 0", "level 1", "between levels", "block-block"},
    "DINOv2, found": {"every pair", "level 0"} | {f"layer_scale{a}-layer_scale{b}" for a in (1, 2) for b in (1, 2)},
}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_correlations_are_those_of_the_recorded_gates(name, tmp_path, capsys):
    model = MODELS[name]()
    found = {"inputs": torch.zeros(2, 1, 8, 8)} if name not in ("ViT", "ResNet") else {}
    attach(model, attention="se", sharing="block", reduction=1, **found)
    open_gates(model).eval()
    model.save_pretrained(tmp_path / "model")
    model.dia.save_pretrained(tmp_path / "attention")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 8, "width": 8}, "image_mean": [0.3], "image_std": [0.4]})
    )
    options = [
        "--attention",
        str(tmp_path / "attention"),
        "--dataset",
        "digits",
        "--num_images",
        "12",
        "--batch_size",
        "5",
    ]
    assert main(["analyze", str(tmp_path / "model"), *options, "--output_dir", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert figures["num_images"] == 12
    assert figures["timesteps"] == []
    assert set(figures["cka"]["all"]["groups"]) == GROUPS[name]
    assert "12 images; there are no timesteps" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 4

    digits = load_digits_dataset()["test"]
    chosen = [np.asarray(digits[index * len(digits) // 12]["image"]) for index in range(12)]
    images = (torch.tensor(np.stack(chosen))[:, None] / 255 - 0.3) / 0.4
    assert images.shape == (12, 1, 8, 8)
    with model.dia.record() as maps, torch.no_grad():
        model(pixel_values=images)
    assert [block["name"] for block in figures["blocks"]] == list(maps)
    pair = figures["correlation"]["all"]["pairs"][0]
    a, b = (maps[block].numpy() for block in pair["blocks"])
    expected = [np.corrcoef(a[:, channel], b[:, channel])[0, 1] for channel in range(a.shape[1])]
    assert pair["mean"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_what_does_not_fit_is_told(tmp_path, capsys):
    vit, resnet = (MODELS[name]() for name in ("ViT", "ResNet"))
    vit.save_pretrained(tmp_path / "vit")
    attach(resnet).save_pretrained(tmp_path / "attention")
    options = ["--attention", str(tmp_path / "attention"), "--dataset", "digits", "--output_dir", str(tmp_path / "out")]
    assert main(["analyze", str(tmp_path / "vit"), *options]) == 2
    assert "made for transformers ResNet, and ViTForImageClassification is of ViT" in capsys.readouterr().err
    assert main(["analyze", str(tmp_path / "nowhere"), *options]) == 2
    assert "is no image model of transformers" in capsys.readouterr().err
