"""Trains shared attention, and nothing else, in the UNet of a Stable Diffusion pipeline, on images with captions.

    python examples/text_to_image.py      # Stable Diffusion 1.5, on lambdalabs/naruto-blip-captions
    python examples/text_to_image.py --model FOLDER_OR_ID --train_data_dir my_images      # captions in metadata.jsonl

The loss is that of diffusers' train_text_to_image.py. Latents and text embeddings are computed once and kept in memory.
What is saved is the attention alone; at the end it is loaded again, into a pipeline as it was, which draws a picture.
So far it has been run on a tiny random pipeline only (by its test), not on the real one.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from dia_diffusion import attach
from dia_diffusion.data.decoding import to_unit_range
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits
from dia_diffusion.errors import UsageError, first_line
from helpers import flags


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, options: argparse.Namespace) -> TensorDataset:
    """What the UNet learns from: the parameters of each image's latent distribution, and its embedded caption."""
    images, _ = load_dataset_splits(options.dataset_name, train_data_dir=options.train_data_dir)
    if options.caption_column not in images.column_names:
        columns = ", ".join(images.column_names)
        raise UsageError(f"there is no --caption_column '{options.caption_column}' in the data set, only: {columns}.")
    resolution = options.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    data, latents, texts = prepare_pixels(images, resolution, channels=3), [], []
    for number in tqdm(range(len(images)), desc="Encoding"):
        pixels = to_unit_range(data.fetch([number])["images"]).to(pipe.device)
        latents.append(pipe.vae.encode(pixels).latent_dist.parameters.cpu())
        tokens = pipe.tokenizer(
            images[number][options.caption_column],
            max_length=pipe.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        texts.append(pipe.text_encoder(tokens.input_ids.to(pipe.device))[0].cpu())
    return TensorDataset(torch.cat(latents), torch.cat(texts))


def diffusion_loss(
    unet: torch.nn.Module, scheduler: DDPMScheduler, latents: Tensor, texts: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error of what the scheduler's configuration says that the UNet predicts: noise or velocity."""
    predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, texts, return_dict=False)[0]
    if scheduler.config.prediction_type == "v_prediction":
        noise = scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(predicted.float(), noise.float())


def train(options: argparse.Namespace) -> list[float]:
    """Trains and saves the attention; returns the losses."""
    set_seed(options.seed)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(options.model, safety_checker=None).to(accelerator.device)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model '{options.model}' is no Stable Diffusion pipeline: {first_line(error)}.") from error
    scheduler, scale = DDPMScheduler.from_config(pipe.scheduler.config), pipe.vae.config.scaling_factor
    data = encode(pipe, options)
    # They have done their part.
    pipe.vae.to("cpu")
    pipe.text_encoder.to("cpu")

    pipe.unet.requires_grad_(False)
    dia = attach(pipe.unet)
    if options.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(dia.parameters(), lr=options.learning_rate)
    loader = DataLoader(data, min(options.batch_size, len(data)), shuffle=True, drop_last=True)
    unet, optimizer, loader = accelerator.prepare(pipe.unet.train(), optimizer, loader)
    losses, progress = [], tqdm(total=options.steps, disable=not accelerator.is_main_process)
    while len(losses) < options.steps:
        for parameters, texts in loader:
            latents = DiagonalGaussianDistribution(parameters).sample() * scale
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
            loss = diffusion_loss(unet, scheduler, latents, texts, torch.randn_like(latents), timesteps)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(dia.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
            if len(losses) == options.steps:
                break
    if accelerator.is_main_process:
        dia.save_pretrained(options.output_dir / "attention")
    return losses


def sample(options: argparse.Namespace) -> None:
    """The pipeline as it was, with the trained attention attached, draws a picture."""
    pipe = StableDiffusionPipeline.from_pretrained(options.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    attach(pipe.unet, pretrained=options.output_dir / "attention")
    generator = torch.Generator().manual_seed(options.seed)
    image = pipe(options.prompt, num_inference_steps=options.sampling_steps, generator=generator).images[0]
    image.save(options.output_dir / "sample.png")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="a folder or Hub id")
    parser.add_argument("--dataset_name", help="lambdalabs/naruto-blip-captions by default")
    parser.add_argument("--train_data_dir", help="a folder of images, with captions in metadata.jsonl")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--resolution", type=flags.count, help="by default that of the pipeline")
    parser.add_argument("--steps", type=flags.whole, default=1000)
    parser.add_argument("--batch_size", type=flags.count, default=4)
    parser.add_argument("--learning_rate", type=flags.natural, default=1e-4)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory for more time")
    parser.add_argument("--prompt", default="a portrait of a ninja cat")
    parser.add_argument("--sampling_steps", type=flags.count, default=30)
    parser.add_argument("--seed", type=flags.seed, default=0)
    parser.add_argument("--output_dir", type=flags.folder, default=Path("runs/text_to_image"))
    options = parser.parse_args(arguments)
    if options.dataset_name is None and options.train_data_dir is None:
        options.dataset_name = "lambdalabs/naruto-blip-captions"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        train(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sample(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
