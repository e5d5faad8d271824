"""Many images from a pipeline, each a function of the seed and its number alone."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..errors import NotFiniteImagesError, UsageError, nearest
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..process.output import progress_bar


def image_generators(seed: int, numbers: Sequence[int], device: torch.device | str) -> list[torch.Generator]:
    """One generator for each image number. Images of one run never share a generator; other seeds give others."""
    if seed < 0:
        raise UsageError(f"seed must be at least 0, but is {seed}.")
    # torch seeds its generator on the CPU with 32 bits.
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator(device).manual_seed((start + number) % 2**32) for number in numbers]


def sample_batch(
    pipeline: DiffusionPipeline,
    numbers: Sequence[int],
    steps: int,
    seed: int = 0,
    class_label: int | Sequence[int] | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Generates the images of these numbers: image i is the same whatever else is in its batch.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline, or any unconditional pipeline of diffusers.
        numbers (`Sequence[int]`): Which images.
        steps, seed (`int`): Denoising steps, the seed.
        class_label (`int` or sequence of `int`, *optional*):
            The class of all images, or of each. By default a class-conditional pipeline takes its classes in turn.
        guidance_scale (`float`, *optional*, defaults to 1.0): Strength of guidance, by a guide or classifier-free.

    Returns:
        `Tensor`: uint8 of shape `(B, C, H, W)` on the CPU.

    Raises:
        UsageError: for labels or guidance where the pipeline has no classes, and for pipelines that need more than a
            number of images.
    """
    check_sampling(pipeline, steps)
    classes = getattr(pipeline, "null_class", None)
    if classes is None and class_label is not None:
        raise UsageError("class_label needs a class-conditional pipeline, which this is not.")
    if guidance_scale != 1.0 and classes is None and getattr(pipeline, "guide", None) is None:
        raise UsageError("guidance_scale needs a class-conditional pipeline, or one with a guide, which this is not.")
    arguments = {} if guidance_scale == 1.0 else {"guidance_scale": guidance_scale}
    if class_label is not None:
        arguments["class_labels"] = class_label
    elif classes:
        arguments["class_labels"] = [number % classes for number in numbers]
    pipeline.set_progress_bar_config(disable=True)
    with _finite_predictions(pipeline):
        images = pipeline(
            batch_size=len(numbers),
            num_inference_steps=steps,
            generator=image_generators(seed, numbers, "cpu"),
            output_type="np",
            **arguments,
        ).images
    if not np.isfinite(images).all():
        raise NotFiniteImagesError(_name(pipeline))
    return torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


def check_sampling(pipeline: DiffusionPipeline, steps: int) -> None:
    """Refuses what a pipeline cannot do, before any image is made.

    Raises:
        UsageError: for a pipeline that needs more than a number of images, and for too few or too many steps.
    """
    _check_unconditional(pipeline)
    if steps < 1:
        raise UsageError(f"steps must be at least 1, but is {steps}.")
    config = pipeline.scheduler.config
    if "beta_schedule" in config and steps > config.num_train_timesteps:
        raise UsageError(
            f"steps must be at most {config.num_train_timesteps}, as many as the model has timesteps, but is {steps}."
        )


@contextmanager
def _finite_predictions(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Refuses a model that gives values that are not finite, which diffusers' own pipelines clip to black or white."""
    unet = getattr(pipeline, "unet", None)
    if isinstance(pipeline, DIAUNetPipeline) or not isinstance(unet, nn.Module):
        yield  # Ours looks at them itself.
        return

    def check(module: nn.Module, arguments: Any, output: Any) -> None:
        if not output[0].isfinite().all():
            raise NotFiniteImagesError(_name(pipeline))

    handle = unet.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _name(pipeline: DiffusionPipeline) -> str:
    return pipeline.name_or_path or type(pipeline).__name__


def describe_guidance(pipeline: DiffusionPipeline, guidance_scale: float) -> str:
    """How images are guided, in words that go on after others; empty without guidance."""
    if guidance_scale == 1.0:
        return ""
    how = "classifier-free" if getattr(pipeline, "guide", None) is None else "by its guide"
    return f", guidance {guidance_scale:g} ({how})"


def find_class(pipeline: DiffusionPipeline, name: str) -> int:
    """The number of a class from its name, or from its number where no class has that for its name."""
    names = getattr(pipeline, "class_names", None) or []
    if name in names:
        return names.index(name)
    try:
        return int(name)
    except ValueError:
        known = f"its classes are: {', '.join(names[:50])}" if names else "it knows no names of classes; give a number"
        raise UsageError(f"the model has no class named '{name}'; {known}.{nearest(name, names)}") from None


def _check_unconditional(pipeline: DiffusionPipeline) -> None:
    name, accepted = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    if "batch_size" not in accepted:
        raise UsageError(f"{name} is not an unconditional pipeline: it cannot be asked for a number of images alone.")
    conditional = getattr(getattr(pipeline, "unet", None), "class_embedding", None) is not None
    if conditional and "class_labels" not in accepted:
        raise UsageError(
            f"the UNet needs class labels, which {name} does not give; DIAUNetPipeline(unet, scheduler) does."
        )


def sample_images(
    pipeline: DiffusionPipeline,
    num_images: int,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    class_label: int | None = None,
    guidance_scale: float = 1.0,
    description: str = "Sampling",
) -> Iterator[Tensor]:
    """Generates images 0 to `num_images - 1` in batches with a progress bar; the arguments are those of `sample_batch`.

    Yields:
        `Tensor`: uint8 of shape `(B, C, H, W)` on the CPU.
    """
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, but is {value}.")
    with progress_bar(total=num_images, desc=description, unit="img") as progress:
        for start in range(0, num_images, batch_size):
            numbers = range(start, min(start + batch_size, num_images))
            yield sample_batch(pipeline, numbers, steps, seed, class_label, guidance_scale)
            progress.update(len(numbers))
