"""A tiny model of each family, with inputs for it: `test_promises.py` tries the promises on them.

`benchmarks/attention_cost.py --families` measures the same models, four times as wide.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import (
    ControlNetModel,
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
)
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dia_diffusion import attach
from tiny_unets import PLAIN


class Backbone(NamedTuple):
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int], dict]  # for a number of images
    branches: int
    context: bool = False
    ends: tuple[str, ...] | None = None  # of its branches, where no family knows them

    def attach(self, model, **arguments):
        return attach(model, **arguments, **({} if self.ends is None else {"branches": self.ends}))


class PlainCNN(torch.nn.Module):
    """A residual network of nobody's: a convolution with a norm, and another of another width without."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.first = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
        self.widen = torch.nn.Conv2d(8, 12, 1)
        self.second = torch.nn.Conv2d(12, 12, 3, padding=1)
        self.third = torch.nn.Conv2d(12, 12, 1)

    def forward(self, images):
        x = self.stem(images)
        x = torch.relu(x + self.first(x))
        x = self.widen(x)
        x = torch.relu(x + self.second(x))
        return (torch.relu(x + self.third(x)),)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def strong(model):
    """Layers that start at or near zero would hide what is before them."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.std() < 0.05:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


CONDITION = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 4 * 6 + 10,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}


def condition_inputs(size, side=8):
    return {
        "sample": noise(size, 4, side, side),
        "timestep": torch.arange(size) * 100,
        "encoder_hidden_states": noise(size, 5, 12),
    }


def sdxl_inputs(size, side=8):
    added = {"text_embeds": noise(size, 10), "time_ids": noise(size, 6).abs()}
    return condition_inputs(size, side) | {"added_cond_kwargs": added}


TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}


def make_backbones(scale=1):
    """Return a model of each family, `scale` times as wide, for images of twice the side where it is wider."""
    side, widths = 8 if scale == 1 else 16, [8 * scale, 16 * scale]
    plain = PLAIN | {"sample_size": side, "block_out_channels": tuple(widths)}
    condition = CONDITION | {"sample_size": side, "block_out_channels": tuple(widths)}
    transformer = TRANSFORMER | {"sample_size": side, "attention_head_dim": 8 * scale}
    unused = ("sample_size", "up_block_types")
    resnet = {"embedding_size": 8 * scale, "hidden_sizes": widths, "depths": [2, 2]}

    def given(size):
        return condition_inputs(size, side)

    def sdxl(size):
        return sdxl_inputs(size, side)

    def pixels(size):
        return {"pixel_values": noise(size, 3, 2 * side, 2 * side)}

    return {
        "UNet2DModel": Backbone(
            lambda: UNet2DModel(**plain),
            lambda size: {"sample": noise(size, 3, side, side), "timestep": torch.arange(size) * 100},
            8,
            True,
        ),
        "UNet2DConditionModel (SD)": Backbone(lambda: UNet2DConditionModel(**condition), given, 8, True),
        "UNet2DConditionModel (SDXL)": Backbone(
            lambda: UNet2DConditionModel(**condition | SDXL), lambda size: sdxl_inputs(size, side), 8, True
        ),
        "ControlNetModel": Backbone(
            lambda: strong(
                ControlNetModel(
                    **{name: value for name, value in condition.items() if name not in unused},
                    conditioning_embedding_out_channels=(4, 8),
                )
            ),
            lambda size: given(size) | {"controlnet_cond": noise(size, 3, 2 * side, 2 * side)},
            4,
            True,
        ),
        "UNet3DConditionModel": Backbone(
            lambda: UNet3DConditionModel(
                **condition
                | {
                    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
                }
            ),
            lambda size: given(size) | {"sample": noise(size, 4, 2, side, side)},
            8,
            True,
        ),
        "DiTTransformer2DModel": Backbone(
            lambda: DiTTransformer2DModel(**transformer, num_embeds_ada_norm=10),
            lambda size: {
                "hidden_states": noise(size, 4, side, side),
                "timestep": torch.arange(size) * 100,
                "class_labels": torch.arange(size),
            },
            4,
        ),
        "PixArtTransformer2DModel": Backbone(
            lambda: PixArtTransformer2DModel(
                **transformer, cross_attention_dim=16 * scale, caption_channels=6, norm_type="ada_norm_single"
            ),
            lambda size: {
                "hidden_states": noise(size, 4, side, side),
                "timestep": torch.arange(size) * 100,
                "encoder_hidden_states": noise(size, 5, 6),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
            4,
            True,
        ),
        "ResNetForImageClassification (basic)": Backbone(
            lambda: ResNetForImageClassification(ResNetConfig(**resnet, layer_type="basic")), pixels, 4
        ),
        "ResNetForImageClassification (bottleneck)": Backbone(
            lambda: ResNetForImageClassification(ResNetConfig(**resnet, layer_type="bottleneck")), pixels, 4
        ),
        "ResNetBackbone": Backbone(
            lambda: ResNetBackbone(ResNetConfig(**resnet, layer_type="basic", out_features=["stage1", "stage2"])),
            pixels,
            4,
        ),
        "ViTForImageClassification": Backbone(
            lambda: ViTForImageClassification(
                ViTConfig(
                    hidden_size=16 * scale,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=32 * scale,
                    image_size=2 * side,
                    patch_size=4,
                )
            ),
            pixels,
            4,
        ),
        "ConvNextForImageClassification": Backbone(
            lambda: strong(
                ConvNextForImageClassification(
                    ConvNextConfig(
                        hidden_sizes=resnet["hidden_sizes"],
                        depths=[2, 2],
                        num_stages=2,
                        patch_size=2,
                        layer_scale_init_value=1.0,
                    )
                )
            ),
            pixels,
            4,
        ),
        "a network with its branches named": Backbone(
            PlainCNN, lambda size: {"images": noise(size, 3, side, side)}, 3, ends=("first.1", "second", "third")
        ),
    }


BACKBONES = make_backbones()


def outputs(model, inputs):
    """All tensors that a model puts out, one after the other."""
    short = {"return_dict": False} if isinstance(model, ModelMixin | PreTrainedModel) else {}
    result = model(**inputs, **short)
    flat = torch.utils._pytree.tree_leaves(result)
    return [value for value in flat if isinstance(value, torch.Tensor)]
