import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training_runs import fresh_state


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory):
    """The folder of a Stable Diffusion pipeline with random weights, of images of 16x16 pixels."""
    folder = tmp_path_factory.mktemp("pipeline")
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghij")]
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=8),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
    )
    pipeline.save_pretrained(folder / "saved")
    return folder / "saved"


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
    given = {"model": tiny_pipeline, "train_data_dir": images, **quick}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_the_attention_alone_is_trained_and_saved_and_changes_what_is_drawn(
    example, arguments, tiny_pipeline, tmp_path
):
    script = example("text_to_image")
    before = {path: path.read_bytes() for path in tiny_pipeline.rglob("*") if path.is_file()}
    drawn = {}
    for name, steps in (("none", "0"), ("some", "3")):
        assert script.main([*arguments, "--steps", steps, "--output_dir", str(tmp_path / name)]) == 0
        drawn[name] = np.asarray(Image.open(tmp_path / name / "sample.png"))
        saved = {path.name for path in (tmp_path / name / "attention").iterdir()}
        assert saved == {"config.json", "diffusion_pytorch_model.safetensors"}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    generator = torch.Generator().manual_seed(0)
    plain = np.asarray(pipeline("a b", num_inference_steps=2, generator=generator).images[0])
    # An attention that was not trained draws what the pipeline draws.
    assert np.array_equal(drawn["none"], plain)
    assert not np.array_equal(drawn["some"], plain)
    assert {path: path.read_bytes() for path in tiny_pipeline.rglob("*") if path.is_file()} == before


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
def test_the_loss(example, prediction):
    """Noise, or velocity sqrt(a) noise - sqrt(1 - a) x (arXiv 2202.00512)."""
    scheduler = DDPMScheduler(prediction_type=prediction)
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    timesteps, texts, seen = torch.tensor([10, 700]), torch.randn(2, 8, 12), {}

    def unet(noisy, timesteps, texts, return_dict):
        seen.update(noisy=noisy, texts=texts)
        return (0.5 * noisy,)

    loss = example("text_to_image").diffusion_loss(unet, scheduler, latents, texts, noise, timesteps)
    a = scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(seen["noisy"], noisy)
    assert seen["texts"] is texts
    torch.testing.assert_close(loss, (0.5 * noisy - target).square().mean())


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
