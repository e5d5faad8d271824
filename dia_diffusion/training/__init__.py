"""A training run: its description, its loop, what goes on from a checkpoint, and what it leaves."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    architecture="build_unet",
    batches="BatchPlan load_pixels make_loader measure_std prepare_batches",
    checkpoint="CHECKPOINTS",
    draws="draw_step",
    held_out="held_out_loss",
    latents="load_data",
    log="METRICS_LOG read_metrics",
    loop="accumulate_gradients train",
    objectives="OBJECTIVES Objective",
    options="OPTION_NAMES DataOptions OptimisationOptions TrainingConfig",
    parsing="CONFIG load_recipe parse_arguments read_yaml",
    accelerator="make_accelerator",
    state="TrainingState",
    values="read_mapping",
)
