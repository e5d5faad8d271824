"""What `dia sample` does: images as PNG files, and a picture of them all."""

import argparse

import torch
from PIL import Image

from ..data import image_grid
from ..distributed import find_device, make_state
from .loading import load_pipeline
from .numbered import check_sampling, sample_images


def sample(options: argparse.Namespace) -> None:
    """Runs `dia sample` with its parsed options.

    Raises:
        UsageError: for a pipeline that cannot be loaded, or cannot do what was asked for.
    """
    pipeline = load_pipeline(options.model, options.scheduler, find_device(options.device, make_state()))
    check_sampling(pipeline, options.steps)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    shown = []
    batches = sample_images(
        pipeline,
        options.num_images,
        options.steps,
        options.seed,
        options.batch_size,
        options.class_label,
        options.guidance_scale,
    )
    number = 0
    for images in batches:
        for image in images:
            pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
            Image.fromarray(pixels).save(options.output_dir / f"{number:05d}.png")
            number += 1
        shown.append(images[: max(0, 100 - sum(map(len, shown)))])
    image_grid(torch.cat(shown)).save(options.output_dir / "grid.png")
    print(f"{number} images and grid.png are in {options.output_dir}")
