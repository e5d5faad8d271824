"""Train UNets that the package does not have: a trainer for `dia study`.

    dia study studies/places.yaml                 where the gates of shared attention act
    dia study studies/shared_projection.yaml      blocks that share their projection of the timestep

A run takes the options of `dia train`, and `form`: one of `FORMS`. It is trained as `dia train` trains, without
checkpoints, and compared by its held-out loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dia_diffusion import attach
from dia_diffusion.data.loading import load_pixels
from dia_diffusion.errors import UsageError, nearest
from dia_diffusion.objectives import make_objective
from dia_diffusion.options.training import TrainingConfig
from dia_diffusion.training.accelerator import open_accelerator
from dia_diffusion.training.architecture import build_unet
from dia_diffusion.training.batches import BatchPlan, make_loader, prepare_batches, running
from dia_diffusion.training.held_out import held_out_loss
from dia_diffusion.training.loop import accumulate_gradients
from dia_diffusion.training.state import TrainingState

SCORES = {"held_out_loss": "lower"}
LOSS_DRAWS = 4


def blocks_of(unet: UNet2DModel, part: str = "") -> dict[str, ResnetBlock2D]:
    """Return the residual blocks of `down_blocks`, `mid_block` or `up_blocks` by name, in order of execution."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, ResnetBlock2D) and name.startswith(part)
    }


def add_skip_modules(unet: UNet2DModel) -> list[str]:
    """Give each long skip connection a module where the up path takes it, and return the modules' names."""
    widths = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        widths += [sampler.conv.out_channels for sampler in block.downsamplers or []]
    up_blocks = blocks_of(unet, "up_blocks")
    for block in up_blocks.values():
        block.skip = nn.Identity()
        # `attach` reads the number of channels there.
        block.skip.out_channels = widths.pop()
        block.register_forward_pre_hook(_call_skip_module)
    return [f"{name}.skip" for name in up_blocks]


def _call_skip_module(block: ResnetBlock2D, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pass the part of a block's input that is the skip connection through its module."""
    width = block.skip.out_channels
    hidden, skip = args[0].split([args[0].shape[1] - width, width], dim=1)
    return torch.cat([hidden, block.skip(skip)], dim=1), *args[1:]


def add_gates(unet: UNet2DModel, place: str) -> None:
    """Attach one LSTM that starts from zero, with its gates at a place.

    Args:
        unet (`UNet2DModel`): The UNet, without attention.
        place (`str`): `branches` (ends of residual branches), `before-conv2` (before their second convolution), `skips`
            (long skip connections), `skips-after-down` (these, after the branches of the way down), or `both`.
    """
    down = [f"{name}.conv2" for part in ("down_blocks", "mid_block") for name in blocks_of(unet, part)]
    up = [f"{name}.conv2" for name in blocks_of(unet, "up_blocks")]
    if place == "branches":
        ends = down + up
    elif place == "before-conv2":
        ends = [end.replace("conv2", "dropout") for end in down + up]
        for block in blocks_of(unet).values():
            block.dropout.out_channels = block.out_channels
    else:
        skips = add_skip_modules(unet)
        both = [end for pair in zip(skips, up, strict=True) for end in pair]
        ends = {"skips": skips, "skips-after-down": down + skips, "both": down + both}[place]
    attach(unet, branches=ends, time_conditioned=False, hidden_size=32)


class OffsetProjection(nn.Module):
    """The projection of the timestep of one block: a matrix that it shares, and an offset of its own."""

    def __init__(self, shared: nn.Module, own: nn.Linear):
        super().__init__()
        self.shared, self.bias = shared, own.bias

    def forward(self, embedding: Tensor) -> Tensor:
        return self.shared(embedding) + self.bias


def share_projections(unet: UNet2DModel, rank_share: float) -> None:
    """Let the residual blocks of each width share one matrix, of this share of the full rank.

    Each block keeps an offset of its own, as in adaLN-single of PixArt-alpha (arXiv 2310.00426).
    """
    shared: dict[int, nn.Module] = {}
    for block in blocks_of(unet).values():
        own = block.time_emb_proj
        width, size = own.out_features, own.in_features
        if width not in shared:
            rank = int(rank_share * min(width, size))
            full = nn.Linear(size, width, bias=False)
            factors = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, width, bias=False))
            shared[width] = full if rank_share == 1 else factors
        block.time_emb_proj = OffsetProjection(shared[width], own)


FORMS: dict[str, Callable[[UNet2DModel], None]] = {
    "plain": lambda unet: None,
    **{
        place: partial(add_gates, place=place)
        for place in ("branches", "before-conv2", "skips", "skips-after-down", "both")
    },
    "shared": partial(share_projections, rank_share=1),
    "shared-half-rank": partial(share_projections, rank_share=0.5),
    "shared-quarter-rank": partial(share_projections, rank_share=0.25),
}


def check(options: dict[str, Any]) -> TrainingConfig:
    """Return the options of training; refuse a form or an option that is unknown."""
    form, known = options.get("form"), {name: value for name, value in options.items() if name != "form"}
    if form not in FORMS:
        raise UsageError(f"there is no form '{form}'.{nearest(str(form), FORMS)}")
    try:
        return TrainingConfig.from_flat(**known)
    except TypeError as error:
        raise UsageError(f"{error}.") from error


def make_unet(options: dict[str, Any], channels: int, num_classes: int | None) -> UNet2DModel:
    """Build the UNet of a run."""
    config = check(options)
    torch.manual_seed(config.optimisation.seed)
    unet = build_unet(config.model, config.data.resolution, channels, num_classes).to_unet()
    FORMS[options["form"]](unet)
    return unet


def train(options: dict[str, Any]) -> dict[str, float]:
    """Train a UNet; return its sizes and its held-out loss."""
    config = check(options)
    optimisation, objective = config.optimisation, make_objective(config.objective)
    steps, seed = optimisation.max_train_steps, optimisation.seed
    data, held_out = load_pixels(config.data)
    numbers, plan = range(1, steps + 1), BatchPlan(optimisation.train_batch_size)
    flips, label_dropout = config.data.random_flip, config.objective.label_dropout
    with open_accelerator(optimisation.mixed_precision, config.output) as accelerator:
        unet = make_unet(options, data.channels, data.num_classes)
        training = TrainingState(optimisation, accelerator, unet, steps)
        loader = make_loader(config.data, data, plan, seed, numbers, accelerator.device)
        training.unet.train()
        with running(loader) as loaded:
            batches = prepare_batches(
                loaded, data, plan, seed, numbers, accelerator.device, objective, flips, label_dropout
            )
            for step in numbers:
                accumulate_gradients(training, objective, batches, plan.micro_batches)
                training.update(step)
        with training.averaged() as averaged:
            loss = held_out_loss(averaged, objective, held_out, 250, len(held_out), LOSS_DRAWS)
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    return {
        "parameters": sum(sizes.values()),
        "attention_parameters": sum(size for name, size in sizes.items() if name.startswith("dia.")),
        "projection_parameters": sum(size for name, size in sizes.items() if "time_emb_proj" in name),
        "held_out_loss": loss,
    }
