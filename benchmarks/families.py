"""A small model of each family that `attach` knows, random, with inputs for it: what `attention_cost.py` measures."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

BATCH = 4
CROSS, HEADS = 64, 4
UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": CROSS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 32,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
UNET_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
TRANSFORMER = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 32,
    "in_channels": 4,
    "num_layers": 4,
    "sample_size": 16,
    "patch_size": 2,
}


def make_controlnet() -> ControlNetModel:
    unused = ("sample_size", "up_block_types")
    config = {name: value for name, value in UNET.items() if name not in unused}
    return ControlNetModel(**config, conditioning_embedding_out_channels=(8, 16))


def make_resnet(layer_type: str) -> ResNetForImageClassification:
    widths = [32, 64] if layer_type == "basic" else [64, 128]
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=32, hidden_sizes=widths, depths=[3, 3], layer_type=layer_type)
    )


def make_vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "image_size": 32, "patch_size": 4}
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=4, num_attention_heads=HEADS))


def make_convnext() -> ConvNextForImageClassification:
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[32, 64], depths=[3, 3], num_stages=2))


def denoising_inputs(frames: int | None = None) -> dict[str, Any]:
    shape = (BATCH, 4, 16, 16) if frames is None else (BATCH, 4, frames, 16, 16)
    timestep = torch.arange(BATCH) * 100
    return {
        "sample": torch.randn(shape),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(BATCH, 16, CROSS),
    }


def sdxl_inputs() -> dict[str, Any]:
    added = {"text_embeds": torch.randn(BATCH, 32), "time_ids": torch.rand(BATCH, 6)}
    return denoising_inputs() | {"added_cond_kwargs": added}


def transformer_inputs(**more: Any) -> dict[str, Any]:
    return {"hidden_states": torch.randn(BATCH, 4, 16, 16), "timestep": torch.arange(BATCH) * 100, **more}


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


# What makes a model, and inputs for it.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "UNet2DConditionModel, SD": (lambda: UNet2DConditionModel(**UNET), denoising_inputs),
    "UNet2DConditionModel, SDXL": (lambda: UNet2DConditionModel(**UNET | SDXL), sdxl_inputs),
    "ControlNetModel": (
        make_controlnet,
        lambda: denoising_inputs() | {"controlnet_cond": torch.rand(BATCH, 3, 32, 32)},
    ),
    "UNet3DConditionModel": (lambda: UNet3DConditionModel(**UNET | UNET_3D), lambda: denoising_inputs(frames=2)),
    "DiTTransformer2DModel": (
        lambda: DiTTransformer2DModel(**TRANSFORMER, num_embeds_ada_norm=10),
        lambda: transformer_inputs(class_labels=torch.arange(BATCH)),
    ),
    "PixArtTransformer2DModel": (
        lambda: PixArtTransformer2DModel(
            **TRANSFORMER, cross_attention_dim=128, caption_channels=CROSS, norm_type="ada_norm_single"
        ),
        lambda: transformer_inputs(
            encoder_hidden_states=torch.randn(BATCH, 16, CROSS),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    "ResNet, basic blocks": (lambda: make_resnet("basic"), pixels),
    "ResNet, bottlenecks": (lambda: make_resnet("bottleneck"), pixels),
    "ViT": (make_vit, pixels),
    "ConvNeXt": (make_convnext, pixels),
}


def make_step(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    """A forward pass and its backward pass, for all outputs."""

    def step() -> None:
        outputs = torch.utils._pytree.tree_leaves(model(**inputs, return_dict=False))
        sum(output.square().mean() for output in outputs if isinstance(output, Tensor)).backward()
        model.zero_grad()

    return step
