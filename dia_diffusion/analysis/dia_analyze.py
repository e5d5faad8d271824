"""What `dia analyze` does: reads the attention maps of a model for real images, and reports on them."""

import argparse
from collections.abc import Callable

from diffusers import DiffusionPipeline
from torch import Tensor

from ..data.pixels import describe_images
from ..data.preparation import prepare_pixels
from ..data.sources import load_dataset_splits
from ..errors import UsageError
from ..latents.autoencoder import downsampling_factor, encode_posterior
from ..latents.scaling import scale_latents
from ..process.distributed import find_device, make_state
from ..sampling.loading import load_pipeline
from ..sampling.schedulers import make_noising_scheduler
from .analysis_report import format_analysis, report
from .maps import collect_classifier_maps, collect_maps, load_classifier, place_branches, read_processor


def analyze(options: argparse.Namespace) -> None:
    """Runs `dia analyze` with its parsed options.

    Raises:
        UsageError: for a model without attention maps, or options that cannot work.
    """
    if options.attention is not None:
        analyze_classifier(options)
        return
    pipeline = load_pipeline(options.model, device=find_device(options.device, make_state()))
    unet = pipeline.unet
    if getattr(unet, "dia", None) is None:
        raise UsageError(f"'{options.model}' has no attention maps: it was trained without DIA (dia_attention).")
    if not isinstance(unet.config.sample_size, int):
        raise UsageError(f"only models of square images can be analyzed, not of {unet.config.sample_size}.")
    names = getattr(pipeline, "class_names", None)
    with_labels = unet.config.num_class_embeds is not None
    train, held_out = load_dataset_splits(options.dataset, with_labels=with_labels)
    resolution, channels, encode = _find_images(pipeline)
    pixels = prepare_pixels(
        train if held_out is None else held_out,
        resolution,
        channels,
        with_labels=with_labels,
        on_bad_image="skip",
        trained=(names, range(len(names))) if with_labels and names else None,
    )
    if len(pixels) == 0:
        raise UsageError(f"no image of '{options.dataset}' can be used: {'; '.join(pixels.left_out)}.")
    if with_labels and pixels.labels.max() >= unet.config.num_class_embeds - 1:
        raise UsageError(
            f"'{options.dataset}' has {pixels.num_classes} classes; the model knows no more than "
            f"{unet.config.num_class_embeds - 1}."
        )
    print(f"Images: {describe_images(pixels, options.dataset)} Device: {pipeline.device}.")
    scheduler = make_noising_scheduler(pipeline.scheduler.config)
    maps, timesteps = collect_maps(
        unet, scheduler, pixels, options.num_images, options.num_timesteps, options.batch_size, encode
    )
    print(format_analysis(report(maps, timesteps, options.output_dir)))
    print(f"The report is {options.output_dir}/report.html; all figures and the pictures lie beside it.")


def _find_images(pipeline: DiffusionPipeline) -> tuple[int, int, Callable[[Tensor], Tensor] | None]:
    """Resolution and channels of the images that a model is for, and how its VAE encodes them, if it has one."""
    config, vae = pipeline.unet.config, getattr(pipeline, "vae", None)
    if vae is None:
        return config.sample_size, config.in_channels, None

    def encode(images: Tensor) -> Tensor:
        means = encode_posterior(vae, images.to(vae.device))[:, 0]
        return scale_latents(means, vae.config).cpu()

    return config.sample_size * downsampling_factor(vae), vae.config.in_channels, encode


def analyze_classifier(options: argparse.Namespace) -> None:
    """The same for an image classifier of transformers with its attention, which has no timesteps."""
    device = find_device(options.device, make_state())
    model = load_classifier(options.model, options.attention, device)
    size, mean, std = read_processor(options.model, model.config)
    train, held_out = load_dataset_splits(options.dataset)
    images = train if held_out is None else held_out
    pixels = prepare_pixels(images, size, model.config.num_channels, on_bad_image="skip")
    if len(pixels) == 0:
        raise UsageError(f"no image of '{options.dataset}' can be used: {'; '.join(pixels.left_out)}.")
    print(f"Images: {describe_images(pixels, options.dataset)} Device: {device}.")
    maps = collect_classifier_maps(model, pixels, mean, std, options.num_images, options.batch_size)
    print(format_analysis(report(maps, [], options.output_dir, place_branches(model))))
    print(f"The report is {options.output_dir}/report.html; all figures and the pictures lie beside it.")
