"""Many images from a pipeline, each a function of the seed and its number alone."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import UsageError
from .pipelines import DIAUNetPipeline

# Short names. Missing are those for distilled models (LCM, TCD), those that run a diffusion backwards, EDM's and flow
# matching, which need another training, and DPMSolverSDE, whose noise does not come from the generators.
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
    "dpm_singlestep_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "sa_solver": ("SASolverScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
}
DEFAULT_SCHEDULER = "dpm_sde"


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler of this short name, with the noise schedule and the prediction type of a configuration.

    Raises:
        UsageError: for an unknown name (lists those known), and for one whose package is not installed.
    """
    if name not in SCHEDULERS:
        raise UsageError(f"unknown scheduler '{name}'. Choose one of: {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    # Of a configuration that was never saved, `from_config` takes only the values that differ from the defaults of
    # *its* scheduler; the defaults of another are other betas.
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    try:
        return getattr(diffusers, class_name).from_config(config, **options)
    except ImportError as error:
        raise UsageError(f"scheduler '{name}' cannot be used here: {str(error).strip().splitlines()[0]}") from error


def load_pipeline(
    name_or_path: str, scheduler: str | None = None, device: torch.device | str | None = None
) -> DiffusionPipeline:
    """Loads a saved pipeline, with DIA or any other of diffusers, from a folder or from the Hub.

    The weights of its UNet are laid out for speed, so that images differ in the last bits from those of the pipeline
    that `from_pretrained` of its class gives.

    Args:
        name_or_path (`str`): Folder or Hub id.
        scheduler (`str`, *optional*): Short name of another scheduler than its own.
        device (`torch.device` or `str`, *optional*): Where it runs, by default the CPU.

    Raises:
        UsageError: if there is no such pipeline, scheduler or device.
    """
    try:
        index = DiffusionPipeline.load_config(name_or_path)
        # The name of the class, or the file of its code and the name.
        name = index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][-1]
        known = DIAUNetPipeline if name == DIAUNetPipeline.__name__ else DiffusionPipeline
        pipeline = known.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        reason = _why_not_loaded(name_or_path, error)
        raise UsageError(f"cannot load a pipeline from '{name_or_path}': {reason}.") from error
    if isinstance(getattr(pipeline, "unet", None), nn.Module):
        # Convolutions are faster in this format, and hand it on to their output.
        pipeline.unet.to(memory_format=torch.channels_last)
    if scheduler is not None:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    try:
        return pipeline.to(device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _why_not_loaded(name_or_path: str, error: Exception) -> str:
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / DiffusionPipeline.config_name).is_file():
        return f"the folder has no {DiffusionPipeline.config_name}; a finished training run leaves one there"
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        if not folder.exists():
            return "there is no such folder"
    return str(error).splitlines()[0].rstrip(".")


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
    class_label: int | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Generates the images of these numbers: image i is the same whatever else is in its batch.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline, or any unconditional pipeline of diffusers.
        numbers (`Sequence[int]`): Which images.
        steps, seed (`int`): Denoising steps, the seed.
        class_label (`int`, *optional*):
            The class of all images. By default a class-conditional pipeline takes its classes in turn.
        guidance_scale (`float`, *optional*, defaults to 1.0): Strength of classifier-free guidance.

    Returns:
        `Tensor`: uint8 of shape `(B, C, H, W)` on the CPU.

    Raises:
        UsageError: for labels or guidance where the pipeline has no classes, and for pipelines that need more than a
            number of images.
    """
    _check_unconditional(pipeline)
    if steps < 1:
        raise UsageError(f"steps must be at least 1, but is {steps}.")
    classes = getattr(pipeline, "null_class", None)
    if classes is None and (class_label is not None or guidance_scale != 1.0):
        raise UsageError("class_label and guidance_scale need a class-conditional pipeline, which this is not.")
    arguments = {} if guidance_scale == 1.0 else {"guidance_scale": guidance_scale}
    if class_label is not None:
        arguments["class_labels"] = class_label
    elif classes:
        arguments["class_labels"] = [number % classes for number in numbers]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=len(numbers),
        num_inference_steps=steps,
        generator=image_generators(seed, numbers, "cpu"),
        output_type="np",
        **arguments,
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


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
    with tqdm(total=num_images, desc=description, unit="img") as progress:
        for start in range(0, num_images, batch_size):
            numbers = range(start, min(start + batch_size, num_images))
            yield sample_batch(pipeline, numbers, steps, seed, class_label, guidance_scale)
            progress.update(len(numbers))
