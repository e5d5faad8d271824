"""What the attention costs: a training step and a forward pass of UNets with DIA against the plain UNet2DModel.

Beside DIA also SE in each block. Ratios are of times, so 1.03 is 3% slower; the three models take turns.

    python benchmarks/attention_cost.py [--rounds N] [--output RESULT.json]

On a GPU where there is one.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn
from tqdm.auto import tqdm

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.process import tune_process
from measuring import alternate, read_arguments, row, save_result, spread

PLAIN = "UNet2DModel"
DIA, SE = "DIA", "SE in each block"
# Arguments of DIAUNet2DModel, or none for diffusers' own class.
SIDES = {PLAIN: {}, DIA: {"dia_attention": "lstm"}, SE: {"dia_attention": "se", "dia_sharing": "block"}}


def _plain_levels(levels: int) -> dict[str, Any]:
    return {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}


CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
# Configuration, batch, and passes in a round.
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "digits": (
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            **_plain_levels(2),
        },
        64,
        5,
    ),
    "32x32": ({"sample_size": 32, "block_out_channels": (64, 128, 128), **_plain_levels(3)}, 16, 1),
    "CIFAR-10": (CIFAR10, 2, 1),
}


def make_models(config: dict[str, Any], device: str, sides: Sequence[str] = SIDES) -> dict[str, UNet2DModel]:
    """The plain UNet, and those with attention and the same weights, as the trainer places them."""
    models = {}
    for side in sides:
        torch.manual_seed(0)
        model = DIAUNet2DModel(**config, **SIDES[side]) if SIDES[side] else UNet2DModel(**config)
        models[side] = model.to(device).to(memory_format=torch.channels_last)
    return models


def make_passes(
    model: UNet2DModel,
    call: Callable,
    batch: int,
    passes: int = 1,
    dtype: torch.dtype | None = None,
) -> dict[str, Callable[[], None]]:
    """A training step (forward, backward, optimizer) and a forward pass of a model.

    Args:
        model (`UNet2DModel`): What is trained.
        call (`Callable`): How it is called: itself, or compiled.
        batch, passes (`int`): Images in a batch, and how often it runs each time.
        dtype (`torch.dtype`, *optional*): The data type of autocast; none by default.
    """
    size, channels = model.config.sample_size, model.config.in_channels
    images = torch.randn(batch, channels, size, size, device=model.device)
    images = images.contiguous(memory_format=torch.channels_last)
    timesteps = torch.arange(batch, device=model.device) * 1000 // batch
    noise = torch.randn_like(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def predict() -> torch.Tensor:
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            return call(images, timesteps, return_dict=False)[0]

    def step() -> None:
        for _ in range(passes):
            nn.functional.mse_loss(predict().float(), noise).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        for _ in range(passes):
            predict()

    return {"step": step, "forward": forward}


def measure(size: str, rounds: int, device: str) -> list[dict]:
    """The rows of a size: the step and the forward pass of each model."""
    config, batch, passes = SIZES[size]
    models = make_models(config, device)
    runs = {name: make_passes(model, model, batch, passes) for name, model in models.items()}
    rows = []
    for kind in ("step", "forward"):
        times = alternate({name: run[kind] for name, run in runs.items()}, rounds)
        for name, seconds in times.items():
            ratio = None if name == PLAIN else spread(seconds, times[PLAIN])
            value = 1e3 * statistics.median(seconds) / passes
            rows.append(row(f"{kind}, {size}, {name}", value, "ms", f"time of {PLAIN}", ratio))
        shares = spread(times[DIA], times[SE])
        value = 1e3 * statistics.median(times[DIA]) / passes
        rows.append(row(f"{kind}, {size}, {DIA}", value, "ms", f"time of {SE}", shares))
    return rows


def main() -> int:
    options = read_arguments(__doc__, "attention_cost", rounds=15)
    tune_process()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size in tqdm(SIZES, desc="Sizes"):
        rows += measure(size, options.rounds, device)
    save_result(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
