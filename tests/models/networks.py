"""Tiny random networks of many kinds, with inputs and an independent count of their residual branches."""

from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch
import transformers
from backbones import BACKBONES, noise, strong
from torch import nn


class Network(NamedTuple):
    """A network and what is known of it: layers of its configuration times branches of a layer."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict]  # for a number of samples
    branches: int
    not_gated: int = 0
    context: str | None = None  # the module that the context comes from


class PreActivationBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), He et al. 2016, arXiv 1603.05027."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class PreActivationResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(PreActivationBlock(8) for _ in range(3)))
        self.head = nn.Linear(8, 10)

    def forward(self, pixels):
        return self.head(self.blocks(self.stem(pixels)).mean((2, 3)))


def timesteps(size):
    return torch.arange(size) * 100.0 + 7


def pixels(side=32):
    return lambda size: {"pixel_values": noise(size, 3, side, side)}


def words(size):
    return {"input_ids": torch.arange(size * 7).reshape(size, 7) % 50}


def latents(size, channels=4, side=8):
    return {"hidden_states": noise(size, channels, side, side), "timestep": timesteps(size)}


def text(size, width=12, name="encoder_hidden_states"):
    return {name: noise(size, 5, width)}


def video(size, channels=4):
    return {"hidden_states": noise(size, channels, 2, 8, 8), "timestep": timesteps(size)} | text(size)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
VISION = SMALL | {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2}


def of_transformers(name, **config):
    """A model of transformers by the name of its class, with its configuration's arguments."""
    model = getattr(transformers, name)
    return lambda: strong(model(model.config_class(**config)))


def calibrated(make, inputs):
    """Let batch normalisations take their statistics from a batch, or the features of a deep network fade to zero."""

    def made():
        model = make().train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model(**inputs(4))
        return model

    return made


def of_diffusers(name, **config):
    return lambda: strong(getattr(diffusers, name)(**config))


def flux_inputs(size):
    tokens = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return (
        {"hidden_states": noise(size, 16, 4), "timestep": timesteps(size) / 1000}
        | text(size)
        | {"pooled_projections": noise(size, 6)}
        | tokens
    )


