"""A training run: its description, its loop, what goes on from a checkpoint, and what it leaves."""

from .architecture import build_unet
from .batches import BatchPlan, load_pixels, make_loader, prepare_batches
from .checkpoint import CHECKPOINTS
from .log import METRICS_LOG, read_metrics
from .loop import accumulate_gradients, train
from .objective import diffusion_loss, draw_step, held_out_loss, make_noise_scheduler
from .options import (
    CONFIG,
    OPTION_NAMES,
    DataOptions,
    OptimisationOptions,
    TrainingConfig,
    load_recipe,
    parse_arguments,
)
from .processes import make_accelerator
from .state import TrainingState

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "METRICS_LOG",
    "OPTION_NAMES",
    "BatchPlan",
    "DataOptions",
    "OptimisationOptions",
    "TrainingConfig",
    "TrainingState",
    "accumulate_gradients",
    "build_unet",
    "diffusion_loss",
    "draw_step",
    "held_out_loss",
    "load_pixels",
    "load_recipe",
    "make_accelerator",
    "make_loader",
    "make_noise_scheduler",
    "parse_arguments",
    "prepare_batches",
    "read_metrics",
    "train",
]
