"""Train shared attention, and nothing else, in the denoiser of a text-to-image pipeline, on images with captions.

    python examples/text_to_image.py      # Stable Diffusion 1.5, on lambdalabs/naruto-blip-captions
    python examples/text_to_image.py --model stabilityai/stable-diffusion-3-medium-diffusers --batch_size 1
    python examples/text_to_image.py --model FOLDER_OR_ID --train_data_dir my_images      # captions in metadata.jsonl

Stable Diffusion has the loss of diffusers' train_text_to_image.py; Stable Diffusion 3 and Flux have the flow matching
loss of its train_dreambooth scripts. Latents and text embeddings are computed once and kept in memory. The attention
alone is saved; at the end it is loaded again, into a pipeline as it was, which draws a picture. So far it has been run
on tiny random pipelines only (by its test), not on the real ones.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from dia_diffusion import attach
from dia_diffusion.data.decoding import to_unit_range
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits
from dia_diffusion.errors import UsageError, first_line
from helpers import flags


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """Return the model that a pipeline calls at each step."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def resolution_of(pipe: DiffusionPipeline, options: argparse.Namespace) -> int:
    """Return the side of the images: as asked for, or as the pipeline was made for."""
    latents = getattr(denoiser_of(pipe).config, "sample_size", None) or pipe.default_sample_size
    return options.resolution or latents * pipe.vae_scale_factor


@torch.no_grad()
def encode(pipe: DiffusionPipeline, options: argparse.Namespace) -> TensorDataset:
    """Return the training data: the parameters of each image's latent distribution, and its embedded caption, which is
    one tensor for Stable Diffusion and two, with the pooled embedding, for Stable Diffusion 3 and Flux."""
    images, _ = load_dataset_splits(options.dataset_name, train_data_dir=options.train_data_dir)
    if options.caption_column not in images.column_names:
        columns = ", ".join(images.column_names)
        raise UsageError(f"there is no --caption_column '{options.caption_column}' in the data set, only: {columns}.")
    data, rows = prepare_pixels(images, resolution_of(pipe, options), channels=3), []
    for number in tqdm(range(len(images)), desc="Encoding"):
        pixels = to_unit_range(data.fetch([number])["images"]).to(pipe.device)
        parameters = pipe.vae.encode(pixels).latent_dist.parameters
        caption, free = images[number][options.caption_column], {"do_classifier_free_guidance": False}
        if isinstance(pipe, StableDiffusion3Pipeline):
            text, _, pooled, _ = pipe.encode_prompt(caption, None, None, device=pipe.device, **free)
            texts = [text, pooled]
        elif isinstance(pipe, FluxPipeline):
            texts = list(pipe.encode_prompt(caption, None, device=pipe.device)[:2])
        else:
            texts = [pipe.encode_prompt(caption, pipe.device, 1, **free)[0]]
        rows.append([tensor.cpu() for tensor in (parameters, *texts)])
    return TensorDataset(*(torch.cat(column) for column in zip(*rows, strict=True)))


def inputs_of(pipe: DiffusionPipeline, noisy: Tensor, timesteps: Tensor, texts: Sequence[Tensor]) -> dict[str, Any]:
    """Return the arguments of the denoiser's forward, as the pipeline gives them."""
    if not isinstance(pipe, FluxPipeline):
        name = "sample" if hasattr(pipe, "unet") else "hidden_states"
        inputs = {name: noisy, "timestep": timesteps, "encoder_hidden_states": texts[0]}
        return inputs | ({} if len(texts) == 1 else {"pooled_projections": texts[1]})
    batch, channels, height, width = noisy.shape
    guided = pipe.transformer.config.guidance_embeds
    return {
        "hidden_states": pipe._pack_latents(noisy, batch, channels, height, width),
        "timestep": timesteps / 1000,
        "encoder_hidden_states": texts[0],
        "pooled_projections": texts[1],
        "txt_ids": torch.zeros(texts[0].shape[1], 3, device=noisy.device),
        "img_ids": pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
        "guidance": torch.full((batch,), 3.5, device=noisy.device) if guided else None,
    }


