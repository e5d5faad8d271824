"""Save a trained classifier, and correlate its attention maps."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTImageProcessorPil

from dia_diffusion import detach
from dia_diffusion.analysis.similarity import VIEWS, channel_correlations, describe

from .images_in_memory import Images


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
