"""The description of a training run, in parts, from which the flags, the YAML file and the saved record come.

Names, meanings and defaults are those of diffusers' `train_unconditional.py` wherever that script has the option.
"""

import inspect
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from ..errors import UsageError
from ..models import DIAUNet2DModel
from ..ranges import COUNT, NATURAL, SEED, Range
from .objectives import OBJECTIVES, Objective
from .values import PATH, read_value

# What the options may be: each number has its range.
Count = Annotated[int, COUNT]
Natural = Annotated[int, NATURAL]
Share = Annotated[float, Range(least=0, most=1)]
# Where something lies: `~` is the home of the user.
Location = Annotated[str, PATH]


def _option(default: Any, text: str, **flag: Any) -> Any:
    """A field, its explanation, and what argparse should know about its flag besides."""
    return field(default=default, metadata={"help": text, **flag})


class _Options:
    """A part of the description, which brings its values to the types of its fields, and refuses those that are not
    within their ranges."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            setattr(self, name, read_value(name, getattr(self, name), hint))


@dataclass
class DataOptions(_Options):
    """Which images, and how they are prepared."""

    dataset_name: Location | None = _option(
        None, "digits, mnist5k, a data set on the Hub, or a folder that datasets can load."
    )
    dataset_config_name: str | None = _option(None, "Configuration of a data set that has several.")
    train_data_dir: Location | None = _option(None, "A folder of images, instead of --dataset_name.")
    cache_dir: Location | None = _option(None, "Where data sets and prepared images are kept.")
    image_column: str | None = _option(None, "Column of the images; by default the first of type Image.")
    label_column: str | None = _option(None, "Column of the classes; by default the first of type ClassLabel.")
    resolution: Count = _option(64, "Pixels of height and width.")
    channels: Literal[1, 3] | None = _option(None, "1 (grey) or 3 (colour); by default as the images are.")
    center_crop: bool = _option(False, "Cut images that are not square in the middle, instead of at random.")
    random_flip: bool = _option(False, "Flip images horizontally at random.")
    preserve_input_precision: bool = _option(False, "Keep 16 bits of images that have them, instead of 8.")
    on_bad_image: Literal["error", "skip"] = _option("error", "What to do about an image that cannot be read.")
    vae: Location | None = _option(
        None, "Train in the latent space of this AutoencoderKL or AutoencoderTiny: a folder or a Hub id."
    )
    class_conditional: bool = _option(False, "Condition the model on the labels of the data set.")
    preprocessing_num_workers: Count | None = _option(
        None, "Processes that decode the images, once; by default one for each core."
    )
    dataloader_num_workers: Natural = _option(0, "Processes that load data; 0 loads in the main process.")


@dataclass
class ModelOptions(_Options):
    """Which UNet."""

    model_config_name_or_path: Location | None = _option(
        None, "Configuration of the UNet: a JSON file, a folder or a Hub id, with or without dia_ arguments."
    )
    init_from: Location | None = _option(
        None, "Start from the weights of this pipeline or UNet2DModel (a folder or a Hub id), with DIA or without."
    )
    block_out_channels: list[Count] | None = _option(None, "Channels of each level; by default chosen by --resolution.")
    layers_per_block: Count | None = _option(None, "Residual blocks of each level.")
    dropout: Annotated[float, Range(least=0, below=1)] | None = _option(None, "Dropout in the residual blocks.")
    resnet_time_scale_shift: Literal["default", "scale_shift"] | None = _option(
        None, "How the timestep enters a residual block."
    )
    unet_arguments: dict[str, Any] | str | None = _option(
        None, "Any other arguments of UNet2DModel, as YAML or JSON: '{norm_num_groups: 8}'."
    )
    dia_attention: str | None = _option(
        None, "Attention module: lstm (the default), se, eca, srm, cbam, none; or time, a control."
    )
    dia_sharing: str | None = _option(None, "Who shares a module: network (the default), level, block.")
    dia_bridge: str | None = _option(None, "How the LSTM's state enters a level: carry (the default), skip, reset.")
    dia_hidden_size: Count | None = _option(None, "Width of the module that the whole network shares, by default 64.")
    dia_reduction: Count | None = _option(None, "Reduction ratio of bottlenecks, by default 4.")
    dia_gate_slope: Annotated[float, Range(above=0)] | None = _option(
        None, "How fast the gates leave 1 in training, with --dia_init identity; by default 1."
    )
    dia_time_conditioned: bool | None = _option(
        None, "Start the LSTM's state from the time embedding, as by default.", nargs="?", const=True
    )
    dia_init: str | None = _option(None, "identity (the default): gates start at 1. paper: gates in (0, 1).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is None and self.model_config_name_or_path is None:
            # A model that is named may have an attention of its own: there, what was not given stays open.
            for name in self.dia_names():
                if getattr(self, name) is None:
                    setattr(self, name, inspect.signature(DIAUNet2DModel.__init__).parameters[name].default)

    @classmethod
    def dia_names(cls) -> list[str]:
        return [item.name for item in fields(cls) if item.name.startswith("dia_")]

    def unet_flags(self) -> dict[str, Any]:
        """What was given about the UNet by options of its own."""
        names = ["block_out_channels", "layers_per_block", "dropout", "resnet_time_scale_shift", *self.dia_names()]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def as_built(self, unet: DIAUNet2DModel) -> "ModelOptions":
        """What was given, completed by what the model is: for the record."""
        return replace(self, **{name: unet.config[name] for name in self.dia_names()})


@dataclass
class ObjectiveOptions(_Options):
    """What the UNet learns. Options that belong to one objective have its default, and are `None` for the others."""

    objective: Literal[tuple(OBJECTIVES)] = _option(
        "ddpm", "ddpm: noise by a schedule of betas. edm: Karras et al. 2022. flow: flow matching on straight paths."
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = _option(
        None, "ddpm: what the model predicts, by default epsilon."
    )
    ddpm_num_steps: Annotated[int, Range(least=2)] | None = _option(
        None, "ddpm: timesteps of the noise schedule, by default 1000."
    )
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] | None = _option(
        None, "ddpm: how noise grows, by default linear; squaredcos_cap_v2 is the cosine schedule."
    )
    rescale_betas_zero_snr: bool | None = _option(
        None, "ddpm: zero signal at the last timestep (Lin et al. 2023).", nargs="?", const=True
    )
    snr_gamma: Annotated[float, Range(above=0)] | None = _option(
        None, "ddpm: Min-SNR loss weighting (Hang et al. 2023); 5 is usual."
    )
    sigma_data: Annotated[float, Range(least=1e-3, most=1e3)] | None = _option(
        None, "edm: standard deviation of the images in [-1, 1]; by default it is measured."
    )
    p_mean: Annotated[float, Range(least=-5, most=5)] | None = _option(
        None, "edm: mean of ln(sigma) in training, by default -1.2."
    )
    p_std: Annotated[float, Range(above=0, most=5)] | None = _option(
        None, "edm: standard deviation of ln(sigma) in training, by default 1.2."
    )
    weighting_scheme: Literal["logit_normal", "none"] | None = _option(
        None, "flow: distribution of times in training, logit_normal (the default); none: uniform."
    )
    logit_mean: Annotated[float, Range(least=-10, most=10)] | None = _option(
        None, "flow: mean of the logit of the time, by default 0."
    )
    logit_std: Annotated[float, Range(above=0, most=10)] | None = _option(
        None, "flow: standard deviation of the logit of the time, by default 1."
    )
    label_dropout: Share = _option(0.1, "Share of labels replaced by 'no class', for classifier-free guidance.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.of_others(self.objective):
            if (value := getattr(self, name)) is not None:
                owners = [key for key, kind in OBJECTIVES.items() if name in kind.option_names()]
                raise UsageError(
                    f"{name} {value} has no meaning with --objective {self.objective}: it belongs to "
                    f"{', '.join(owners)}. Leave it out."
                )
        for name, value in asdict(self.make()).items():
            setattr(self, name, value)

    @staticmethod
    def of_others(objective: str) -> list[str]:
        """The options that belong to other objectives than this one."""
        names = [name for kind in OBJECTIVES.values() for name in kind.option_names()]
        return [name for name in names if name not in OBJECTIVES[objective].option_names()]

    def make(self) -> Objective:
        """The objective that they describe.

        Raises:
            UsageError: if the options do not go together.
        """
        kind = OBJECTIVES[self.objective]
        given = {name: getattr(self, name) for name in kind.option_names()}
        return kind(**{name: value for name, value in given.items() if value is not None})

    def as_built(self, objective: Objective) -> "ObjectiveOptions":
        """What was given, completed by what the objective is: for the record."""
        return replace(self, **asdict(objective))


@dataclass
class OptimisationOptions(_Options):
    """How the UNet learns it."""

    seed: Annotated[int, SEED] = _option(0, "Everything random in a run follows from it.")
    num_epochs: Count = _option(100, "Passes over the data.")
    max_train_steps: Count | None = _option(None, "Optimizer steps, instead of --num_epochs.")
    train_batch_size: Count = _option(16, "Images in a batch, on each process.")
    gradient_accumulation_steps: Count | None = _option(
        None, "Batches in an optimizer step; by default those of `accelerate launch`, or 1."
    )
    train_only: Literal["all", "dia"] = _option("all", "'dia' freezes everything but the shared attention.")
    learning_rate: Annotated[float, NATURAL] = _option(1e-4, "Peak learning rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _option("cosine", "Schedule of the learning rate, as diffusers has it.")
    lr_warmup_steps: Natural = _option(500, "Steps in which the learning rate rises.")
    adam_beta1: Annotated[float, Range(least=0, below=1)] = _option(0.95, "AdamW's first beta.")
    adam_beta2: Annotated[float, Range(least=0, below=1)] = _option(0.999, "AdamW's second beta.")
    adam_weight_decay: Annotated[float, NATURAL] = _option(1e-6, "AdamW's weight decay.")
    adam_epsilon: Annotated[float, Range(above=0)] = _option(1e-8, "AdamW's epsilon.")
    max_grad_norm: Annotated[float, NATURAL] = _option(1.0, "Gradients are clipped to this norm; 0: they are not.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        None, "Precision of the forward pass; by default that of `accelerate launch`, or no."
    )
    compile: bool = _option(False, "Compile the model with torch.compile.")
    compile_mode: Literal["default", "reduce-overhead"] = _option(
        "default", "How --compile does it: reduce-overhead replays CUDA graphs on a GPU."
    )
    enable_xformers_memory_efficient_attention: bool = _option(False, "Use xformers for self-attention.")
    use_ema: bool = _option(False, "Keep an exponential moving average of the weights, and save it as the model.")
    ema_inv_gamma: Annotated[float, Range(above=0)] = _option(
        1.0, "EMA decay is 1 - (1 + step / inv_gamma) ** -power, at most max_decay."
    )
    ema_power: Annotated[float, NATURAL] = _option(0.75, "See --ema_inv_gamma.")
    ema_max_decay: Share = _option(0.9999, "See --ema_inv_gamma.")

    def __post_init__(self) -> None:
        if self.compile_mode != "default" and not self.compile:
            raise UsageError(f"compile_mode {self.compile_mode} says how to compile: add --compile.")
        for name, otherwise in (("mixed_precision", "no"), ("gradient_accumulation_steps", 1)):
            if getattr(self, name) is None:
                setattr(self, name, os.environ.get(f"ACCELERATE_{name.upper()}", otherwise))
        super().__post_init__()


@dataclass
class OutputOptions(_Options):
    """What the run leaves, and when."""

    output_dir: Location = _option("dia-unet", "Folder for the pipeline and all else that the run leaves.")
    overwrite_output_dir: bool = _option(False, "Start anew in a folder that already holds a run.")
    save_images_epochs: Count = _option(10, "Epochs between sample grids.")
    save_model_epochs: Count = _option(10, "Epochs between savings of the pipeline.")
    checkpointing_steps: Count = _option(500, "Steps between checkpoints, from which a run can be resumed.")
    checkpoints_total_limit: Count | None = _option(None, "How many checkpoints to keep; by default all.")
    resume_from_checkpoint: Location | None = _option(None, "'latest', or the path of a checkpoint.")
    logging_steps: Count = _option(10, "Steps between lines of metrics.jsonl.")
    validation_steps: Count = _option(250, "Steps between measurements of the held-out loss.")
    eval_batch_size: Count = _option(16, "Images in a sample grid.")
    ddpm_num_inference_steps: Count = _option(25, "Denoising steps for the samples of a run.")
    eval_steps: Count | None = _option(
        None, "Steps between Frechet distances in --score_features; the best model so far is kept in best/."
    )
    eval_num_images: Annotated[int, Range(least=2)] = _option(1000, "Images to generate for each of these.")
    score_features: Location | None = _option(
        None, "Features for the scores at the end, as for `dia evaluate --features`; none by default."
    )
    score_num_images: Annotated[int, Range(least=2)] = _option(2000, "Images to generate for the scores at the end.")
    logger: Literal["tensorboard", "wandb", "trackio"] = _option("tensorboard", "Tracker, through accelerate.")
    logging_dir: Location = _option("logs", "Folder of the tracker, inside of --output_dir.")
    push_to_hub: bool = _option(False, "Push the pipeline to the Hub at the end.")
    hub_token: str | None = _option(None, "Token for the Hub; by default the one you logged in with.")
    hub_model_id: str | None = _option(None, "Repository on the Hub; by default named after --output_dir.")
    hub_private_repo: bool = _option(False, "Make the repository private.")
    license: str = _option("apache-2.0", "Licence of the model, for its card; a licence identifier of the Hub.")
    local_rank: Annotated[int, Range(least=-1)] = _option(
        -1, "Set by launchers; accelerate reads it from the environment."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_steps is not None and self.score_features is None:
            raise UsageError("eval_steps needs score_features: the features in which distances are measured.")

    @property
    def folder(self) -> Path:
        path = Path(self.output_dir)
        # The model is named after it, and `.` is no name.
        return path if path.name not in ("", "..") else path.resolve()


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
        steps, most = self.output.ddpm_num_inference_steps, self.objective.make().num_timesteps
        if most is not None and steps > most:
            raise UsageError(
                f"ddpm_num_inference_steps {steps} is more than ddpm_num_steps {most}: a sampler has no more steps "
                "than the noise schedule."
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
MODEL_OPTION_NAMES = frozenset(item.name for item in fields(ModelOptions))
