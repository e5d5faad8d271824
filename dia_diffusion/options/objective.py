"""Options of training: what the UNet learns, and how."""

import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import UsageError
from .fields import NATURAL, SEED, Count, Natural, Options, Range, Share, option

# The options that belong to each objective, with their defaults. With another objective they are `None`.
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "ddpm": {
        "prediction_type": "epsilon",
        "ddpm_num_steps": 1000,
        "ddpm_beta_schedule": "linear",
        "rescale_betas_zero_snr": False,
        "snr_gamma": None,
    },
    "edm": {"sigma_data": None, "p_mean": -1.2, "p_std": 1.2},
    "flow": {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0},
}


def _belongs_to(objective: str, name: str, text: str) -> Any:
    return option(None, f"{objective}: {text}", shown=OBJECTIVE_DEFAULTS[objective][name])


@dataclass
class ObjectiveOptions(Options):
    """The objective: noise schedule, prediction, weighting."""

    group = "objective"

    objective: Literal["ddpm", "edm", "flow"] = option(
        "ddpm", "ddpm: noise by a schedule of betas. edm: Karras et al. 2022. flow: flow matching on straight paths."
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = _belongs_to(
        "ddpm", "prediction_type", "what the model predicts."
    )
    ddpm_num_steps: Annotated[int, Range(least=2)] | None = _belongs_to(
        "ddpm", "ddpm_num_steps", "timesteps of the noise schedule."
    )
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] | None = _belongs_to(
        "ddpm", "ddpm_beta_schedule", "how noise grows; squaredcos_cap_v2 is the cosine schedule."
    )
    rescale_betas_zero_snr: bool | None = _belongs_to(
        "ddpm", "rescale_betas_zero_snr", "zero signal at the last timestep (Lin et al. 2023)."
    )
    snr_gamma: Annotated[float, Range(above=0)] | None = _belongs_to(
        "ddpm", "snr_gamma", "Min-SNR loss weighting (Hang et al. 2023); 5 is usual."
    )
    sigma_data: Annotated[float, Range(least=1e-3, most=1e3)] | None = _belongs_to(
        "edm", "sigma_data", "standard deviation of the images in [-1, 1]; by default it is measured."
    )
    p_mean: Annotated[float, Range(least=-5, most=5)] | None = _belongs_to(
        "edm", "p_mean", "mean of ln(sigma) in training."
    )
    p_std: Annotated[float, Range(above=0, most=5)] | None = _belongs_to(
        "edm", "p_std", "standard deviation of ln(sigma) in training."
    )
    weighting_scheme: Literal["logit_normal", "none"] | None = _belongs_to(
        "flow", "weighting_scheme", "distribution of times in training; none is uniform."
    )
    logit_mean: Annotated[float, Range(least=-10, most=10)] | None = _belongs_to(
        "flow", "logit_mean", "mean of the logit of the time."
    )
    logit_std: Annotated[float, Range(above=0, most=10)] | None = _belongs_to(
        "flow", "logit_std", "standard deviation of the logit of the time."
    )
    label_dropout: Share = option(
        0.1, "With --class_conditional: share of labels replaced by 'no class', for classifier-free guidance."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in options_of_other_objectives(self.objective):
            if (value := getattr(self, name)) is not None:
                owner = next(key for key, defaults in OBJECTIVE_DEFAULTS.items() if name in defaults)
                raise UsageError(
                    f"{name} {value} has no meaning with --objective {self.objective}: it belongs to {owner}. Leave it "
                    "out."
                )
        for name, default in OBJECTIVE_DEFAULTS[self.objective].items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        check_zero_snr(self.rescale_betas_zero_snr, self.prediction_type)


def check_zero_snr(rescaled: bool | None, prediction_type: str | None) -> None:
    """Refuse to predict noise where the last timestep has no signal.

    Raises:
        UsageError: for `rescale_betas_zero_snr` with the prediction type `epsilon`.
    """
    if rescaled and prediction_type == "epsilon":
        raise UsageError(
            "rescale_betas_zero_snr leaves no signal at the last timestep, where noise says nothing about the image: "
            "use it with --prediction_type v_prediction or sample."
        )


def options_of_other_objectives(objective: str) -> list[str]:
    """Return the names of the options that belong to other objectives than this one."""
    return [name for key, defaults in OBJECTIVE_DEFAULTS.items() if key != objective for name in defaults]


@dataclass
class OptimisationOptions(Options):
    """Optimizer, batches and precision."""

    group = "optimisation"

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
    lr_num_cycles: Count = option(1, "Cycles of --lr_scheduler cosine_with_restarts.")
    lr_power: Annotated[float, Range(above=0)] = option(1.0, "Exponent of --lr_scheduler polynomial.")
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
        for name, otherwise in (("mixed_precision", "no"), ("gradient_accumulation_steps", 1)):
            if getattr(self, name) is None:
                setattr(self, name, os.environ.get(f"ACCELERATE_{name.upper()}", otherwise))
        super().__post_init__()
        if self.compile_mode != "default" and not self.compile:
            raise UsageError(f"compile_mode {self.compile_mode} has no effect without --compile: add it.")
