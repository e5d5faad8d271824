"""The UNet of a training run: the one that a configuration names, or one that suits the resolution."""

import json
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from .config import TrainingConfig
from .errors import UsageError
from .unet import DIAUNet2DModel


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


def build_unet(config: TrainingConfig, channels: int, num_classes: int | None) -> DIAUNet2DModel:
    """A fresh UNet for a run.

    Args:
        config (`TrainingConfig`): Says which.
        channels (`int`): Channels of the images.
        num_classes (`int`, *optional*): Makes the UNet class-conditional; one more embedding stands for "no class".

    Raises:
        UsageError: if the configuration cannot be read, or its levels do not divide the resolution.
    """
    flags = config.model_arguments()
    if config.model_config_name_or_path is not None:
        arguments = _load_model_config(config.model_config_name_or_path)
    else:
        arguments = default_architecture(config.resolution)
        if config.block_out_channels is not None:
            arguments |= _block_types(len(config.block_out_channels))
    arguments |= flags
    arguments |= {"sample_size": config.resolution, "in_channels": channels, "out_channels": channels}
    arguments["num_class_embeds"] = None if num_classes is None else num_classes + 1
    unet = DIAUNet2DModel.from_config(arguments)
    factor = unet.downsampling_factor
    if config.resolution % factor:
        raise UsageError(
            f"resolution {config.resolution} does not fit a UNet whose levels halve it down to 1/{factor}: choose a "
            f"multiple of {factor}, or fewer levels with --block_out_channels."
        )
    return unet


def _load_model_config(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    try:
        if path.is_file():
            config = json.loads(path.read_text())
        else:
            # A pipeline holds the UNet in a subfolder.
            subfolder = "unet" if (path / "unet").is_dir() else None
            config = UNet2DModel.load_config(name_or_path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read a UNet configuration from '{name_or_path}': {error}") from error
    return {name: value for name, value in config.items() if not name.startswith("_")}
