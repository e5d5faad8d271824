"""Pipelines from a folder or from the Hub, ready to sample: on a device, with a sampler, a guide, compiled."""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from torch import nn

from ..errors import UsageError, first_line, why_not_loaded
from ..files import weights_digest
from ..models.memory_format import lay_out
from ..pipelines.noise import noise_kind
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..pipelines.weights import check_weights, variant_of
from ..process.signals import Interrupted
from .generation import check_inputs
from .schedulers import find_family, make_scheduler


def load_pipeline(
    name_or_path: str,
    scheduler: str | None = None,
    device: torch.device | str | None = None,
    compile_mode: str | None = None,
    guide: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a saved pipeline, with DIA or any other of diffusers, in float32.

    The weights of its UNet are laid out for speed, so that images differ in the last bits from those of the pipeline
    that `from_pretrained` of its class gives.

    Args:
        name_or_path (`str`): Folder or Hub id.
        scheduler (`str`, *optional*): Short name of another sampler than its own.
        device (`torch.device` or `str`, *optional*): The device to run on, by default the CPU.
        compile_mode (`str`, *optional*): Mode in which `torch.compile` compiles its UNet; by default it does not.
        guide (`str`, *optional*): Folder or Hub id of a pipeline whose UNet becomes the guide of this one.
        variant (`str`, *optional*):
            The variant of the weights, such as `fp16`; a folder that holds only one is loaded without its name.

    Raises:
        UsageError: if there is no such pipeline, scheduler or device, or if the guide does not fit.
    """
    pipeline = _from_pretrained(name_or_path, variant)
    if guide is not None:
        set_guide(pipeline, load_pipeline(guide), guide)
    # DDPMPipeline neither scales the inputs of other schedulers than its own, nor calls their steps as they need it.
    foreign = type(pipeline) is DDPMPipeline and not isinstance(pipeline.scheduler, DDPMScheduler)
    if scheduler is not None or compile_mode is not None or foreign:
        pipeline = _with_any_sampler(pipeline)
    if scheduler is not None:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    _check_unet(name_or_path, pipeline)
    unets = [unet for name in ("unet", "guide") if isinstance(unet := getattr(pipeline, name, None), nn.Module)]
    for unet in unets:
        lay_out(unet)
        if compile_mode is not None:
            unet.compile(mode=compile_mode, dynamic=False)
    if hasattr(getattr(pipeline, "vae", None), "use_slicing"):
        # One image at a time: the memory of a decoder does not grow with the batch, and it takes no longer.
        pipeline.vae.enable_slicing()
    try:
        return pipeline.to(device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {first_line(error)}.") from error


def _from_pretrained(name_or_path: str, variant: str | None) -> DiffusionPipeline:
    folder = Path(name_or_path)
    variants = _find_variants(folder)
    if variant is None and None not in variants and len(variants) == 1:
        variant = next(iter(variants))
    # By itself diffusers finds no weights in several .bin files.
    pickled = any(folder.glob("*/*.bin")) and not any(folder.glob("*/*.safetensors"))
    try:
        index = DiffusionPipeline.load_config(name_or_path)
        if not isinstance(index, dict) or "_class_name" not in index:
            raise ValueError(f"its {DiffusionPipeline.config_name} names no pipeline class")
        # The name of the class, or the file of its code and the name.
        name = index["_class_name"] if isinstance(index["_class_name"], str) else index["_class_name"][-1]
        known = DIAUNetPipeline if name == DIAUNetPipeline.__name__ else DiffusionPipeline
        pipeline = known.from_pretrained(name_or_path, variant=variant, use_safetensors=False if pickled else None)
        check_weights(pipeline, variant)
        return pipeline
    except (MemoryError, Interrupted):
        raise
    except Exception as error:  # An edited configuration makes diffusers and its schedulers raise errors of any kind.
        others = sorted(filter(None, variants))
        reason = why_not_loaded(name_or_path, error)
        if folder.exists() and not folder.is_dir():
            reason = f"it is a file: name the folder with the {DiffusionPipeline.config_name}."
        elif folder.is_dir() and not (folder / DiffusionPipeline.config_name).is_file():
            reason = f"the folder has no {DiffusionPipeline.config_name}; {_find_pipeline_near(folder)}."
        elif variants and variant not in variants:
            held = f"Those here: {', '.join(others)}." if others else "Leave the variant out."
            reason = f"the folder has no weights of the variant {variant or 'without a name'}. {held}"
        elif variant is None and not folder.is_dir() and "no file named" in reason:
            reason += " If there is a variant of the weights alone, name it: --variant fp16."
        raise UsageError(f"cannot load a pipeline from '{name_or_path}': {reason}") from error


def _find_pipeline_near(folder: Path) -> str:
    """Find a pipeline near a folder: above it, or in a cache of the Hub below."""
    for place in (folder.parent, *sorted(folder.glob("snapshots/*")), *sorted(folder.iterdir())):
        if (place / DiffusionPipeline.config_name).is_file():
            return f"'{place}' has one"
    return "a finished training run leaves one there"


def _find_variants(folder: Path) -> set[str | None]:
    """Return the variants of the UNet's weights in a folder; `None` among them are the weights without a variant."""
    found = (folder / "unet").glob("diffusion_pytorch_model*")
    return {variant_of(path) for path in found if path.suffix in (".safetensors", ".bin")}


def _with_any_sampler(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a DIAUNetPipeline of a UNet and a scheduler, for those of diffusers take one sampler only."""
    if isinstance(pipeline, DIAUNetPipeline) or set(pipeline.components) != {"unet", "scheduler"}:
        return pipeline
    if not isinstance(pipeline.unet, UNet2DModel):
        return pipeline
    check_inputs(pipeline)
    converted = DIAUNetPipeline(pipeline.unet, pipeline.scheduler)
    converted.register_to_config(_name_or_path=pipeline.name_or_path)
    return converted


def _check_unet(name_or_path: str, pipeline: DiffusionPipeline) -> None:
    """Refuse pipelines that would fail when they are called."""
    config = getattr(getattr(pipeline, "unet", None), "config", {})
    if "sample_size" in config and config["sample_size"] is None:
        raise UsageError(
            f"'{name_or_path}' does not record the size of its images: set sample_size in its unet/config.json."
        )
    scheduler: Any = type(getattr(pipeline, "scheduler", None))
    learned = config.get("out_channels") == 2 * config.get("in_channels", 0)
    if learned and "variance_type" not in inspect.signature(scheduler.__init__).parameters:
        raise UsageError(
            f"'{name_or_path}' predicts the variance besides the noise, which {scheduler.__name__} cannot use: choose "
            "--scheduler ddpm or dpm."
        )


def set_guide(pipeline: DiffusionPipeline, other: DiffusionPipeline, name: str) -> None:
    """Make the UNet of another pipeline the guide of this one.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline.
        other (`DiffusionPipeline`): With a worse model of the same images.
        name (`str`): Folder or Hub id of the other, for error messages.

    Raises:
        UsageError: if their predictions are not of the same kind: other noise, prediction, classes or latents.
    """
    if not isinstance(pipeline, DIAUNetPipeline) or not isinstance(getattr(other, "unet", None), UNet2DModel):
        raise UsageError(
            f"a guide and the pipeline that it guides must be DIAUNetPipelines, but these are "
            f"{type(other).__name__} and {type(pipeline).__name__}."
        )
    for what, own, of_guide in _compare(pipeline, other):
        if own != of_guide:
            raise UsageError(f"'{name}' does not fit as the guide: its {what} is {of_guide}, and the model's {own}.")
    pipeline.register_modules(guide=other.unet)


def _compare(pipeline: DIAUNetPipeline, other: DiffusionPipeline) -> list[tuple[str, object, object]]:
    """Return the properties that a model and its guide must share: name, and value in each."""
    pairs = [(part.scheduler.config, part.unet.config) for part in (pipeline, other)]
    (noise, unet), (other_noise, other_unet) = pairs
    own, of_guide = (kind.name if kind else "unknown" for kind in (noise_kind(noise), noise_kind(other_noise)))
    compared: list[tuple[str, object, object]] = [("kind of noise", own, of_guide)]
    # Not all schedulers have all of them.
    known = [key for key in find_family(noise).of_the_model if key in noise and key in other_noise]
    compared += [(key, noise[key], other_noise[key]) for key in known]
    sizes = ("sample_size", "in_channels", "out_channels", "num_class_embeds")
    compared += [(key, unet.get(key), other_unet.get(key)) for key in sizes]
    compared += [("class names", pipeline.class_names, getattr(other, "class_names", None))]
    vaes = [getattr(part, "vae", None) for part in (pipeline, other)]
    digests = [None if vae is None else weights_digest(vae.state_dict())[:12] for vae in vaes]
    return [*compared, ("VAE", digests[0], digests[1])]