def diffusion_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDPMScheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Return the mean squared error of the noise, or of the velocity where the scheduler's configuration says so."""
    predicted = predict(scheduler.add_noise(latents, noise, timesteps), timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        noise = scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(predicted.float(), noise.float())


def flow_matching_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: FlowMatchEulerDiscreteScheduler,
    latents: Tensor,
    noise: Tensor,
    indices: Tensor,
) -> Tensor:
    """Return the mean squared error of the velocity `noise - latents` at `(1 - sigma) latents + sigma noise` (Lipman et
    al., arXiv 2210.02747; Esser et al., arXiv 2403.03206, eq. 13), for noise levels by their index in the scheduler."""
    timesteps, sigmas = (values.to(latents.device)[indices] for values in (scheduler.timesteps, scheduler.sigmas))
    noisy = torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1))
    return F.mse_loss(predict(noisy, timesteps).float(), (noise - latents).float())


def batch_loss(
    pipe: DiffusionPipeline, model: nn.Module, scheduler: SchedulerMixin, latents: Tensor, texts: Sequence[Tensor]
) -> Tensor:
    """Return the loss of a batch of latents at random noise levels."""
    steps, noise = scheduler.config.num_train_timesteps, torch.randn_like(latents)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        output = model(**inputs_of(pipe, noisy, timesteps, texts), return_dict=False)[0]
        height, width = (side * pipe.vae_scale_factor for side in noisy.shape[2:])
        packed = isinstance(pipe, FluxPipeline)
        return pipe._unpack_latents(output, height, width, pipe.vae_scale_factor) if packed else output

    if isinstance(scheduler, DDPMScheduler):
        timesteps = torch.randint(steps, (len(latents),), device=latents.device)
        return diffusion_loss(predict, scheduler, latents, noise, timesteps)
    # Uniform for Flux, logit-normal for Stable Diffusion 3, as the scripts have it.
    scheme = "none" if isinstance(pipe, FluxPipeline) else "logit_normal"
    shares = compute_density_for_timestep_sampling(scheme, len(latents), logit_mean=0.0, logit_std=1.0)
    return flow_matching_loss(predict, scheduler, latents, noise, (shares * steps).long().to(latents.device))


def load(options: argparse.Namespace) -> DiffusionPipeline:
    try:
        pipe = DiffusionPipeline.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model '{options.model}' cannot be loaded as a pipeline: {first_line(error)}.") from error
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusion3Pipeline | FluxPipeline):
        known = "StableDiffusionPipeline, StableDiffusion3Pipeline or FluxPipeline"
        raise UsageError(f"--model '{options.model}' is a {type(pipe).__name__}, and a {known} is needed.")
    pipe.safety_checker = None
    return pipe


def train(options: argparse.Namespace) -> list[float]:
    """Train and save the attention; return the losses."""
    set_seed(options.seed)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    pipe = load(options).to(accelerator.device)
    flow = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    scheduler = (FlowMatchEulerDiscreteScheduler if flow else DDPMScheduler).from_config(pipe.scheduler.config)
    data = encode(pipe, options)
    shift, scale = getattr(pipe.vae.config, "shift_factor", None) or 0.0, pipe.vae.config.scaling_factor
    # The encoders are no longer needed.
    for name, part in pipe.components.items():
        if name == "vae" or name.startswith("text_encoder"):
            part is None or part.to("cpu")

    model = denoiser_of(pipe).requires_grad_(False)
    parameters, *texts = (tensor.to(accelerator.device) for tensor in data[:1])
    example = inputs_of(pipe, parameters.chunk(2, dim=1)[0], torch.zeros(1, device=accelerator.device), texts)
    # The table knows Stable Diffusion's UNet; for others one forward pass shows the branches.
    dia = attach(model) if hasattr(pipe, "unet") else attach(model, inputs=example)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(dia.parameters(), lr=options.learning_rate)
    loader = DataLoader(data, min(options.batch_size, len(data)), shuffle=True, drop_last=True)
    prepared, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    losses, progress = [], tqdm(total=options.steps, disable=not accelerator.is_main_process)
    while len(losses) < options.steps:
        for parameters, *texts in loader:
            latents = (DiagonalGaussianDistribution(parameters).sample() - shift) * scale
            loss = batch_loss(pipe, prepared, scheduler, latents, texts)
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
    """Let the pipeline as it was, with the trained attention attached, draw a picture."""
    pipe = load(options).to("cuda" if torch.cuda.is_available() else "cpu")
    attach(denoiser_of(pipe), pretrained=options.output_dir / "attention")
    generator, side = torch.Generator().manual_seed(options.seed), resolution_of(pipe, options)
    size = {"height": side, "width": side, "num_inference_steps": options.sampling_steps}
    image = pipe(options.prompt, **size, generator=generator).images[0]
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
