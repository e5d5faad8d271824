"""Images in memory to train classifiers on; correlation of their attention maps; saving them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTImageProcessorPil

from dia_diffusion import detach
from dia_diffusion.analysis.similarity import VIEWS, channel_correlations, describe
from dia_diffusion.data.preparation import prepare_pixels


class Images:
    """The images of a split, as uint8 pixels `(N, C, R, R)`, and their labels: batches are cut out of one tensor.

    Args:
        split (`datasets.Dataset`): Images with labels.
        resolution (`int`): Height and width R that they are given.
        device (`torch.device`): Where they are kept.
        channels (`int`, *optional*): Number C of channels; by default that of the images.
    """

    def __init__(self, split: Dataset, resolution: int, device: torch.device, channels: int | None = None):
        data = prepare_pixels(split, resolution, channels, with_labels=True)
        batch = data.fetch(range(len(data)))
        self.pixels, self.labels = batch["images"].to(device), batch["labels"].to(device)
        self.classes = data.num_classes

    def batches(self, rows: Tensor, size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of `size` images and labels, in the order of `rows`.

        With a generator each image is cropped at random out of a black border of 4 pixels, and flipped or not.
        """
        padded, side = F.pad(self.pixels, (4, 4, 4, 4)).permute(0, 2, 3, 1), torch.arange(self.pixels.shape[-1])
        for chosen in rows.split(size):
            down = across = 4 + side.expand(len(chosen), -1)
            if generator is not None:
                down, across = torch.randint(9, (2, len(chosen), 1), generator=generator) + side
                flipped = torch.rand(len(chosen), 1, generator=generator) < 0.5
                across = torch.where(flipped, across.flip(1), across)
            # In the memory format in which convolutions are fastest.
            images = padded[chosen[:, None, None], down[:, :, None], across[:, None]].permute(0, 3, 1, 2)
            yield images, self.labels[chosen]


@torch.no_grad()
def correlate_maps(model: nn.Module, images: Images, mean: Tensor, std: Tensor, most: int = 100) -> dict[str, dict]:
    """Correlate the attention maps of each two blocks of equal width, channel by channel (arXiv 2210.16101, section 1).

    Over up to `most` images of each class.

    Returns:
        The statistics of `dia analyze`: over `all` images together, and `within_class`, with the mean map of each class
        subtracted first.
    """
    of_class = [(images.labels == label).nonzero().flatten() for label in range(images.classes)]
    count = min(most, *map(len, of_class))
    rows = torch.cat([rows[:count] for rows in of_class])
    collected: dict[str, list[Tensor]] = {}
    with model.dia.record() as maps:
        for batch, _ in images.batches(rows, 250, None):
            model((batch.float() - mean) / std)
            for name, gate in maps.items():
                collected.setdefault(name, []).append(gate.float().cpu())
    # (classes, images, channels): classes stand where timesteps do in a diffusion model.
    stacked = {
        name: torch.cat(parts).unflatten(0, (images.classes, count)).numpy() for name, parts in collected.items()
    }
    correlations = {view: channel_correlations(stacked, view) for view in VIEWS}
    return {
        view.replace("timestep", "class"): describe(np.concatenate(list(pairs.values())))
        for view, pairs in correlations.items()
        if pairs
    }


def save_classifier(model: nn.Module, folder: Path, resolution: int, mean: Tensor, std: Tensor) -> None:
    """Save the weights; of a model of transformers `model` with its image processor, and `attention` apart."""
    if not isinstance(model, PreTrainedModel):
        save_model(model, folder / "model.safetensors")
        return
    if hasattr(model, "dia"):
        model.dia.save_pretrained(folder / "attention")
        detach(model)
    model.save_pretrained(folder / "model")
    scale = {f"image_{name}": (value.flatten() / 255).tolist() for name, value in (("mean", mean), ("std", std))}
    ViTImageProcessorPil(size={"height": resolution, "width": resolution}, **scale).save_pretrained(folder / "model")
