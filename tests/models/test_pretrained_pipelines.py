"""Attention attached to the models of diffusers' pipelines, end to end."""

import copy

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload_with_hook
from backbones import CONDITION, SDXL, TRANSFORMER, noise, strong
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.models.embeddings import ImageProjection
from networks import NETWORKS

from dia_diffusion import attach, detach
from tiny_unets import open_gates

EMBEDS = {"prompt_embeds": noise(1, 5, 12), "negative_prompt_embeds": noise(1, 5, 12) / 2, "guidance_scale": 3.0}
POOLED = {"pooled_prompt_embeds": noise(1, 10), "negative_pooled_prompt_embeds": noise(1, 10) / 2}


def attach_any(model, **arguments):
    """Attach by the table of families, or by what a forward pass shows where the model is of none."""
    if isinstance(model, SD3Transformer2DModel) and "pretrained" not in arguments:
        arguments["inputs"] = NETWORKS["SD3"].inputs(2)
        arguments["inputs"] = {k: v.to(model.dtype) for k, v in arguments["inputs"].items()}
    return attach(model, **arguments)


def vae(**arguments):
    return AutoencoderKL(
        **arguments,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def parts(**unet):
    """What all Stable Diffusion pipelines have; prompts are given as embeddings."""
    return {
        "unet": UNet2DConditionModel(**CONDITION | unet),
        "vae": vae(),
        "scheduler": DDIMScheduler(),
        "text_encoder": None,
        "tokenizer": None,
    }


SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion():
    return StableDiffusionPipeline(**parts(), **SAFETY), EMBEDS


def stable_diffusion_xl():
    more = {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    return StableDiffusionXLPipeline(**parts(**SDXL), **more), EMBEDS | POOLED


def controlnet():
    models = parts()
    control = ControlNetModel.from_unet(models["unet"], conditioning_embedding_out_channels=(4, 8))
    pipeline = StableDiffusionControlNetPipeline(**models, controlnet=strong(control), **SAFETY)
    return pipeline, EMBEDS | {"image": noise(1, 3, 16, 16).sigmoid()}


def ip_adapter():
    pipeline, inputs = stable_diffusion()
    weights, widths = {}, {"down_blocks.0": 8, "mid_block": 16, "up_blocks.1": 8}
    for number, name in enumerate(name for name in pipeline.unet.attn_processors if "attn2" in name):
        width = next(width for level, width in widths.items() if name.startswith(level))
        for key, value in IPAdapterAttnProcessor(width, 12).state_dict().items():
            weights[f"{2 * number + 1}.{key.replace('.0.', '.')}"] = value
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=12, num_image_text_embeds=4).state_dict()
    projection = {key.replace("image_embeds", "proj"): value for key, value in projection.items()}
    pipeline.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    return pipeline, inputs | {"ip_adapter_image_embeds": [noise(2, 1, 6)]}


def t2i_adapter():
    adapter = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    pipeline = StableDiffusionAdapterPipeline(**parts(), adapter=adapter, **SAFETY)
    return pipeline, EMBEDS | {"image": noise(1, 3, 16, 16).sigmoid(), "height": 16, "width": 16}


def dit():
    transformer = strong(DiTTransformer2DModel(**TRANSFORMER, num_embeds_ada_norm=1000, out_channels=8))
    return DiTPipeline(transformer, vae(), DDIMScheduler()), {"class_labels": [3, 7], "guidance_scale": 3.0}


def stable_diffusion_3():
    transformer = NETWORKS["SD3"].make()
    absent = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    decoder = vae(shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False)
    pipeline = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), decoder, **absent)
    pooled = {"pooled_prompt_embeds": noise(1, 6), "negative_pooled_prompt_embeds": noise(1, 6) / 2}
    return pipeline, EMBEDS | pooled | {"height": 16, "width": 16}


PIPELINES = {
    "Stable Diffusion": (stable_diffusion, ("unet",)),
    "Stable Diffusion XL": (stable_diffusion_xl, ("unet",)),
    "ControlNet": (controlnet, ("unet", "controlnet")),
    "IP-Adapter": (ip_adapter, ("unet",)),
    "T2I-Adapter": (t2i_adapter, ("unet",)),
    "DiT": (dit, ("transformer",)),
    "Stable Diffusion 3": (stable_diffusion_3, ("transformer",)),
}


