import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from training_runs import fresh_state


def strong(model):
    """Layers that start at zero would hide what is before them."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.std() < 0.05:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


WORDS = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghij")]
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def tokenizer():
    return CLIPTokenizer({word: number for number, word in enumerate(WORDS)}, [], model_max_length=8)


def text_encoder(kind=CLIPTextModel):
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(
        CLIPTextConfig(
            vocab_size=len(WORDS), max_position_embeddings=8, bos_token_id=0, eos_token_id=1, projection_dim=3, **sizes
        )
    )


def t5(width):
    sizes = {"d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=width, **sizes))


def vae(**more):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, **blocks, **more)


def stable_diffusion():
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
    )


SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
FLOW_VAE = {"shift_factor": 0.1, "scaling_factor": 1.5}


def stable_diffusion_3():
    return StableDiffusion3Pipeline(
        transformer=strong(
            SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                joint_attention_dim=32,
                caption_projection_dim=16,
                pooled_projection_dim=6,
                pos_embed_max_size=8,
                **SMALL,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(**FLOW_VAE),
        text_encoder=text_encoder(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=tokenizer(),
    )


def flux():
    return FluxPipeline(
        transformer=strong(
            FluxTransformer2DModel(
                in_channels=16,
                num_single_layers=2,
                joint_attention_dim=12,
                pooled_projection_dim=12,
                axes_dims_rope=(4, 2, 2),
                guidance_embeds=True,
                **SMALL,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(**FLOW_VAE),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(12),
        tokenizer_2=tokenizer(),
    )


PIPELINES = {"SD": stable_diffusion, "SD3": stable_diffusion_3, "Flux": flux}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of pipelines with random weights, for images of 16x16 pixels."""
    folders = {}
    for name, make in PIPELINES.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("pipeline") / name
        make().save_pretrained(folders[name])
    return folders


@pytest.fixture
def tiny_pipeline(saved):
    return saved["SD"]


@pytest.fixture
def arguments(tiny_pipeline, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "abcde"[number] * 2}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    quick = {"steps": 3, "batch_size": 2, "sampling_steps": 2, "learning_rate": 0.01, "prompt": "a b"}
    given = {"model": tiny_pipeline, "train_data_dir": images, "resolution": 16, **quick}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_attention_alone_is_trained_and_saved_and_changes_what_is_drawn(example, arguments, saved, name, tmp_path):
    script, folder = example("text_to_image"), saved[name]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    drawn, arguments = {}, [*arguments, "--model", str(folder)]
    for kind, steps in (("none", "0"), ("some", "3")):
        fresh_state()
        assert script.main([*arguments, "--steps", steps, "--output_dir", str(tmp_path / kind)]) == 0
        drawn[kind] = np.asarray(Image.open(tmp_path / kind / "sample.png"))
        files = {path.name for path in (tmp_path / kind / "attention").iterdir()}
        assert files == {"config.json", "diffusion_pytorch_model.safetensors"}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.safety_checker = None
    generator = torch.Generator().manual_seed(0)
    plain = pipeline("a b", num_inference_steps=2, generator=generator, height=16, width=16).images[0]
    # An attention that was not trained draws what the pipeline draws.
    assert np.array_equal(drawn["none"], np.asarray(plain))
    assert not np.array_equal(drawn["some"], np.asarray(plain))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_gradient_checkpointing_gives_the_same_attention_and_bf16_keeps_it_in_float32(example, arguments, tmp_path):
    weights = {}
    for name, extra in {
        "plain": [],
        "checkpointed": ["--gradient_checkpointing"],
        "bf16": ["--mixed_precision", "bf16"],
    }.items():
        fresh_state()
        assert example("text_to_image").main([*arguments, *extra, "--output_dir", str(tmp_path / name)]) == 0
        weights[name] = load_file(tmp_path / name / "attention" / "diffusion_pytorch_model.safetensors")
    decoder = "decoders.8.weight"
    assert weights["plain"][decoder].any()
    for name, value in weights["plain"].items():
        torch.testing.assert_close(weights["checkpointed"][name], value)
        assert weights["bf16"][name].dtype == torch.float32
    fresh_state()
    assert not torch.equal(weights["bf16"][decoder], weights["plain"][decoder])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_of_stable_diffusion(example, prediction):
    """Noise, or velocity sqrt(a) noise - sqrt(1 - a) x (arXiv 2202.00512)."""
    scheduler = DDPMScheduler(prediction_type=prediction)
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    timesteps, seen = torch.tensor([10, 700]), {}

    def predict(noisy, timesteps):
        seen.update(noisy=noisy)
        return 0.5 * noisy

    loss = example("text_to_image").diffusion_loss(predict, scheduler, latents, noise, timesteps)
    a = scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(seen["noisy"], noisy)
    torch.testing.assert_close(loss, (0.5 * noisy - target).square().mean())


