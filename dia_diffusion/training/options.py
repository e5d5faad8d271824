"""The description of a training run, in parts, from which the flags, the YAML file and the saved record come.

Names, meanings and defaults are those of diffusers' `train_unconditional.py` wherever that script has the option.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from ..errors import UsageError


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


class _Options:
    """A part of the description, which checks its own values. Those of the fields in `counts` are at least 1."""

    counts = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            choices = get_args(item.type) if get_origin(item.type) is Literal else ()
            value = getattr(self, item.name)
            if isinstance(value, str) and float in (item.type, *get_args(item.type)):
                setattr(self, item.name, _parse_float(item.name, value))
            if choices and value is not None and value not in choices:
                raise UsageError(f"{item.name} must be one of {', '.join(choices)}, but is '{value}'.")
            if item.name in self.counts.split() and value is not None and value < 1:
                raise UsageError(f"{item.name} must be at least 1, but is {value}.")


@dataclass
class DataOptions(_Options):
    """Which images, and how they are prepared."""

    counts = "resolution"

    dataset_name: str | None = _option(
        None, "digits, mnist5k, a data set on the Hub, or a folder that datasets can load."
    )
    dataset_config_name: str | None = _option(None, "Configuration of a data set that has several.")
    train_data_dir: str | None = _option(None, "A folder of images, instead of --dataset_name.")
    cache_dir: str | None = _option(None, "Where data sets and prepared images are kept.")
    image_column: str | None = _option(None, "Column of the images; by default the first of type Image.")
    label_column: str | None = _option(None, "Column of the classes; by default the first of type ClassLabel.")
    resolution: int = _option(64, "Pixels of height and width.")
    channels: int | None = _option(None, "1 (grey) or 3 (colour); by default as the images are.")
    center_crop: bool = _option(False, "Cut images that are not square in the middle, instead of at random.")
    random_flip: bool = _option(False, "Flip images horizontally at random.")
    preserve_input_precision: bool = _option(False, "Keep 16 bits of images that have them, instead of 8.")
    on_bad_image: Literal["error", "skip"] = _option("error", "What to do about an image that cannot be read.")
    class_conditional: bool = _option(False, "Condition the model on the labels of the data set.")
    dataloader_num_workers: int = _option(0, "Processes that load data; 0 loads in the main process.")


@dataclass
class ModelOptions(_Options):
    """Which UNet."""

    model_config_name_or_path: str | None = _option(
        None, "Configuration of the UNet: a JSON file, a folder or a Hub id, with or without dia_ arguments."
    )
    init_from: str | None = _option(
        None, "Start from the weights of this pipeline or UNet2DModel (a folder or a Hub id), with DIA or without."
    )
    block_out_channels: list[int] | None = _option(None, "Channels of each level; by default chosen by --resolution.")
    layers_per_block: int | None = _option(None, "Residual blocks of each level.")
    dropout: float | None = _option(None, "Dropout in the residual blocks.")
    resnet_time_scale_shift: Literal["default", "scale_shift"] | None = _option(
        None, "How the timestep enters a residual block."
    )
    unet_arguments: dict[str, Any] | str | None = _option(
        None, "Any other arguments of UNet2DModel, as YAML or JSON: '{norm_num_groups: 8}'."
    )
    dia_attention: str = _option("lstm", "Attention module: lstm, se, eca, srm, cbam, none; or time, a control.")
    dia_sharing: str = _option("network", "Who shares a module: network, level, block.")
    dia_bridge: str = _option("carry", "How the LSTM's state enters a level: carry, skip, reset.")
    dia_hidden_size: int = _option(64, "Width of the module that the whole network shares.")
    dia_reduction: int = _option(4, "Reduction ratio of bottlenecks.")
    dia_gate_slope: float = _option(1.0, "How fast the gates leave 1 in training, with --dia_init identity.")
    dia_time_conditioned: bool = _option(True, "Start the LSTM's state from the time embedding.")
    dia_init: str = _option("identity", "identity: gates start at 1. paper: gates in (0, 1).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unet_arguments = parse_mapping("unet_arguments", self.unet_arguments)

    def dia_arguments(self) -> dict[str, Any]:
        """What the flags say about the shared attention."""
        return {name: value for name, value in asdict(self).items() if name.startswith("dia_")}

    def unet_flags(self) -> dict[str, Any]:
        """What the flags say about the UNet: those that were given, and all of DIA's."""
        given = ("block_out_channels", "layers_per_block", "dropout", "resnet_time_scale_shift")
        arguments = {name: getattr(self, name) for name in given if getattr(self, name) is not None}
        return (self.unet_arguments or {}) | arguments | self.dia_arguments()


