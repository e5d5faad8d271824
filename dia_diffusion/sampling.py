"""Many images from a pipeline, each a function of the seed and its number alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor
from tqdm.auto import tqdm

from .errors import UsageError
from .pipelines import DIAUNetPipeline

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm_singlestep": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
}
DEFAULT_SCHEDULER = "dpm_sde"


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of this short name, with the noise schedule and the prediction type of a configuration.

    Raises:
        UsageError: for an unknown name; lists those known.
    """
    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler '{name}'. Choose one of: {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **options)


def load_pipeline(name_or_path: str) -> DiffusionPipeline:
    """Loads a saved pipeline, with DIA or any other of diffusers, from a folder or from the Hub.

    Raises:
        UsageError: if there is none.
    """
    try:
        index = DiffusionPipeline.load_config(name_or_path)
        # The name of the class, or the file of its code and the name.
        name = index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][-1]
        known = DIAUNetPipeline if name == DIAUNetPipeline.__name__ else DiffusionPipeline
        return known.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        if Path(name_or_path).is_dir() and not (Path(name_or_path) / DiffusionPipeline.config_name).is_file():
            reason = f"the folder has no {DiffusionPipeline.config_name}; a finished training run leaves one there"
        else:
            reason = str(error).splitlines()[0]
        raise UsageError(f"cannot load a pipeline from '{name_or_path}': {reason}.") from error


def image_generators(seed: int, numbers: Sequence[int], device: torch.device | str) -> list[torch.Generator]:
    """One generator for each image number. Images of one run never share a generator; other seeds give others."""
    # torch seeds its generator on the CPU with 32 bits.
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator(device).manual_seed((start + number) % 2**32) for number in numbers]


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
    """Generates images in batches; image i is the same whatever the batch size and the number of images.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline, or any unconditional pipeline of diffusers.
        num_images, steps, seed, batch_size (`int`): How many images, denoising steps, the seed, images at a time.
        class_label (`int`, *optional*):
            The class of all images. By default a class-conditional pipeline takes its classes in turn.
        guidance_scale (`float`, *optional*, defaults to 1.0): Strength of classifier-free guidance.
        description (`str`, *optional*): Label of the progress bar.

    Yields:
        `Tensor`: uint8 of shape `(B, C, H, W)` on the CPU.
    """
    for name, value in (("num_images", num_images), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, but is {value}.")
    classes = getattr(pipeline, "null_class", None)
    if classes is None and (class_label is not None or guidance_scale != 1.0):
        raise UsageError("class_label and guidance_scale need a class-conditional pipeline, which this is not.")
    arguments = {} if guidance_scale == 1.0 else {"guidance_scale": guidance_scale}
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=num_images, desc=description, unit="img") as progress:
        for start in range(0, num_images, batch_size):
            numbers = range(start, min(start + batch_size, num_images))
            if class_label is not None:
                arguments["class_labels"] = class_label
            elif classes:
                arguments["class_labels"] = [number % classes for number in numbers]
            images = pipeline(
                batch_size=len(numbers),
                num_inference_steps=steps,
                generator=image_generators(seed, numbers, "cpu"),
                output_type="np",
                **arguments,
            ).images
            progress.update(len(numbers))
            yield torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)