NETWORKS = {
    # Diffusers: transformers
    "SD3": Network(
        of_diffusers(
            "SD3Transformer2DModel",
            sample_size=8,
            num_layers=2,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=6,
            pos_embed_max_size=8,
            **HEADS,
        ),
        lambda size: latents(size) | text(size) | {"pooled_projections": noise(size, 6)},
        2 * 4 - 2,
        context="time_text_embed",
    ),
    "SD3.5 (dual attention)": Network(
        of_diffusers(
            "SD3Transformer2DModel",
            sample_size=8,
            num_layers=2,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=6,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
            **HEADS,
        ),
        lambda size: latents(size) | text(size) | {"pooled_projections": noise(size, 6)},
        2 * 4 - 2 + 1,
        context="time_text_embed",
    ),
    "Flux": Network(
        of_diffusers(
            "FluxTransformer2DModel",
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=12,
            pooled_projection_dim=6,
            axes_dims_rope=(4, 2, 2),
            **HEADS,
        ),
        flux_inputs,
        2 * 4 + 2,
        context="time_text_embed",
    ),
    "Flux 2": Network(
        of_diffusers(
            "Flux2Transformer2DModel",
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=12,
            timestep_guidance_channels=8,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
            **HEADS,
        ),
        lambda size: (
            {
                "hidden_states": noise(size, 16, 4),
                "timestep": timesteps(size) / 1000,
                "img_ids": torch.zeros(16, 4),
                "txt_ids": torch.zeros(5, 4),
            }
            | text(size)
        ),
        2 * 4 + 2,
    ),
    "Chroma": Network(
        of_diffusers(
            "ChromaTransformer2DModel",
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 2, 2),
            approximator_num_channels=8,
            approximator_hidden_dim=8,
            approximator_layers=2,
            **HEADS,
        ),
        lambda size: (
            {
                "hidden_states": noise(size, 16, 4),
                "timestep": timesteps(size) / 1000,
                "img_ids": torch.zeros(16, 3),
                "txt_ids": torch.zeros(5, 3),
            }
            | text(size)
        ),
        2 * 4 + 2 + 2,
    ),
    "Qwen-Image": Network(
        of_diffusers(
            "QwenImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 2, 2),
            **HEADS,
        ),
        lambda size: (
            {
                "hidden_states": noise(size, 16, 16),
                "timestep": timesteps(size) / 1000,
                "encoder_hidden_states_mask": torch.ones(size, 5).long(),
                "img_shapes": [[(1, 4, 4)]] * size,
            }
            | text(size)
        ),
        2 * 4,
        context="time_text_embed",
    ),
    "Sana": Network(
        of_diffusers(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            **HEADS,
        ),
        lambda size: latents(size) | text(size),
        2 * 3,
        context="time_embed",
    ),
    "AuraFlow": Network(
        of_diffusers(
            "AuraFlowTransformer2DModel",
            sample_size=8,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pos_embed_max_size=16,
            **HEADS,
        ),
        lambda size: latents(size) | text(size),
        2 * 4 + 2 * 2,
        context="time_step_proj",
    ),
    "Lumina 2": Network(
        of_diffusers(
            "Lumina2Transformer2DModel",
            sample_size=8,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(20, 20, 20),
            cap_feat_dim=12,
        ),
        lambda size: latents(size) | text(size) | {"encoder_attention_mask": torch.ones(size, 5).bool()},
        4 * 2,
    ),
    "CogView 4": Network(
        of_diffusers(
            "CogView4Transformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=12,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=8,
            rope_axes_dim=(8, 8),
            **HEADS,
        ),
        lambda size: (
            latents(size)
            | text(size)
            | {name: torch.tensor([[8.0, 8.0]] * size) for name in ("original_size", "target_size", "crop_coords")}
        ),
        2 * 2,
        not_gated=2 * 2,  # one feed-forward for both streams
        context="transformer_blocks.0",
    ),
    "HunyuanDiT": Network(
        of_diffusers(
            "HunyuanDiT2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=2,
            cross_attention_dim=12,
            cross_attention_dim_t5=16,
            pooled_projection_dim=6,
            text_len=5,
            text_len_t5=4,
            use_style_cond_and_image_meta_size=False,
        ),
        lambda size: (
            latents(size)
            | text(size)
            | {
                "text_embedding_mask": torch.ones(size, 5),
                "encoder_hidden_states_t5": noise(size, 4, 16),
                "text_embedding_mask_t5": torch.ones(size, 4),
                "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
            }
        ),
        2 * 3,
        context="time_extra_emb",
    ),
    "DiT": Network(BACKBONES["DiTTransformer2DModel"].make, BACKBONES["DiTTransformer2DModel"].inputs, 2 * 2),
    "PixArt": Network(
        BACKBONES["PixArtTransformer2DModel"].make,
        BACKBONES["PixArtTransformer2DModel"].inputs,
        2 * 3,
        context="adaln_single",
    ),
    "Wan": Network(
        of_diffusers(
            "WanTransformer3DModel",
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=8,
            ffn_dim=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            rope_max_seq_len=16,
        ),
        video,
        2 * 3,
    ),
    "HiDream": Network(
        of_diffusers(
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            caption_channels=[12, 12],
            text_emb_dim=6,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=[0, 0],
            **HEADS,
        ),
        lambda size: {
            "hidden_states": noise(size, 4, 8, 8),
            "timesteps": timesteps(size),
            "encoder_hidden_states_t5": noise(size, 5, 12),
            "encoder_hidden_states_llama3": noise(1, size, 5, 12),
            "pooled_embeds": noise(size, 6),
        },
        4 + 2,
        context="double_stream_blocks.0",
    ),
    "CogVideoX": Network(
        of_diffusers(
            "CogVideoXTransformer3DModel",
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=12,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=5,
            **HEADS,
        ),
        lambda size: {"hidden_states": noise(size, 2, 4, 8, 8), "timestep": timesteps(size)} | text(size),
        2 * 3,
        context="time_embedding",
    ),
    "LTX-Video": Network(
        of_diffusers(
            "LTXVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=12,
            **HEADS,
        ),
        lambda size: (
            {
                "hidden_states": noise(size, 8, 4),
                "timestep": timesteps(size),
                "encoder_attention_mask": torch.ones(size, 5),
                "num_frames": 2,
                "height": 2,
                "width": 2,
            }
            | text(size)
        ),
        2 * 3,
    ),
    "HunyuanVideo": Network(
        of_diffusers(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=12,
            pooled_projection_dim=6,
            rope_axes_dim=(4, 2, 2),
            guidance_embeds=False,
            **HEADS,
        ),
        lambda size: (
            video(size) | {"encoder_attention_mask": torch.ones(size, 5), "pooled_projections": noise(size, 6)}
        ),
        4 + 2 + 2,
    ),
    "Mochi": Network(
        of_diffusers(
            "MochiTransformer3DModel",
            in_channels=4,
            num_layers=2,
            pooled_projection_dim=8,
            text_embed_dim=16,
            time_embed_dim=8,
            **HEADS,
        ),
        lambda size: video(size) | text(size, 16) | {"encoder_attention_mask": torch.ones(size, 5).bool()},
        2 * 4 - 2,
        context="time_embed",
    ),
    # Diffusers: UNets
    "UNet2DModel": Network(
        BACKBONES["UNet2DModel"].make, BACKBONES["UNet2DModel"].inputs, 8 + 4, context="time_embedding"
    ),
    "UNet2DConditionModel": Network(
        BACKBONES["UNet2DConditionModel (SD)"].make,
        BACKBONES["UNet2DConditionModel (SD)"].inputs,
        8 + 4 * 4,
        context="time_embedding",
    ),
    "ControlNetModel": Network(
        BACKBONES["ControlNetModel"].make, BACKBONES["ControlNetModel"].inputs, 4 + 2 * 4, context="time_embedding"
    ),
    "UNet3DConditionModel": Network(
        lambda: strong(BACKBONES["UNet3DConditionModel"].make()), BACKBONES["UNet3DConditionModel"].inputs, 8 + 44
    ),
    "UNetMotionModel": Network(
        of_diffusers(
            "UNetMotionModel",
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        ),
        lambda size: (
            {"sample": noise(size, 4, 3, 8, 8), "timestep": timesteps(size)}
            # The text of each frame.
            | {"encoder_hidden_states": noise(size, 5, 12).repeat_interleave(3, 0)}
        ),
        # Residual blocks, transformers of images and transformers of frames; each of these has a residual of its own.
        8 + 4 * (3 + 1) + 7 * (3 + 1),
    ),
    "UNet1DModel": Network(
        of_diffusers(
            "UNet1DModel",
            sample_size=32,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 16),
            time_embedding_type="positional",
            use_timestep_embedding=True,
            time_embedding_dim=8,
            norm_num_groups=4,
            down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
            up_block_types=("UpResnetBlock1D", "UpResnetBlock1D"),
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            act_fn="mish",
        ),
        lambda size: {"sample": noise(size, 2, 32), "timestep": timesteps(size)},
        5 * 2,
        context="time_mlp",
    ),
    "Kandinsky 3": Network(
        of_diffusers(
            "Kandinsky3UNet",
            time_embedding_dim=8,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(8, 16),
            cross_attention_dim=12,
            encoder_hid_dim=10,
        ),
        lambda size: (
            {"sample": noise(size, 4, 8, 8), "timestep": timesteps(size), "encoder_attention_mask": torch.ones(size, 5)}
            | text(size, 10)
        ),
        4 * 3 * 2 + 3 * (3 + 1) * 2,
        context="add_time_condition",
    ),
    "Stable Cascade": Network(
        of_diffusers(
            "StableCascadeUNet",
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            conditioning_dim=16,
            block_out_channels=(8, 16),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_text_in_channels=12,
            clip_text_pooled_in_channels=6,
            clip_image_in_channels=6,
            dropout=(0.1, 0.1),
        ),
        lambda size: {
            "sample": noise(size, 4, 8, 8),
            "timestep_ratio": timesteps(size) / 1000,
            "clip_text_pooled": noise(size, 1, 6),
            "clip_text": noise(size, 5, 12),
            "clip_img": noise(size, 1, 6),
        },
        4 * 2,
    ),
    # Transformers: vision
    "ViT": Network(BACKBONES["ViTForImageClassification"].make, BACKBONES["ViTForImageClassification"].inputs, 2 * 2),
    "DeiT": Network(of_transformers("DeiTForImageClassification", **VISION), pixels(), 2 * 2),
    "DINOv2": Network(of_transformers("Dinov2Model", **SMALL | {"image_size": 32, "patch_size": 8}), pixels(), 2 * 2),
    "BEiT": Network(of_transformers("BeitModel", **VISION), pixels(), 2 * 2),
    "Swin": Network(
        of_transformers(
            "SwinModel", image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
        ),
        pixels(),
        4 * 2,
    ),
    "Swin V2": Network(
        of_transformers(
            "Swinv2Model", image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
        ),
        pixels(),
        4 * 2,
    ),
    "ConvNeXt": Network(
        BACKBONES["ConvNextForImageClassification"].make, BACKBONES["ConvNextForImageClassification"].inputs, 4
    ),
    "ConvNeXt V2": Network(of_transformers("ConvNextV2Model", patch_size=2, **STAGES), pixels(), 4),
    "ResNet": Network(
        BACKBONES["ResNetForImageClassification (bottleneck)"].make,
        BACKBONES["ResNetForImageClassification (bottleneck)"].inputs,
        4,
    ),
    "RegNet": Network(
        of_transformers(
            "RegNetModel", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], groups_width=4, layer_type="y"
        ),
        pixels(),
        4,
    ),
    "MobileNet V2": Network(of_transformers("MobileNetV2Model", depth_multiplier=0.25), pixels(), 10),
    "EfficientNet": Network(
        calibrated(
            of_transformers("EfficientNetModel", width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320),
            pixels(),
        ),
        pixels(),
        9,
    ),
    "Segformer": Network(
        of_transformers(
            "SegformerForSemanticSegmentation",
            num_encoder_blocks=2,
            depths=[2, 2],
            hidden_sizes=[8, 16],
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            patch_sizes=[3, 3],
            strides=[2, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=8,
        ),
        pixels(),
        4 * 2,
    ),
    "Hiera": Network(
        of_transformers(
            "HieraModel",
            image_size=[32, 32],
            embed_dim=8,
            depths=[1, 2],
            num_heads=[1, 2],
            query_stride=[2, 2],
            num_query_pool=1,
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, False],
        ),
        pixels(),
        3 * 2,
    ),
    "CLIP vision": Network(of_transformers("CLIPVisionModel", **VISION), pixels(), 2 * 2),
    "SigLIP vision": Network(of_transformers("SiglipVisionModel", **VISION), pixels(), 2 * 2 + 1),
    "BiT": Network(
        of_transformers("BitModel", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_groups=4), pixels(), 4
    ),
    "PVT v2": Network(
        of_transformers(
            "PvtV2Model",
            image_size=32,
            num_encoder_blocks=2,
            depths=[2, 2],
            hidden_sizes=[8, 16],
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            patch_sizes=[3, 3],
            strides=[2, 2],
            mlp_ratios=[2, 2],
        ),
        pixels(),
        4 * 2,
    ),
    "ViT-MAE": Network(
        of_transformers("ViTMAEModel", **VISION), lambda size: pixels()(size) | {"noise": noise(size, 16)}, 2 * 2
    ),
    "Conditional DETR": Network(
        of_transformers(
            "ConditionalDetrModel",
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=5,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
            ),
        ),
        pixels(64),
        2 + 2 + 2 * 3,
    ),
    # Transformers: sound and words
    "Whisper encoder": Network(
        lambda: (
            transformers.WhisperModel(
                transformers.WhisperConfig(
                    d_model=16,
                    encoder_layers=2,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=32,
                    decoder_ffn_dim=32,
                    num_mel_bins=8,
                    max_source_positions=16,
                    vocab_size=50,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    decoder_start_token_id=1,
                )
            ).encoder
        ),
        lambda size: {"input_features": noise(size, 8, 32)},
        2 * 2,
    ),
    "Wav2Vec 2": Network(
        of_transformers(
            "Wav2Vec2Model",
            **SMALL,
            conv_dim=(8, 8),
            conv_stride=(4, 4),
            conv_kernel=(8, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            layerdrop=0.0,
            mask_time_prob=0.0,
        ),
        lambda size: {"input_values": noise(size, 400)},
        2 * 2 + 1,
    ),
    "Mamba": Network(
        of_transformers("MambaModel", vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2), words, 2, 2
    ),
    "BERT": Network(of_transformers("BertModel", vocab_size=50, **SMALL), words, 2 * 2),
    "DeBERTa V2": Network(
        of_transformers(
            "DebertaV2Model",
            vocab_size=50,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            conv_kernel_size=3,
            conv_act="gelu",
            position_biased_input=False,
            **SMALL,
        ),
        words,
        2 * 2,
        1,  # the convolution beside the first layer, behind whose layer stands a function
    ),
    "GPT-2": Network(of_transformers("GPT2Model", vocab_size=50, n_embd=16, n_layer=2, n_head=2), words, 2 * 2),
    "Llama": Network(of_transformers("LlamaModel", vocab_size=50, num_key_value_heads=1, **SMALL), words, 2 * 2),
    "OPT": Network(
        of_transformers(
            "OPTModel",
            vocab_size=50,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=2,
            ffn_dim=32,
            num_attention_heads=2,
        ),
        words,
        2 * 2,
    ),
    "T5 encoder": Network(
        of_transformers("T5EncoderModel", vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        words,
        2 * 2,
    ),
    # Torch alone
    "TransformerEncoder": Network(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda size: {"src": noise(size, 7, 16)},
        2 * 2,
    ),
    "pre-activation ResNet": Network(PreActivationResNet, lambda size: {"pixels": noise(size, 3, 8, 8)}, 3),
}