def test_the_loss_of_flow_matching(example):
    """(1 - s) x + s noise, and the velocity noise - x, at s = 3 t / (1 + 2 t) for a shift of 3 (arXiv 2403.03206)."""
    scheduler, seen = FlowMatchEulerDiscreteScheduler(shift=3.0), {}
    latents, noise = torch.randn(2, 2, 4, 8, 8)

    def predict(noisy, timesteps):
        seen.update(noisy=noisy, timesteps=timesteps)
        return 0.5 * noisy

    loss = example("text_to_image").flow_matching_loss(predict, scheduler, latents, noise, torch.tensor([0, 750]))
    t = torch.tensor([1.0, 0.25])
    s = (3 * t / (1 + 2 * t))[:, None, None, None]
    noisy = (1 - s) * latents + s * noise
    torch.testing.assert_close(seen["noisy"], noisy, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(seen["timesteps"], 1000 * s.flatten(), atol=1.0, rtol=1e-3)
    torch.testing.assert_close(loss, (0.5 * noisy - (noise - latents)).square().mean(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_the_transformer_is_called_as_its_pipeline_calls_it(example, saved, name, arguments):
    script = example("text_to_image")
    pipe = DiffusionPipeline.from_pretrained(saved[name])
    options = script.parse_arguments([*arguments, "--model", str(saved[name])])
    _, *texts = (tensor[:1] for tensor in script.encode(pipe, options).tensors)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    noisy = torch.randn(1, 4, 8, 8)
    given = noisy if name == "SD3" else pipe._pack_latents(noisy, 1, 4, 8, 8)
    with torch.no_grad():
        pipe(
            "aa",
            num_inference_steps=1,
            guidance_scale=1.0 if name == "SD3" else 3.5,
            height=16,
            width=16,
            latents=given,
        )
        timesteps = calls[0]["timestep"] * (1 if name == "SD3" else 1000)
        ours = script.inputs_of(pipe, noisy, timesteps, texts)
    for key, value in ours.items():
        torch.testing.assert_close(value, calls[0][key], msg=key)


def test_what_is_cached_is_what_the_pipeline_computes(example, tiny_pipeline, arguments):
    script = example("text_to_image")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    options = script.parse_arguments(arguments)
    parameters, texts = script.encode(pipeline, options).tensors
    assert parameters.shape == (5, 8, 8, 8)
    expected, _ = pipeline.encode_prompt(["aa", "bb", "cc", "dd", "ee"], "cpu", 1, False)
    torch.testing.assert_close(texts, expected)
    image = Image.open(f"{options.train_data_dir}/3.png").crop((2, 0, 18, 16))
    with torch.no_grad():
        mean = pipeline.vae.encode(pipeline.image_processor.preprocess(image)).latent_dist.mean
    torch.testing.assert_close(parameters[3, :4], mean[0], atol=1e-4, rtol=1e-4)


def test_a_column_that_is_not_there_is_named(example, arguments, tmp_path, capsys):
    assert example("text_to_image").main([*arguments, "--caption_column", "title"]) == 2
    assert "no --caption_column 'title' in the data set, only: image, text" in capsys.readouterr().err
