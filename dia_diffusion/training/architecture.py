"""The UNet of a training run: built from a configuration, or suited to the resolution, or loaded."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from diffusers import UNet2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import UsageError, first_line, nearest, why_not_loaded
from ..latents.autoencoder import find_component
from ..models.unet import DIAUNet2DModel
from ..options.fields import convert
from ..options.model import ModelOptions

# Values that diffusers takes where its signature says `str`.
_CHOICES = {
    "time_embedding_type": Literal["positional", "fourier", "learned"],
    "mid_block_type": Literal["UNetMidBlock2D"],
    "downsample_type": Literal["conv", "resnet"],
    "upsample_type": Literal["conv", "resnet"],
}


def default_architecture(resolution: int) -> dict[str, Any]:
    """Return UNet2DModel arguments that suit square images of a resolution.

    Up to 16 pixels a small UNet without self-attention; up to 32 the DDPM of CIFAR-10 (Ho et al. 2020, appendix B);
    above, the six levels of diffusers' `train_unconditional.py`.
    """
    groups: dict[str, int] = {}
    widths: tuple[int, ...]
    attending: tuple[int, ...]
    if resolution <= 16:
        widths, attending = (32, 64), ()
        # With as many groups as channels the normalisation would take the time embedding out again.
        groups = {"norm_num_groups": 8}
    elif resolution <= 32:
        widths, attending = (128, 256, 256, 256), (1,)
    else:
        widths, attending = (128, 128, 256, 256, 512, 512), (4,)
    return {"block_out_channels": widths, "layers_per_block": 2} | groups | _block_types(len(widths), attending)


def _block_types(levels: int, attending: tuple[int, ...] = ()) -> dict[str, Any]:
    attends = [level in attending for level in range(levels)]
    return {
        "down_block_types": tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
    }


def build_unet(
    options: ModelOptions,
    resolution: int,
    channels: int,
    num_classes: int | None,
    num_timesteps: int | None = 1000,
    latent_factor: int | None = None,
) -> DIAUNet2DModel:
    """Build a new UNet for a run, or load a saved one.

    Options that a saved model contradicts are refused.

    Args:
        options (`ModelOptions`): The description of the model.
        resolution, channels (`int`): Size and channels of the images, or of their latents.
        num_classes (`int`, *optional*): Makes the UNet class-conditional; one more embedding stands for "no class".
        num_timesteps (`int`, *optional*, defaults to 1000):
            Number of timesteps; `None` where they are not whole numbers from 0.
        latent_factor (`int`, *optional*): Pixels for each latent along one side, where the UNet sees latents.

    Raises:
        UsageError: if the options do not go together, or the levels do not divide the resolution.
    """
    from_data: dict[str, Any] = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    from_data["num_class_embeds"] = None if num_classes is None else num_classes + 1
    if options.init_from is not None:
        assert not isinstance(options.unet_arguments, str)
        flags = _read_unet_arguments(options.unet_arguments or {}) | options.unet_flags()
        unet = _load_unet(options.init_from, flags)
        _check_fit(unet, from_data, num_timesteps, latent_factor)
        unet.register_to_config(sample_size=resolution)
        return unet
    arguments = _describe(options, resolution) | from_data
    _try(arguments, from_data, num_timesteps, latent_factor)
    return DIAUNet2DModel.from_config(arguments)


def _describe(options: ModelOptions, resolution: int) -> dict[str, Any]:
    """Return the arguments of the UNet of a run, but for those that come from the data."""
    assert not isinstance(options.unet_arguments, str)
    flags = _read_unet_arguments(options.unet_arguments or {}) | options.unet_flags()
    if options.model_config_name_or_path is not None:
        return _load_model_config(options.model_config_name_or_path) | flags
    arguments = default_architecture(resolution)
    if options.block_out_channels is not None:
        arguments |= _block_types(len(options.block_out_channels))
    return arguments | flags


def _try(
    arguments: dict[str, Any], from_data: dict[str, Any], num_timesteps: int | None, latent_factor: int | None
) -> None:
    """Build the UNet and run it once on fake tensors, to find what diffusers or torch cannot do.

    It costs neither memory nor random numbers.
    """
    try:
        with FakeTensorMode(), torch.no_grad():
            unet = DIAUNet2DModel.from_config(arguments)
            _check_fit(unet, from_data, num_timesteps, latent_factor)
            zeros = torch.zeros(2, dtype=torch.long)
            size = from_data["sample_size"]
            sample = torch.zeros(2, from_data["in_channels"], size, size)
            unet(sample, zeros, zeros if from_data["num_class_embeds"] else None)
    except UsageError:
        raise
    except Exception as error:  # Wrong arguments make diffusers and torch raise errors of any kind.
        raise UsageError(
            f"no UNet can be built as asked: {first_line(error)}. Look at --block_out_channels (multiples of "
            f"norm_num_groups, {arguments.get('norm_num_groups', 32)} here), and at --unet_arguments or the "
            "model's configuration."
        ) from error


def _read_unet_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    from_data = {"sample_size", "in_channels", "out_channels", "num_class_embeds"}
    hints = get_type_hints(UNet2DModel.__init__) | _CHOICES
    free = hints.keys() - {"return"} - from_data - {item.name for item in fields(ModelOptions)}
    for name in arguments.keys() - free:
        if name in hints:
            raise UsageError(f"unet_arguments may not hold '{name}': it has a flag of its own or comes from the data.")
        raise UsageError(
            f"UNet2DModel has no argument '{name}'. unet_arguments may hold: {', '.join(sorted(free))}."
            f"{nearest(name, free)}"
        )
    return {
        name: None if value is None else convert(f"{name} in unet_arguments", value, hints[name])
        for name, value in arguments.items()
    }


def _check_fit(
    unet: DIAUNet2DModel, from_data: dict[str, Any], num_timesteps: int | None, latent_factor: int | None
) -> None:
    config, factor = unet.config, unet.downsampling_factor
    resolution, channels, embeddings = (from_data[name] for name in ("sample_size", "in_channels", "num_class_embeds"))
    if resolution % factor:
        shrink, what = (1, "it") if latent_factor is None else (latent_factor, f"latents of {resolution}x{resolution}")
        raise UsageError(
            f"resolution {resolution * shrink} does not fit a UNet whose levels halve {what} down to 1/{factor}: "
            f"choose a multiple of {factor * shrink}, or fewer levels with --block_out_channels."
        )
    _check_channels(config)
    if config.in_channels != channels:
        what, advice = f"images have {channels}", f"add --channels {config.in_channels}"
        if latent_factor is None and config.in_channels not in (1, 3):
            advice = "it was made for latents, whose VAE --vae names"
        if latent_factor is not None:
            what, advice = f"latents have {channels}", "it was made for pixels, or for another VAE"
        raise UsageError(f"the UNet has {config.in_channels} channels, the {what}: {advice}.")
    if config.num_class_embeds != embeddings:
        raise UsageError(
            f"the UNet has {config.num_class_embeds} class embeddings, but the data needs {embeddings} (one for "
            "each class and one for 'no class', with --class_conditional)."
        )
    if config.class_embed_type is not None:
        raise UsageError(
            f"class_embed_type '{config.class_embed_type}' has no embedding for each class and for 'no class': leave "
            "it out, and train on classes with --class_conditional."
        )
    if config.time_embedding_type == "fourier":
        raise UsageError(
            "time_embedding_type 'fourier' takes the logarithm of the timestep, which can be 0, and negative with some "
            "objectives: use a UNet with 'positional'."
        )
    if config.time_embedding_type == "learned" and num_timesteps is None:
        raise UsageError(
            "time_embedding_type 'learned' takes whole timesteps, and this objective has fractions: use a UNet with "
            "'positional'."
        )
    if config.time_embedding_type == "learned" and config.num_train_timesteps < num_timesteps:
        raise UsageError(
            f"the UNet knows {config.num_train_timesteps} timesteps (num_train_timesteps), fewer than "
            f"--ddpm_num_steps {num_timesteps}."
        )


def _check_channels(config: Mapping[str, Any]) -> None:
    inside, outside = (config.get(name, 3) for name in ("in_channels", "out_channels"))
    if inside != outside:
        raise UsageError(
            f"the UNet predicts {outside} channels for images of {inside}, perhaps the variance besides the noise: "
            "choose a model that predicts as many channels as it takes."
        )


def _load_unet(name_or_path: str, flags: dict[str, Any]) -> DIAUNet2DModel:
    """Load a trained UNet, with its own DIA, or with that of the flags if it has none."""
    # Dropout has no weights.
    free = {name: value for name, value in flags.items() if name == "dropout"}
    dia = {name: value for name, value in flags.items() if name.startswith("dia_")}
    try:
        # The oldest pipelines on the Hub have their UNet on top.
        location = find_component(UNet2DModel, name_or_path, "unet")
        config = UNet2DModel.load_config(name_or_path, **location)
        _check_class(name_or_path, config)
        if config["_class_name"] == DIAUNet2DModel.__name__:
            unet = DIAUNet2DModel.from_pretrained(name_or_path, **location, **free)
            _check_flags(unet, flags)
            return unet
        unet = UNet2DModel.from_pretrained(name_or_path, **location, **free)
        _check_flags(unet, {name: value for name, value in flags.items() if name not in dia})
        return DIAUNet2DModel.from_unet(unet, **dia)
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UsageError(f"cannot load a UNet from '{name_or_path}': {why_not_loaded(name_or_path, error)}") from error


def _check_flags(unet: UNet2DModel, flags: dict[str, Any]) -> None:
    """Refuse options that a loaded model contradicts: the record of the run would be wrong."""
    for name, value in flags.items():
        has = unet.config[name]
        if value != (list(has) if isinstance(has, tuple) else has):
            raise UsageError(f"{name} {value} does not fit the loaded model, which has {has}: omit it.")


def _load_model_config(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    try:
        if path.is_file():
            config = json.loads(path.read_text())
        else:
            config = UNet2DModel.load_config(name_or_path, **find_component(UNet2DModel, name_or_path, "unet"))
        if not isinstance(config, dict):
            raise ValueError("it holds no 'name: value' pairs")
    except (OSError, ValueError) as error:
        reason = why_not_loaded(name_or_path, error)
        raise UsageError(f"cannot read a UNet configuration from '{name_or_path}': {reason}") from error
    _check_class(name_or_path, config)
    _check_channels(config)
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _check_class(name_or_path: str, config: dict[str, Any]) -> None:
    name = config.get("_class_name", UNet2DModel.__name__)
    if name not in (UNet2DModel.__name__, DIAUNet2DModel.__name__):
        raise UsageError(f"'{name_or_path}' is a {name}: choose a UNet2DModel or a DIAUNet2DModel.")


def count_parameters(unet: UNet2DModel) -> tuple[int, int]:
    """Return the number of a UNet's parameters, and of those that are its attention."""
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("dia."))