@dataclass
class ObjectiveOptions(_Options):
    """What the UNet learns."""

    counts = "ddpm_num_steps"

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = _option("epsilon", "What the model predicts.")
    ddpm_num_steps: int = _option(1000, "Timesteps of the noise schedule.")
    ddpm_beta_schedule: str = _option("linear", "linear, scaled_linear, squaredcos_cap_v2 (cosine) or sigmoid.")
    rescale_betas_zero_snr: bool = _option(False, "Zero signal at the last timestep (Lin et al. 2023).")
    snr_gamma: float | None = _option(None, "Min-SNR loss weighting (Hang et al. 2023); 5 is usual.")
    label_dropout: float = _option(0.1, "Share of labels replaced by 'no class', for classifier-free guidance.")


@dataclass
class OptimisationOptions(_Options):
    """How the UNet learns it."""

    counts = "num_epochs max_train_steps train_batch_size gradient_accumulation_steps"

    seed: int = _option(0, "Everything random in a run follows from it.")
    num_epochs: int = _option(100, "Passes over the data.")
    max_train_steps: int | None = _option(None, "Optimizer steps, instead of --num_epochs.")
    train_batch_size: int = _option(16, "Images in a batch, on each process.")
    gradient_accumulation_steps: int = _option(1, "Batches in an optimizer step.")
    train_only: Literal["all", "dia"] = _option("all", "'dia' freezes everything but the shared attention.")
    learning_rate: float = _option(1e-4, "Peak learning rate.")
    lr_scheduler: str = _option("cosine", "Schedule of diffusers: linear, cosine, polynomial, constant and others.")
    lr_warmup_steps: int = _option(500, "Steps in which the learning rate rises.")
    adam_beta1: float = _option(0.95, "AdamW's first beta.")
    adam_beta2: float = _option(0.999, "AdamW's second beta.")
    adam_weight_decay: float = _option(1e-6, "AdamW's weight decay.")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] = _option("no", "Precision of the forward pass.")
    compile: bool = _option(False, "Compile the model with torch.compile.")
    enable_xformers_memory_efficient_attention: bool = _option(False, "Use xformers for self-attention.")
    use_ema: bool = _option(False, "Keep an exponential moving average of the weights, and save it as the model.")
    ema_inv_gamma: float = _option(1.0, "EMA decay is 1 - (1 + step / inv_gamma) ** -power, at most max_decay.")
    ema_power: float = _option(0.75, "See --ema_inv_gamma.")
    ema_max_decay: float = _option(0.9999, "See --ema_inv_gamma.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, but is {self.seed}.")


