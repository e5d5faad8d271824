"""Images from a pipeline by number: image i is a function of the seed and i alone, whatever the batch size."""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from ..errors import NotFiniteImagesError, UsageError, first_line
from ..pipelines.inputs import class_number
from ..pipelines.noise import find_misfit
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..pipelines.timesteps import check_steps
from ..process.output import progress_bar


def image_generators(seed: int, numbers: Sequence[int], device: torch.device | str) -> list[torch.Generator]:
    """Return one generator for each image number; no two images of a run share one, and other seeds give others."""
    if seed < 0:
        raise UsageError(f"seed must be at least 0, but is {seed}.")
    # torch seeds its generator on the CPU with 32 bits.
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator(device).manual_seed((start + number) % 2**32) for number in numbers]


def sample_images(
    pipeline: DiffusionPipeline,
    num_images: int,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    class_label: int | Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    description: str = "Sampling",
) -> Iterator[Tensor]:
    """Generate images 0 to `num_images - 1` in batches with a progress bar; the arguments are those of `sample_batch`,
    but of several classes the images take one after the other, in turn.

    Yields:
        `Tensor`: uint8 of shape `(B, C, H, W)` on the CPU.
    """
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, but is {value}.")
    if compiled := is_compiled(pipeline):
        # Batches of one size, for which the UNet is compiled once: equal shares of all images.
        batch_size = math.ceil(num_images / math.ceil(num_images / batch_size))
    with progress_bar(total=num_images, desc=description, unit="img") as progress:
        for start in range(0, num_images, batch_size):
            numbers = range(start, min(start + batch_size, num_images))
            pad_to = batch_size if compiled else 0
            labels = class_label
            if isinstance(class_label, Sequence):
                labels = [class_label[number % len(class_label)] for number in numbers]
            yield sample_batch(pipeline, numbers, steps, seed, labels, guidance_scale, pad_to)
            progress.update(len(numbers))


def sample_batch(
    pipeline: DiffusionPipeline,
    numbers: Sequence[int],
    steps: int,
    seed: int = 0,
    class_label: int | Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    pad_to: int = 0,
) -> Tensor:
    """Generate the images of these numbers.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline, or any unconditional pipeline of diffusers.
        numbers (`Sequence[int]`): The numbers of the images.
        steps, seed (`int`): Denoising steps, the seed.
        class_label (`int` or sequence of `int`, *optional*):
            The class of all images, or of each. By default a class-conditional pipeline takes its classes in turn.
        guidance_scale (`float`, *optional*, defaults to 1.0): Strength of guidance, by a guide or classifier-free.
        pad_to (`int`, *optional*, defaults to 0):
            The least size of the batch that the model sees; further images are made and dropped.

    Returns:
        `Tensor`: uint8 of shape `(B, C, H, W)` on the CPU.

    Raises:
        UsageError: for labels or guidance where the pipeline has no classes, and for pipelines that need more than a
            number of images.
    """
    check_inputs(pipeline)
    _check_steps(pipeline, steps)
    classes = _count_classes(pipeline)
    if classes is None and class_label is not None:
        raise UsageError("class_label needs a class-conditional pipeline, which this is not.")
    guided = classes if isinstance(pipeline, DIAUNetPipeline) else None
    if guidance_scale != 1.0 and guided is None and getattr(pipeline, "guide", None) is None:
        raise UsageError("guidance_scale needs a class-conditional pipeline, or one with a guide, which this is not.")
    count = len(numbers)
    numbers = [*numbers, *[numbers[-1]] * (pad_to - count)]
    arguments: dict[str, Any] = {} if guidance_scale == 1.0 else {"guidance_scale": guidance_scale}
    if isinstance(class_label, Sequence):
        arguments["class_labels"] = [*class_label, *[class_label[-1]] * (pad_to - count)]
    elif class_label is not None:
        arguments["class_labels"] = [class_label] * len(numbers)
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
        ).images[:count]
    if not np.isfinite(images).all():
        raise NotFiniteImagesError(_name(pipeline))
    return to_uint8(images)


def to_uint8(images: np.ndarray) -> Tensor:
    """Return images `(B, H, W, C)` in [0, 1] as a pipeline gives them as uint8 `(B, C, H, W)`."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


def is_compiled(pipeline: DiffusionPipeline) -> bool:
    """Return whether the UNet of a pipeline was compiled in place (`unet.compile()`)."""
    return getattr(getattr(pipeline, "unet", None), "_compiled_call_impl", None) is not None


def check_sampling(pipeline: DiffusionPipeline, steps: int) -> None:
    """Refuse options that a pipeline cannot take, before any image is made.

    Raises:
        UsageError: for a pipeline that needs more than a number of images or makes no pictures, and for numbers of
            steps that its scheduler cannot take.
    """
    check_inputs(pipeline)
    _check_steps(pipeline, steps)
    check_scheduler(pipeline)
    check_pictures(pipeline)
    config = getattr(getattr(pipeline, "unet", None), "config", {})
    channels = config.get("in_channels", 3)
    if (size := config.get("sample_size")) and find_misfit(pipeline.scheduler) is None:
        shape = (channels, *((size, size) if isinstance(size, int) else size))
        check_steps(pipeline.scheduler, steps, shape, config.get("out_channels") == 2 * channels)
        return
    try:
        copy.deepcopy(pipeline.scheduler).set_timesteps(steps)
    except ValueError as error:
        name = type(pipeline.scheduler).__name__
        raise UsageError(f"{steps} steps do not fit {name}: {first_line(error)}.") from error


def check_pictures(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline whose images are no pictures, such as latents without their VAE."""
    made = getattr(pipeline, "image_channels", None)
    if made is None and not any(hasattr(part, "decode") for part in pipeline.components.values()):
        made = getattr(getattr(pipeline, "unet", None), "config", {}).get("in_channels", 3)
    if made not in (1, 3, None):
        raise UsageError(f"the model makes images of {made} channels, and pictures have 1 or 3.")


