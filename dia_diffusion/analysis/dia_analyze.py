"""Run `dia analyze`: read the attention maps of a model for real images, and report on them."""

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..data.loading import load_pixels
from ..data.pixels import PixelDataset, describe_images
from ..data.preparation import prepare_pixels
from ..data.recorded import check_outside, choose_data
from ..data.sources import has_labels, load_dataset_splits
from ..errors import UsageError
from ..files import lock_folder
from ..latents.autoencoder import downsampling_factor, encode_posterior
from ..latents.scaling import scale_latents
from ..options.commands import AnalyzeOptions
from ..process.distributed import find_device, make_state
from ..process.output import print_main
from ..sampling.generation import check_scheduler
from ..sampling.loading import load_pipeline
from ..sampling.schedulers import make_noising_scheduler
from .analysis_report import format_analysis, report
from .maps import collect_classifier_maps, collect_maps, load_classifier, place_branches, read_processor


def analyze(options: AnalyzeOptions) -> dict[str, Any]:
    """Run `dia analyze` with its parsed options.

    Raises:
        UsageError: for a model without attention maps, or options that cannot work.
    """
    if not make_state().is_main_process:
        # One process does all.
        return {}
    with lock_folder(options.output_dir):
        return _analyze(options)


def _analyze(options: AnalyzeOptions) -> dict[str, Any]:
    if (options.output_dir / "report.html").is_file() and not (options.output_dir / "analysis.json").is_file():
        raise UsageError(f"'{options.output_dir}' holds another command's report: choose another --output_dir.")
    if options.attention is not None:
        return analyze_classifier(options)
    pipeline = load_pipeline(options.model, device=find_device(options.device, make_state()), variant=options.variant)
    unet = getattr(pipeline, "unet", None)
    if getattr(unet, "dia", None) is None:
        raise UsageError(f"'{options.model}' has no attention maps: it was trained without DIA (dia_attention).")
    check_scheduler(pipeline)
    if not isinstance(unet.config.sample_size, int):
        raise UsageError(f"only square images can be analyzed, not {unet.config.sample_size}: choose another model.")
    dataset, recorded = choose_data(options.model, options.dataset)
    check_outside(options.output_dir, dataset)
    resolution, channels, encode = _find_images(pipeline)
    with_labels = unet.config.num_class_embeds is not None
    if recorded is not None and recorded.class_conditional == with_labels:
        train, held_out = load_pixels(replace(recorded, resolution=resolution, channels=channels))
        pixels = train if held_out is None else held_out
    else:
        pixels = _prepare(dataset, resolution, channels, with_labels, getattr(pipeline, "class_names", None))
    if with_labels and pixels.labels.max() >= unet.config.num_class_embeds - 1:
        raise UsageError(
            f"'{dataset}' has {pixels.num_classes} classes; the model knows no more than "
            f"{unet.config.num_class_embeds - 1}."
        )
    facts = _describe(options.model, unet, unet.dia, pixels, dataset, pipeline.device)
    scheduler = make_noising_scheduler(pipeline.scheduler.config)
    maps, timesteps = collect_maps(
        unet, scheduler, pixels, options.num_images, options.num_timesteps, options.batch_size, encode
    )
    return _finish(report(maps, timesteps, options.output_dir, facts=facts), options.output_dir)


def analyze_classifier(options: AnalyzeOptions) -> dict[str, Any]:
    """Analyse an image classifier of transformers with its attention, which has no timesteps."""
    device = find_device(options.device, make_state())
    model = load_classifier(options.model, options.attention, device)
    size, mean, std = read_processor(options.model, model.config)
    dataset, _ = choose_data(options.model, options.dataset)
    check_outside(options.output_dir, dataset)
    pixels = _prepare(dataset, size, getattr(model.config, "num_channels", 3))
    facts = _describe(options.model, model, model.dia, pixels, dataset, device)
    maps = collect_classifier_maps(model, pixels, mean, std, options.num_images, options.batch_size)
    return _finish(report(maps, [], options.output_dir, place_branches(model), facts), options.output_dir)


def _prepare(
    dataset: str, resolution: int, channels: int, with_labels: bool = False, names: list[str] | None = None
) -> PixelDataset:
    """Load the held-out images of a data set, or its training images where none are held out."""
    train, held_out = load_dataset_splits(dataset, with_labels=with_labels)
    if with_labels and not has_labels(train if held_out is None else held_out):
        raise UsageError(
            f"the model is class-conditional, and the images of '{dataset}' have no labels: name images with labels, "
            "for example a folder with a subfolder for each class."
        )
    pixels = prepare_pixels(
        train if held_out is None else held_out,
        resolution,
        channels,
        with_labels=with_labels,
        on_bad_image="skip",
        trained=(names, range(len(names))) if with_labels and names else None,
    )
    if len(pixels) == 0:
        raise UsageError(f"no image of '{dataset}' can be used: {'; '.join(pixels.left_out)}.")
    return pixels


def _describe(
    name: str, model: nn.Module, attention: nn.Module, pixels: PixelDataset, dataset: str, device: torch.device
) -> dict[str, str]:
    """Print facts about the model and the images, and return them by title."""
    parameters, own = (sum(weights.numel() for weights in part.parameters()) for part in (model, attention))
    facts = {
        "Model": f"{name}: {type(model).__name__}, {parameters:,} parameters, {own:,} of them its attention.",
        "Images": describe_images(pixels, dataset),
    }
    for title, text in facts.items():
        print_main(f"{title}: {text}")
    return facts | {"Device": str(device), "Date": f"{date.today():%d %B %Y}"}


def _finish(figures: dict[str, Any], folder: Path) -> dict[str, Any]:
    print_main(format_analysis(figures))
    print_main(f"The report is {folder}/report.html; all figures and the pictures lie beside it.")
    return figures


def _find_images(pipeline: DiffusionPipeline) -> tuple[int, int, Callable[[Tensor], Tensor] | None]:
    """Return resolution and channels of the images of a model, and how its VAE encodes them, if it has one."""
    config, vae = pipeline.unet.config, getattr(pipeline, "vae", None)
    if vae is None:
        return config.sample_size, config.in_channels, None

    def encode(images: Tensor) -> Tensor:
        means = encode_posterior(vae, images.to(vae.device))[:, 0]
        return scale_latents(means, vae.config).cpu()

    return config.sample_size * downsampling_factor(vae), vae.config.in_channels, encode
