"""Options that say how the UNet learns."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import UsageError
from .fields import NATURAL, SEED, Count, Natural, Options, Range, Share, option


@dataclass
class OptimisationOptions(Options):
    """How the UNet learns it."""

    seed: Annotated[int, SEED] = option(0, "Everything random in a run follows from it.")
    num_epochs: Count = option(100, "Passes over the data.")
    max_train_steps: Count | None = option(None, "Optimizer steps, instead of --num_epochs.")
    train_batch_size: Count = option(16, "Images in a batch, on each process.")
    gradient_accumulation_steps: Count | None = option(
        None, "Batches in an optimizer step; by default $ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or 1."
    )
    train_only: Literal["all", "dia"] = option("all", "'dia' freezes everything but the shared attention.")
    learning_rate: Annotated[float, NATURAL] = option(1e-4, "Peak learning rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("cosine", "Schedule of the learning rate, as diffusers has it.")
    lr_warmup_steps: Natural = option(500, "Steps in which the learning rate rises.")
    lr_num_cycles: Count = option(1, "Cycles of cosine_with_restarts.")
    lr_power: Annotated[float, Range(above=0)] = option(1.0, "Power of polynomial; 1 is linear.")
    adam_beta1: Annotated[float, Range(least=0, below=1)] = option(0.95, "AdamW's first beta.")
    adam_beta2: Annotated[float, Range(least=0, below=1)] = option(0.999, "AdamW's second beta.")
    adam_weight_decay: Annotated[float, NATURAL] = option(1e-6, "AdamW's weight decay.")
    adam_epsilon: Annotated[float, Range(above=0)] = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: Annotated[float, NATURAL] = option(1.0, "Gradients are clipped to this norm; 0: they are not.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the forward pass; by default that of `accelerate launch`, or no."
    )
    compile: bool = option(False, "Compile the model with torch.compile.")
    compile_mode: Literal["default", "reduce-overhead"] = option(
        "default", "How --compile does it: reduce-overhead replays CUDA graphs on a GPU."
    )
    enable_xformers_memory_efficient_attention: bool = option(False, "Use xformers for self-attention.")
    use_ema: bool = option(False, "Keep an exponential moving average of the weights, and save it as the model.")
    ema_inv_gamma: Annotated[float, Range(above=0)] = option(
        1.0, "EMA decay is 1 - (1 + step / inv_gamma) ** -power, at most max_decay."
    )
    ema_power: Annotated[float, NATURAL] = option(0.75, "See --ema_inv_gamma.")
    ema_max_decay: Share = option(0.9999, "See --ema_inv_gamma.")

    def __post_init__(self) -> None:
        if self.compile_mode != "default" and not self.compile:
            raise UsageError(f"compile_mode {self.compile_mode} says how to compile: add --compile.")
        for name, otherwise in (("mixed_precision", "no"), ("gradient_accumulation_steps", 1)):
            if getattr(self, name) is None:
                setattr(self, name, os.environ.get(f"ACCELERATE_{name.upper()}", otherwise))
        super().__post_init__()
        for name, scheduler, unset in (("lr_num_cycles", "cosine_with_restarts", 1), ("lr_power", "polynomial", 1.0)):
            if getattr(self, name) != unset and self.lr_scheduler != scheduler:
                raise UsageError(
                    f"{name} {getattr(self, name)} has no effect with lr_scheduler {self.lr_scheduler}: it belongs to "
                    f"--lr_scheduler {scheduler}. Leave it out."
                )
