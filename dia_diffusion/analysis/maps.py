"""Attention maps of a UNet or of an image classifier, and the positions of their blocks."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..data.decoding import to_unit_range
from ..data.pixels import PixelDataset
from ..errors import UsageError, first_line
from ..models.attach import attach
from ..models.unet import DIAUNet2DModel
from ..process.output import progress_bar
from ..randomness import step_seed
from ..sampling.schedulers import noise_images, spread_timesteps


class Block(NamedTuple):
    """The position of a residual block in a network.

    Attributes:
        name (`str`): As in the state dict.
        path (`str`): `down`, `mid` or `up` in a UNet; elsewhere the kind of branch.
        level (`int`): 0 at full resolution.
        label (`str`): Short, for pictures.
    """

    name: str
    path: str
    level: int
    label: str


def place_blocks(names: Iterable[str]) -> list[Block]:
    """Read the places of blocks off their names, such as `down_blocks.0.resnets.1`."""
    names = list(names)
    levels = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("down_blocks"))
    blocks = []
    for name in names:
        path, *numbers = name.split(".")
        path = path.removesuffix("_block").removesuffix("_blocks")
        rest = ".".join(numbers).replace("resnets.", "").replace("resnet_", "")
        level = {"down": lambda n: int(n[0]), "up": lambda n: levels - 1 - int(n[0]), "mid": lambda n: levels - 1}[path]
        blocks.append(Block(name, path, level(numbers), f"{path} {rest}"))
    return blocks


def spread_rows(length: int, num_images: int) -> list[int]:
    """Return the rows of that many images, spread evenly over a data set; all if it has fewer."""
    count = min(num_images, length)
    return [index * length // count for index in range(count)]


@torch.no_grad()
def collect_maps(
    unet: DIAUNet2DModel,
    scheduler: SchedulerMixin,
    dataset: PixelDataset,
    num_images: int = 512,
    num_timesteps: int = 10,
    batch_size: int = 64,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Collect the maps of all blocks for noisy images, with noise that is the same each time.

    Args:
        unet (`DIAUNet2DModel`), scheduler (`SchedulerMixin`): The model, and the noise that it was trained with.
        dataset (`PixelDataset`): The images, with labels if the model is class-conditional.
        num_images (`int`, *optional*): How many, spread evenly over the data set; all if it has fewer.
        num_timesteps (`int`, *optional*): How many, spread evenly over the scheduler's.
        batch_size (`int`, *optional*): Images at a time.
        encode (`Callable`, *optional*): From images in [-1, 1] `(B, C, H, W)` to what the model sees, if not these.

    Returns:
        `dict`: for each block its maps, float32 `(T, N, C)`; and the timesteps, as the model is told them.
    """
    rows = spread_rows(len(dataset), num_images)
    timesteps = spread_timesteps(scheduler, num_timesteps)
    unet.eval()
    collected: dict[str, list[list[np.ndarray]]] = {}
    for number, timestep in enumerate(progress_bar(timesteps, desc="Attention maps", unit="timestep")):
        generator = torch.Generator().manual_seed(step_seed(0, number))
        for start in range(0, len(rows), batch_size):
            batch = dataset.fetch(rows[start : start + batch_size])
            images = to_unit_range(batch["images"])
            images = images if encode is None else encode(images)
            noise = torch.randn(images.shape, generator=generator)
            noisy = noise_images(scheduler, images, noise, timestep).to(unet.device)
            labels = batch["labels"].to(unet.device) if "labels" in batch else None
            for name, gate in unet.attention_maps(noisy, timestep.to(unet.device), labels).items():
                per_timestep = collected.setdefault(name, [[] for _ in timesteps])
                per_timestep[number].append(gate.float().cpu().numpy())
    maps = {name: np.stack([np.concatenate(parts) for parts in parts_of]) for name, parts_of in collected.items()}
    return maps, [round(timestep, 3) for timestep in timesteps.tolist()]


def load_classifier(name_or_path: str, attention: str, device: str | torch.device) -> Any:
    """Load an image model of transformers, with a head for classification or without, and attach a saved attention.

    Args:
        name_or_path (`str`): Folder or Hub id of the model.
        attention (`str`): Folder or Hub id of the attention, as `dia.save_pretrained` left it.
        device (`str` or `torch.device`): Where to.

    Raises:
        UsageError: if the model cannot be loaded or takes no images, or the attention does not fit it.
    """
    import transformers

    try:
        # Load the saved class: the attention names its modules.
        saved = (transformers.AutoConfig.from_pretrained(name_or_path).architectures or [""])[0]
        model_class = getattr(transformers, saved, transformers.AutoModelForImageClassification)
        model = model_class.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UsageError(f"'{name_or_path}' is no image model of transformers: {first_line(error)}.") from error
    if model.main_input_name != "pixel_values":
        raise UsageError(f"'{name_or_path}' takes '{model.main_input_name}' and no images: name an image model.")
    attach(model, pretrained=attention)
    return model.to(device).eval()


def read_processor(name_or_path: str, config: Any) -> tuple[int, Tensor, Tensor]:
    """Return the side of a classifier's images, and their mean and standard deviation by channel."""
    from transformers import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except OSError:
        # Without a processor, assume images in [-1, 1] of the size in the configuration.
        processor = {}
    size = processor.get("size", getattr(config, "image_size", 224))
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size["height"]
    channels = getattr(config, "num_channels", 3)
    mean, std = (torch.tensor(processor.get(f"image_{name}", [0.5] * channels)) for name in ("mean", "std"))
    return size, mean.view(-1, 1, 1), std.view(-1, 1, 1)


@torch.no_grad()
def collect_classifier_maps(
    model: Any, dataset: PixelDataset, mean: Tensor, std: Tensor, num_images: int = 512, batch_size: int = 64
) -> dict[str, np.ndarray]:
    """Collect for each branch its maps, float32 `(1, N, C)`, for images spread evenly over a data set."""
    rows = spread_rows(len(dataset), num_images)
    collected: dict[str, list[np.ndarray]] = {}
    with model.dia.record() as maps:
        for start in progress_bar(range(0, len(rows), batch_size), desc="Attention maps", unit="batch"):
            images = dataset.fetch(rows[start : start + batch_size])["images"].float() / 255
            model(pixel_values=((images - mean) / std).to(model.device))
            for name, gate in maps.items():
                collected.setdefault(name, []).append(gate.float().cpu().numpy())
    return {name: np.concatenate(parts)[None] for name, parts in collected.items()}


def place_branches(model: Any) -> list[Block]:
    """Return the places of the branches: their level, and as their path the part of a block that they belong to."""
    config = model.dia.config
    levels = list(dict.fromkeys(config.levels))
    blocks = []
    for name, level in zip(config.names, config.levels, strict=True):
        # A transformer's blocks have two branches each, which are named after the block.
        path = re.split(r"(?:^|\.)\d+(?:\.|$)", name)[-1] or "block"
        numbers = ".".join(part for part in name.split(".") if part.isdigit())
        blocks.append(Block(name, path, levels.index(level), f"{path} {numbers}"))
    return blocks
