"""Another pipeline's UNet as the guide of a pipeline, where both were trained on the same."""

from diffusers import DiffusionPipeline, UNet2DModel

from ..checksums import weights_checksum
from ..errors import UsageError
from ..pipelines import DIAUNetPipeline, noise_kind
from .schedulers import find_family


def set_guide(pipeline: DiffusionPipeline, other: DiffusionPipeline, name: str) -> None:
    """Makes the UNet of another pipeline the guide of this one.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline.
        other (`DiffusionPipeline`): With a worse model of the same images.
        name (`str`): Of the other, for the words of a refusal.

    Raises:
        UsageError: if their predictions are not of the same kind: other noise, prediction, classes or latents.
    """
    if not isinstance(pipeline, DIAUNetPipeline) or not isinstance(getattr(other, "unet", None), UNet2DModel):
        raise UsageError(
            f"a guide is the UNet of one pipeline for another, both of DIAUNetPipeline's kind, but these are "
            f"{type(pipeline).__name__} and {type(other).__name__}."
        )
    for what, own, of_guide in _compared(pipeline, other):
        if own != of_guide:
            raise UsageError(f"'{name}' does not fit as the guide: its {what} is {of_guide}, and the model's {own}.")
    pipeline.register_modules(guide=other.unet)


def _compared(pipeline: DIAUNetPipeline, other: DiffusionPipeline) -> list[tuple[str, object, object]]:
    """What must be the same of two pipelines: its name, and the value in each."""
    pairs = [(part.scheduler.config, part.unet.config) for part in (pipeline, other)]
    (noise, unet), (other_noise, other_unet) = pairs
    compared = [("kind of noise", noise_kind(noise), noise_kind(other_noise))]
    # Not all schedulers have all of them.
    known = [key for key in find_family(noise).of_the_model if key in noise and key in other_noise]
    compared += [(key, noise[key], other_noise[key]) for key in known]
    sizes = ("sample_size", "in_channels", "out_channels", "num_class_embeds")
    compared += [(key, unet.get(key), other_unet.get(key)) for key in sizes]
    compared += [("class names", pipeline.class_names, getattr(other, "class_names", None))]
    vaes = [getattr(part, "vae", None) for part in (pipeline, other)]
    checksums = [None if vae is None else weights_checksum(vae.state_dict())[:12] for vae in vaes]
    return [*compared, ("VAE", *checksums)]


def check_guide(guide: str | None, guidance_scale: float) -> None:
    """Refuses a guide that would do nothing.

    Raises:
        UsageError: with what to do.
    """
    if guide is not None and guidance_scale == 1.0:
        raise UsageError("a guide does nothing at guidance_scale 1: give a larger one, such as --guidance_scale 1.5.")
