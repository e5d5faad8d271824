"""The attention maps of an image classifier of transformers, to which attention is attached."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import PixelDataset
from ..errors import UsageError
from ..models import attach
from ..process import progress_bar
from .maps import Block, spread_rows


def load_classifier(name_or_path: str, attention: str, device: str | torch.device) -> nn.Module:
    """An image classifier with a saved attention attached.

    Args:
        name_or_path (`str`): Folder or Hub id of the classifier.
        attention (`str`): Folder or Hub id of the attention, as `dia.save_pretrained` left it.
        device (`str` or `torch.device`): Where to.

    Raises:
        UsageError: if the classifier cannot be loaded, or the attention was made for another kind of model.
    """
    from transformers import AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"'{name_or_path}' is no image classifier of transformers: {reason}") from error
    attach(model, pretrained=attention)
    return model.to(device).eval()


def read_processor(name_or_path: str, config: Any) -> tuple[int, Tensor, Tensor]:
    """The side of the images that a classifier was made for, and their mean and standard deviation by channel."""
    from transformers import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except OSError:
        # Saved without one: images are taken to be in [-1, 1], of the size in the configuration.
        processor = {}
    size = processor.get("size", getattr(config, "image_size", 224))
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size["height"]
    channels = config.num_channels
    mean, std = (torch.tensor(processor.get(f"image_{name}", [0.5] * channels)) for name in ("mean", "std"))
    return size, mean.view(-1, 1, 1), std.view(-1, 1, 1)


@torch.no_grad()
def collect_classifier_maps(
    model: nn.Module,
    dataset: PixelDataset,
    mean: Tensor,
    std: Tensor,
    num_images: int = 512,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """For each branch its maps, float32 `(1, N, C)`, for images spread evenly over a data set."""
    rows = spread_rows(len(dataset), num_images)
    collected: dict[str, list[np.ndarray]] = {}
    with model.dia.record() as maps:
        for start in progress_bar(range(0, len(rows), batch_size), desc="Attention maps", unit="batch"):
            images = dataset.fetch(rows[start : start + batch_size])["images"].float() / 255
            model(pixel_values=((images - mean) / std).to(model.device))
            for name, gate in maps.items():
                collected.setdefault(name, []).append(gate.float().cpu().numpy())
    return {name: np.concatenate(parts)[None] for name, parts in collected.items()}


def place_branches(model: nn.Module) -> list[Block]:
    """Where the branches stand: their level, and as their path what of a block they belong to, if it has several."""
    config = model.dia.config
    levels = list(dict.fromkeys(config.levels))
    several = any(not name.rpartition(".")[2].isdigit() for name in config.names)
    blocks = []
    for name, level in zip(config.names, config.levels, strict=True):
        # A transformer's blocks have two branches each, which are named after the block.
        path = name.rpartition(".")[2] if several else "block"
        numbers = ".".join(part for part in name.split(".") if part.isdigit())
        blocks.append(Block(name, path, levels.index(level), f"{path} {numbers}"))
    return blocks
