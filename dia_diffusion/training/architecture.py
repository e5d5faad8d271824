"""The UNet of a training run: the one that a configuration names, or one that suits the resolution."""

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from ..errors import UsageError
from ..models import DIAUNet2DModel
from .options import ModelOptions


def default_architecture(resolution: int) -> dict[str, Any]:
    """UNet2DModel arguments for square images of a resolution.

    Up to 16 pixels a small UNet without self-attention; up to 32 the DDPM of CIFAR-10 (Ho et al. 2020, appendix B);
    above, the six levels of diffusers' `train_unconditional.py`.
    """
    groups = {}
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


def build_unet(options: ModelOptions, resolution: int, channels: int, num_classes: int | None) -> DIAUNet2DModel:
    """A fresh UNet for a run.

    Args:
        options (`ModelOptions`): Say which.
        resolution, channels (`int`): Of the images.
        num_classes (`int`, *optional*): Makes the UNet class-conditional; one more embedding stands for "no class".

    Raises:
        UsageError: if the options do not go together, or the levels do not divide the resolution.
    """
    flags = options.unet_flags()
    _check_unet_arguments(options.unet_arguments or {})
    if options.init_from is not None:
        unet = _load_unet(options.init_from, flags, options.dia_arguments())
        _check_fit(unet, resolution, channels, num_classes)
        unet.register_to_config(sample_size=resolution)
        return unet
    if options.model_config_name_or_path is not None:
        arguments = flags | _load_model_config(options.model_config_name_or_path) | _given(flags)
    else:
        arguments = default_architecture(resolution)
        if options.block_out_channels is not None:
            arguments |= _block_types(len(options.block_out_channels))
        arguments |= flags
    arguments |= {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    arguments["num_class_embeds"] = None if num_classes is None else num_classes + 1
    try:
        unet = DIAUNet2DModel.from_config(arguments)
    except ValueError as error:
        raise UsageError(f"no UNet can be built as asked: {error}") from error
    _check_fit(unet, resolution, channels, num_classes)
    return unet


def _check_unet_arguments(arguments: dict[str, Any]) -> None:
    from_data = {"sample_size", "in_channels", "out_channels", "num_class_embeds"}
    known = inspect.signature(UNet2DModel.__init__).parameters.keys() - {"self"}
    free = known - from_data - {item.name for item in fields(ModelOptions)}
    for name in arguments.keys() - free:
        if name in known:
            raise UsageError(f"unet_arguments may not hold '{name}': it has a flag of its own or comes from the data.")
        raise UsageError(f"UNet2DModel has no argument '{name}'. unet_arguments may hold: {', '.join(sorted(free))}.")


def _check_fit(unet: DIAUNet2DModel, resolution: int, channels: int, num_classes: int | None) -> None:
    factor = unet.downsampling_factor
    if resolution % factor:
        raise UsageError(
            f"resolution {resolution} does not fit a UNet whose levels halve it down to 1/{factor}: choose a "
            f"multiple of {factor}, or fewer levels with --block_out_channels."
        )
    if unet.config.in_channels != channels:
        raise UsageError(
            f"the UNet has {unet.config.in_channels} channels, the images have {channels}: add --channels "
            f"{unet.config.in_channels}."
        )
    embeddings = None if num_classes is None else num_classes + 1
    if unet.config.num_class_embeds != embeddings:
        raise UsageError(
            f"the UNet has {unet.config.num_class_embeds} class embeddings, but the data needs {embeddings} (one for "
            "each class and one for 'no class', with --class_conditional)."
        )


def _load_unet(name_or_path: str, flags: dict[str, Any], dia_arguments: dict[str, Any]) -> DIAUNet2DModel:
    """A trained UNet, with its own DIA, or with that of the flags if it has none."""
    try:
        location = _find_unet(name_or_path)
        config = UNet2DModel.load_config(name_or_path, **location)
        if config["_class_name"] == DIAUNet2DModel.__name__:
            unet = DIAUNet2DModel.from_pretrained(name_or_path, **location)
            _check_flags(unet, flags)
            return unet
        unet = UNet2DModel.from_pretrained(name_or_path, **location)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot load a UNet from '{name_or_path}': {str(error).splitlines()[0]}") from error
    return DIAUNet2DModel.from_unet(unet, **dia_arguments)


def _check_flags(unet: DIAUNet2DModel, flags: dict[str, Any]) -> None:
    """A flag that a loaded model does not follow would make the record of the run wrong."""
    for name, value in _given(flags).items():
        if value != unet.config[name]:
            raise UsageError(f"--{name} {value} does not fit the loaded model, which has {unet.config[name]}: omit it.")


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that differ from their defaults, and so were given."""
    defaults = ModelOptions().unet_flags()
    return {name: value for name, value in flags.items() if value != defaults.get(name)}


def _load_model_config(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    try:
        if path.is_file():
            config = json.loads(path.read_text())
        else:
            config = UNet2DModel.load_config(name_or_path, **_find_unet(name_or_path))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read a UNet configuration from '{name_or_path}': {error}") from error
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _find_unet(name_or_path: str) -> dict[str, str]:
    """Where a folder or a repository holds its UNet: in a subfolder, or on top, as the oldest pipelines on the Hub."""
    try:
        UNet2DModel.load_config(name_or_path, subfolder="unet")
    except OSError:
        return {}
    return {"subfolder": "unet"}