@pytest.fixture(params=PIPELINES)
def case(request):
    make, names = PIPELINES[request.param]
    return *make(), names


def images(pipeline, inputs):
    pipeline.set_progress_bar_config(disable=True)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
    generator = torch.Generator().manual_seed(0)
    return pipeline(**inputs, num_inference_steps=2, generator=generator, output_type="np").images


def test_images_are_the_same_before_at_the_start_and_after(case, tmp_path):
    pipeline, inputs, names = case
    expected = images(pipeline, inputs)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.01
    for name in names:
        model = getattr(pipeline, name)
        attach_any(model, hidden_size=8)
        assert np.array_equal(images(pipeline, inputs), expected)
        open_gates(model)
        gated = images(pipeline, inputs)
        assert not np.allclose(gated, expected, atol=1e-4)
        # What was trained is saved alone, and attached to the model that it was trained on.
        model.dia.save_pretrained(tmp_path / name)
        detach(model)
        assert np.array_equal(images(pipeline, inputs), expected)
        attach(model, pretrained=tmp_path / name)
        assert np.array_equal(images(pipeline, inputs), gated)
        detach(model)


def test_what_is_beside_it_counts(case):
    """The other adapters are really there: without them the images are others."""
    pipeline, inputs, names = case
    for name in names:
        open_gates_of(getattr(pipeline, name))
    expected = images(pipeline, inputs)
    changes = {
        "image": lambda value: 1 - value,
        "ip_adapter_image_embeds": lambda value: [value[0] * -2],
        "pooled_prompt_embeds": lambda value: -value,
        "prompt_embeds": lambda value: -value,
        "class_labels": lambda value: value[::-1],
    }
    for name in inputs.keys() & changes.keys():
        assert not np.allclose(images(pipeline, inputs | {name: changes[name](inputs[name])}), expected, atol=1e-5), (
            name
        )


def open_gates_of(model):
    attach_any(model, hidden_size=8)
    open_gates(model)


def test_two_attentions_in_one_pipeline_work_together():
    pipeline, inputs = controlnet()
    expected = images(pipeline, inputs)
    for model in (pipeline.unet, pipeline.controlnet):
        attach(model, hidden_size=8)
    assert np.array_equal(images(pipeline, inputs), expected)
    different = [expected]
    for model in (pipeline.controlnet, pipeline.unet):
        open_gates(model)
        different.append(images(pipeline, inputs))
    assert not np.allclose(different[0], different[1], atol=1e-5)
    assert not np.allclose(different[1], different[2], atol=1e-5)


@pytest.mark.parametrize("make", [stable_diffusion, dit, stable_diffusion_3], ids=["Stable Diffusion", "DiT", "SD3"])
def test_lora_beside_it_in_both_orders(make):
    """Adapters wrap layers of the attention, in DiT also those whose outputs are the branches, and convolutions."""
    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_out.0", "conv2", "net.2"], init_lora_weights=False, lora_alpha=8
    )
    plain, inputs = make()
    name = "unet" if make is stable_diffusion else "transformer"
    first, second = copy.deepcopy(plain), copy.deepcopy(plain)
    without = images(plain, inputs)

    def add_adapter(pipeline):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(config, getattr(pipeline, name))

    def add_attention(pipeline):
        torch.manual_seed(2)
        open_gates_of(getattr(pipeline, name))

    add_attention(first)
    with_attention = images(first, inputs)
    add_adapter(first)
    add_adapter(second)
    with_adapter = images(second, inputs)
    add_attention(second)
    both = images(first, inputs)
    assert np.array_equal(images(second, inputs), both)
    for other in (without, with_attention, with_adapter):
        assert not np.allclose(both, other, atol=1e-4)
    # Each is taken off without the other.
    for module in getattr(first, name).modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.enable_adapters(False)
    np.testing.assert_allclose(images(first, inputs), with_attention, atol=1e-5)
    detach(getattr(second, name))
    assert np.array_equal(images(second, inputs), with_adapter)
    adapters = {key for key, value in getattr(first, name).named_parameters() if "lora" in key}
    assert adapters
    assert not any(key.startswith("dia.") for key in adapters)


