"""Options of training: the images, and the UNet with its attention.

Here as in `objective.py` and `output.py`, names, meanings and defaults are those of diffusers' `train_unconditional.py`
wherever that script has the option.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from .attention import ATTENTION_NAMES, AttentionOptions, check_choice
from .fields import Count, Location, Natural, Options, Range, option


@dataclass
class DataOptions(Options):
    """The images of a run, and their preparation."""

    group = "data"

    dataset_name: Location | None = option(
        None, "digits, mnist5k, a data set on the Hub, or a folder that datasets can load.", aliases=("dataset",)
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    train_data_dir: Location | None = option(None, "A folder of images, instead of --dataset_name.")
    cache_dir: Location | None = option(None, "Where data sets and prepared images are kept.")
    image_column: str | None = option(None, "Column of the images; by default the first of type Image.")
    label_column: str | None = option(None, "Column of the classes; by default the first of type ClassLabel.")
    resolution: Count = option(64, "Pixels of height and width.")
    channels: Literal[1, 3] | None = option(None, "1 (grey) or 3 (colour); by default as the images are.")
    center_crop: bool = option(False, "Cut images that are not square in the middle, instead of at random.")
    random_flip: bool = option(False, "Flip images horizontally at random.")
    preserve_input_precision: bool = option(False, "Keep 16 bits of images that have them, instead of 8.")
    on_bad_image: Literal["error", "skip"] = option("error", "What to do about an image that cannot be read.")
    validation_split: Annotated[float, Range(least=0, below=1)] | None = option(
        None,
        "Share of each class to hold out, the same images for every seed, where the data set has no such split; 0 for "
        "none.",
    )
    vae: Location | None = option(
        None, "Train in the latent space of this AutoencoderKL or AutoencoderTiny: a folder or a Hub id."
    )
    class_conditional: bool = option(False, "Condition the model on the labels of the data set.")
    preprocessing_num_workers: Count | None = option(
        None, "Processes that decode the images, once; by default one for each core."
    )
    dataloader_num_workers: Natural = option(0, "Processes that load data; 0 loads in the main process.")


# The arguments of `DIAUNet2DModel` that choose its attention, with their defaults.
DIA_DEFAULTS = {f"dia_{item.name}": item.default for item in fields(AttentionOptions)} | {"dia_time_conditioned": True}


def _dia(name: str) -> Any:
    """Return a `dia_` option with the help and the default of the attention's option of this name."""
    item = AttentionOptions.__dataclass_fields__[name]
    choices = item.metadata.get("choices")
    metavar = f"{{{','.join(choices)}}}" if choices else None
    return option(None, item.metadata["help"], group="attention", shown=item.default, metavar=metavar)


@dataclass
class ModelOptions(Options):
    """The UNet of a run. A `dia_` option is `None` where it is left to the model that the run starts from."""

    group = "model"

    model_config_name_or_path: Location | None = option(
        None, "Configuration of the UNet: a JSON file, a folder or a Hub id, with or without dia_ arguments."
    )
    init_from: Location | None = option(
        None, "Start from the weights of this pipeline or UNet2DModel (a folder or a Hub id), with DIA or without."
    )
    block_out_channels: list[Count] | None = option(None, "Channels of each level; by default chosen by --resolution.")
    layers_per_block: Count | None = option(None, "Residual blocks of each level.", shown=2)
    dropout: Annotated[float, Range(least=0, below=1)] | None = option(None, "Dropout in the residual blocks.", shown=0)
    resnet_time_scale_shift: Literal["default", "scale_shift"] | None = option(
        None, "How the timestep enters a residual block: it is added (default), or it scales and shifts."
    )
    unet_arguments: dict[str, Any] | str | None = option(
        None, "Any other arguments of UNet2DModel, as YAML or JSON: '{norm_num_groups: 8}'."
    )
    dia_attention: str | None = option(
        None,
        "Attention module: lstm (DIA), another one, or none; time is a control that sees no features.",
        group="attention",
        shown="lstm",
        metavar=f"{{{','.join(ATTENTION_NAMES)},none}}",
    )
    dia_sharing: str | None = _dia("sharing")
    dia_bridge: str | None = _dia("bridge")
    dia_hidden_size: Count | None = _dia("hidden_size")
    dia_reduction: Count | None = _dia("reduction")
    dia_gate_slope: Annotated[float, Range(above=0)] | None = _dia("gate_slope")
    dia_time_conditioned: bool | None = option(
        None, "Start the LSTM's state from the time embedding.", group="attention", shown=True
    )
    dia_init: str | None = _dia("init")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: value for name, value in self.dia_options().items() if value is not None}
        if self.init_from is not None or self.model_config_name_or_path is not None:
            # The loaded model may have an attention of its own: leave options open that were not given.
            for name in given.keys() - {"dia_time_conditioned"}:
                if given[name] != "none":
                    check_choice(name.removeprefix("dia_"), given[name])
            return
        for name, value in (DIA_DEFAULTS | given).items():
            setattr(self, name, value)
        if self.dia_attention != "none":
            names = [item.name for item in fields(AttentionOptions)]
            AttentionOptions(**{name: getattr(self, f"dia_{name}") for name in names}).check_place(
                bool(self.dia_time_conditioned)
            )

    def dia_options(self) -> dict[str, Any]:
        """Return the attention's options by their names with `dia_`."""
        return {name: getattr(self, name) for name in DIA_DEFAULTS}

    def unet_flags(self) -> dict[str, Any]:
        """Return the arguments of the UNet that were given by options of their own."""
        names = ("block_out_channels", "layers_per_block", "dropout", "resnet_time_scale_shift")
        options = {name: getattr(self, name) for name in names} | self.dia_options()
        return {name: value for name, value in options.items() if value is not None}

    def as_built(self, config: Mapping[str, Any]) -> "ModelOptions":
        """Return the options completed by the configuration of the UNet that was built, for the record."""
        return replace(self, **{name: config[name] for name in DIA_DEFAULTS})