@dataclass
class OutputOptions(_Options):
    """What the run leaves, and when."""

    counts = (
        "save_images_epochs save_model_epochs checkpointing_steps checkpoints_total_limit logging_steps "
        "validation_steps eval_batch_size ddpm_num_inference_steps eval_steps eval_num_images "
        "score_num_images"
    )

    output_dir: str = _option("dia-unet", "Folder for the pipeline and all else that the run leaves.")
    overwrite_output_dir: bool = _option(False, "Start anew in a folder that already holds a run.")
    save_images_epochs: int = _option(10, "Epochs between sample grids.")
    save_model_epochs: int = _option(10, "Epochs between savings of the pipeline.")
    checkpointing_steps: int = _option(500, "Steps between checkpoints, from which a run can be resumed.")
    checkpoints_total_limit: int | None = _option(None, "How many checkpoints to keep; by default all.")
    resume_from_checkpoint: str | None = _option(None, "'latest', or the path of a checkpoint.")
    logging_steps: int = _option(10, "Steps between lines of metrics.jsonl.")
    validation_steps: int = _option(250, "Steps between measurements of the held-out loss.")
    eval_batch_size: int = _option(16, "Images in a sample grid.")
    ddpm_num_inference_steps: int = _option(25, "Denoising steps for the samples of a run.")
    eval_steps: int | None = _option(
        None, "Steps between Frechet distances in --score_features; the best model so far is kept in best/."
    )
    eval_num_images: int = _option(1000, "Images to generate for each of these.")
    score_features: str | None = _option(
        None, "Features for the scores at the end, as for `dia evaluate --features`; none by default."
    )
    score_num_images: int = _option(2000, "Images to generate for the scores at the end.")
    logger: Literal["tensorboard", "wandb", "trackio"] = _option("tensorboard", "Tracker, through accelerate.")
    logging_dir: str = _option("logs", "Folder of the tracker, inside of --output_dir.")
    push_to_hub: bool = _option(False, "Push the pipeline to the Hub at the end.")
    hub_token: str | None = _option(None, "Token for the Hub; by default the one you logged in with.")
    hub_model_id: str | None = _option(None, "Repository on the Hub; by default named after --output_dir.")
    hub_private_repo: bool = _option(False, "Make the repository private.")
    license: str = _option("apache-2.0", "Licence of the model, for its card; a licence identifier of the Hub.")
    local_rank: int = _option(-1, "Set by launchers; accelerate reads it from the environment.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_steps is not None and self.score_features is None:
            raise UsageError("eval_steps needs score_features: the features in which distances are measured.")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


@dataclass
class TrainingConfig:
    """A training run: the parts of its description. In files and on the command line their options lie flat."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def __post_init__(self) -> None:
        if self.model.dia_attention == "srm" and self.optimisation.train_batch_size == 1:
            raise UsageError("dia_attention 'srm' normalises over the batch: it needs a train_batch_size of 2 or more.")
        steps, most = self.output.ddpm_num_inference_steps, self.objective.ddpm_num_steps
        if steps > most:
            raise UsageError(
                f"ddpm_num_inference_steps {steps} is more than ddpm_num_steps {most}: sampling has no more steps than "
                "the model has timesteps."
            )

    @classmethod
    def from_flat(cls, **options: Any) -> "TrainingConfig":
        """The parts, each with those of the options that are its own."""
        parts = {}
        for part in fields(cls):
            names = [item.name for item in fields(part.type)]
            parts[part.name] = part.type(**{name: options.pop(name) for name in names if name in options})
        if options:
            raise TypeError(f"there are no options named {', '.join(options)}")
        return cls(**parts)

    def public_dict(self) -> dict[str, Any]:
        """All options as they may be shown and saved: flat, and without the token."""
        options = {name: value for part in asdict(self).values() for name, value in part.items()}
        del options["hub_token"]
        return options


PARTS = tuple(part.type for part in fields(TrainingConfig))
OPTION_NAMES = frozenset(item.name for part in PARTS for item in fields(part))


def _parse_float(name: str, text: str) -> float:
    """YAML takes numbers without a point, such as 1e-3, for text."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{name} must be a number, but is '{text}'.") from None


def parse_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping as it stands in a file, or as the text of a flag."""
    try:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        parsed = value
    if parsed is not None and not isinstance(parsed, dict):
        raise UsageError(f"{name} must be a mapping, for example '{{norm_num_groups: 8}}', but is '{value}'.")
    return parsed