def test_lora_comes_off_again_and_the_gates_stay():
    pipeline, inputs = dit()
    open_gates_of(pipeline.transformer)
    expected = images(pipeline, inputs)
    config = peft.LoraConfig(r=2, target_modules=["to_out.0", "net.2"], init_lora_weights=False)
    adapted = peft.get_peft_model(pipeline.transformer, config)
    assert not np.allclose(images(pipeline, inputs), expected, atol=1e-4)
    adapted.unload()
    assert np.array_equal(images(pipeline, inputs), expected)


def test_a_pipeline_in_half_precision_is_the_same_at_the_start(case):
    pipeline, inputs, names = case
    pipeline.to(torch.bfloat16)

    def half(value):
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            return [half(part) for part in value]
        return value.bfloat16() if isinstance(value, torch.Tensor) else value

    inputs = {name: half(value) for name, value in inputs.items()}
    expected = images(pipeline, inputs)
    for name in names:
        attach_any(getattr(pipeline, name), hidden_size=8)
    assert np.array_equal(images(pipeline, inputs), expected)
    for name in names:
        open_gates(getattr(pipeline, name))
    in_full = images(pipeline, inputs)
    assert np.isfinite(in_full).all()
    # The attention in half precision, too.
    pipeline.to(torch.bfloat16)
    assert all(getattr(pipeline, name).dia.dtype == torch.bfloat16 for name in names)
    np.testing.assert_allclose(images(pipeline, inputs), in_full, atol=0.1)


def test_group_offloading_moves_the_attention_too(case):
    """Both places are the CPU here: what is tested are the hooks that move weights, which wrap the same modules."""
    pipeline, inputs, names = case
    if not all(getattr(pipeline, name)._supports_group_offloading for name in names):
        pytest.skip("diffusers does not offload this model by groups")
    for name in names:
        open_gates_of(getattr(pipeline, name))
    expected = images(pipeline, inputs)
    for name in names:
        getattr(pipeline, name).enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
        assert any(hasattr(module, "_diffusers_hook") for module in getattr(pipeline, name).dia.modules())
    assert np.array_equal(images(pipeline, inputs), expected)


BESIDE = {"SD": (stable_diffusion, "unet"), "SD3": (stable_diffusion_3, "transformer")}


@pytest.mark.parametrize("name", BESIDE)
def test_weights_that_are_stored_in_eight_bits(name):
    """Layers compute in float32: with gates at 1 the images are those of the model without attention."""
    make, part = BESIDE[name]
    pipeline, inputs = make()
    model = getattr(pipeline, part)
    attach_any(model, hidden_size=8)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in model.dia.parameters())
    with_attention = images(pipeline, inputs)
    for decoder in model.dia.decoders.values():
        decoder.bias.data = (decoder.bias.data.float() + 1).to(decoder.bias.dtype)
    assert not np.allclose(images(pipeline, inputs), with_attention, atol=1e-4)
    detach(model)
    assert np.array_equal(images(pipeline, inputs), with_attention)


@pytest.mark.parametrize("order", ["attention first", "offloading first"])
@pytest.mark.parametrize("name", BESIDE)
def test_offloading_of_whole_models(name, order):
    """What `enable_model_cpu_offload` does, with the CPU as both places."""
    make, part = BESIDE[name]
    pipeline, inputs = make()
    model = getattr(pipeline, part)
    expected = images(pipeline, inputs)
    if order == "attention first":
        attach_any(model, hidden_size=8)
    _, hook = cpu_offload_with_hook(model, execution_device="cpu")
    if order == "offloading first":
        attach_any(model, hidden_size=8)
    assert np.array_equal(images(pipeline, inputs), expected)
    open_gates(model)
    gated = images(pipeline, inputs)
    assert not np.allclose(gated, expected, atol=1e-4)
    hook.remove()
    assert np.array_equal(images(pipeline, inputs), gated)


@pytest.mark.parametrize("name", BESIDE)
def test_eight_bit_integers_of_torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    make, part = BESIDE[name]
    pipeline, inputs = make()
    quantization.quantize_(getattr(pipeline, part), quantization.Int8WeightOnlyConfig())
    expected = images(pipeline, inputs)
    attach_any(getattr(pipeline, part), hidden_size=8)
    assert np.array_equal(images(pipeline, inputs), expected)