def check_scheduler(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline of a UNet whose scheduler would run but not denoise what it predicts."""
    if isinstance(pipeline, DIAUNetPipeline | DDPMPipeline | DDIMPipeline):
        kind, reason = type(pipeline.scheduler).__name__, find_misfit(pipeline.scheduler)
        if reason := "it leads from images to noise" if "Inverse" in kind else reason:
            raise UsageError(
                f"its scheduler, {kind}, does not fit '{_name(pipeline)}': {reason}. Correct its "
                "scheduler/scheduler_config.json."
            )


def find_advice(pipeline: DiffusionPipeline, steps: int) -> str | None:
    """Return a warning where a pipeline takes far more steps by itself than it is asked for, or `None`.

    DDPM's own sampler needs as many steps as the model has timesteps, or nearly (Song et al. 2021, arXiv 2010.02502,
    table 1), and images of few are noisy.
    """
    name, usual = type(pipeline.scheduler).__name__, 0
    if isinstance(pipeline.scheduler, DDPMScheduler):
        usual = pipeline.scheduler.config.num_train_timesteps
    elif not isinstance(pipeline, DIAUNetPipeline):
        default = inspect.signature(pipeline.__call__).parameters.get("num_inference_steps")
        usual = default.default if default is not None and isinstance(default.default, int) else 0
    if 4 * steps >= usual:
        return None
    return (
        f"warning: {name} is meant for {usual:,} steps, and {steps} give worse images: add --steps {usual}, or a "
        "sampler for few steps, such as --scheduler dpm_sde."
    )


def describe_guidance(pipeline: DiffusionPipeline, guidance_scale: float) -> str:
    """Return how images are guided, as the continuation of a sentence; empty without guidance."""
    if guidance_scale == 1.0:
        return ""
    how = "classifier-free" if getattr(pipeline, "guide", None) is None else "by its guide"
    return f", guidance {guidance_scale:g} ({how})"


def find_classes(pipeline: DiffusionPipeline, name: str | list[str]) -> int | list[int]:
    """Return the number of a class, or of several, from its name, or from its number: see `class_number`.

    Raises:
        UsageError: if the pipeline has no such class, or no classes.
    """
    classes = _count_classes(pipeline)
    if classes is None:
        raise UsageError("class_label needs a class-conditional pipeline, which this is not.")
    if isinstance(name, list):
        return [find_classes(pipeline, one) for one in name]  # type: ignore[misc]
    number = class_number(name, classes, getattr(pipeline, "class_names", None))
    if number == classes and not isinstance(pipeline, DIAUNetPipeline):
        raise UsageError(f"the model has {classes} classes, 0 to {classes - 1}, and none that stands for no class.")
    return number


def _count_classes(pipeline: DiffusionPipeline) -> int | None:
    """Return how many classes images are drawn of, or `None` for a pipeline without; others than DIAUNetPipeline draw
    classes from the global random state where they are given none."""
    if isinstance(pipeline, DIAUNetPipeline) or "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        return getattr(pipeline, "null_class", None)
    return getattr(getattr(pipeline, "unet", None), "config", {}).get("num_class_embeds")


def check_inputs(pipeline: DiffusionPipeline) -> None:
    """Refuse pipelines that need more than a number of images, and classes.

    Raises:
        UsageError: with what the pipeline needs.
    """
    name, accepted = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    if "batch_size" not in accepted:
        raise UsageError(f"{name} needs more inputs than a number of images: choose an unconditional pipeline.")
    conditional = getattr(getattr(pipeline, "unet", None), "class_embedding", None) is not None
    if conditional and "class_labels" not in accepted:
        raise UsageError(
            f"the UNet needs class labels, which {name} does not give; DIAUNetPipeline(unet, scheduler) does."
        )
    if conditional and (kind := pipeline.unet.config.class_embed_type) is not None:
        raise UsageError(
            f"the UNet takes embeddings of classes (class_embed_type '{kind}') and no numbers: call {name} in Python."
        )


def _check_steps(pipeline: DiffusionPipeline, steps: int) -> None:
    if steps < 1:
        raise UsageError(f"steps must be at least 1, but is {steps}.")
    config = pipeline.scheduler.config
    if "beta_schedule" in config and steps > config.num_train_timesteps:
        raise UsageError(
            f"steps must be at most {config.num_train_timesteps}, as many as the model has timesteps, but is {steps}."
        )


@contextmanager
def _finite_predictions(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Refuse a model that gives NaN or infinite values, which diffusers' own pipelines clip to black or white."""
    unet = getattr(pipeline, "unet", None)
    if isinstance(pipeline, DIAUNetPipeline) or not isinstance(unet, nn.Module):
        yield  # DIAUNetPipeline checks its predictions.
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
