"""What `dia analyze` does: reads the attention maps of a model for real images, and reports on them."""

import argparse

from ..data import load_images, prepare_pixels
from ..distributed import find_device, make_state
from ..errors import UsageError
from ..sampling import load_pipeline, make_scheduler
from .maps import collect_maps
from .report import format_analysis, report


def analyze(options: argparse.Namespace) -> None:
    """Runs `dia analyze` with its parsed options.

    Raises:
        UsageError: for a model without attention maps, or options that cannot work.
    """
    for name in ("num_images", "num_timesteps", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be at least 1, but is {getattr(options, name)}.")
    pipeline = load_pipeline(options.model, device=find_device(options.device, make_state()))
    unet = pipeline.unet
    if getattr(unet, "dia", None) is None:
        raise UsageError(f"'{options.model}' has no attention maps: it was trained without DIA (dia_attention).")
    train, held_out = load_images(options.dataset)
    images = train if held_out is None else held_out
    if not isinstance(unet.config.sample_size, int):
        raise UsageError(f"only models of square images can be analyzed, not of {unet.config.sample_size}.")
    with_labels = unet.config.num_class_embeds is not None
    pixels = prepare_pixels(images, unet.config.sample_size, unet.config.in_channels, with_labels=with_labels)
    scheduler = make_scheduler("ddpm", pipeline.scheduler.config)
    maps, timesteps = collect_maps(
        unet, scheduler, pixels, options.num_images, options.num_timesteps, options.batch_size
    )
    print(format_analysis(report(maps, timesteps, options.output_dir)))
    print(f"All figures and four pictures are in {options.output_dir}")
