"""Options that say which UNet."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from .attention import AttentionOptions
from .fields import Count, Location, Options, Range, option

# What a `dia_` argument of the UNet is by default.
DIA_DEFAULTS = {f"dia_{item.name}": item.default for item in fields(AttentionOptions)} | {"dia_time_conditioned": True}


@dataclass
class ModelOptions(Options):
    """Which UNet."""

    model_config_name_or_path: Location | None = option(
        None, "Configuration of the UNet: a JSON file, a folder or a Hub id, with or without dia_ arguments."
    )
    init_from: Location | None = option(
        None, "Start from the weights of this pipeline or UNet2DModel (a folder or a Hub id), with DIA or without."
    )
    block_out_channels: list[Count] | None = option(None, "Channels of each level; by default chosen by --resolution.")
    layers_per_block: Count | None = option(None, "Residual blocks of each level.")
    dropout: Annotated[float, Range(least=0, below=1)] | None = option(None, "Dropout in the residual blocks.")
    resnet_time_scale_shift: Literal["default", "scale_shift"] | None = option(
        None, "How the timestep enters a residual block."
    )
    unet_arguments: dict[str, Any] | str | None = option(
        None, "Any other arguments of UNet2DModel, as YAML or JSON: '{norm_num_groups: 8}'."
    )
    dia_attention: str | None = option(
        None, "Attention module: lstm (the default), se, eca, srm, cbam, none; or time, a control."
    )
    dia_sharing: str | None = option(None, "Who shares a module: network (the default), level, block.")
    dia_bridge: str | None = option(None, "How the LSTM's state enters a level: carry (the default), skip, reset.")
    dia_hidden_size: Count | None = option(None, "Width of the module that the whole network shares, by default 64.")
    dia_reduction: Count | None = option(None, "Reduction ratio of bottlenecks, by default 4.")
    dia_gate_slope: Annotated[float, Range(above=0)] | None = option(
        None, "How fast the gates leave 1 in training, with --dia_init identity; by default 1."
    )
    dia_time_conditioned: bool | None = option(
        None, "Start the LSTM's state from the time embedding, as by default.", nargs="?", const=True
    )
    dia_init: str | None = option(None, "identity (the default): gates start at 1. paper: gates in (0, 1).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is None and self.model_config_name_or_path is None:
            # A model that is named may have an attention of its own: there, what was not given stays open.
            for name in self.dia_names():
                if getattr(self, name) is None:
                    setattr(self, name, DIA_DEFAULTS[name])

    @classmethod
    def dia_names(cls) -> list[str]:
        return [item.name for item in fields(cls) if item.name.startswith("dia_")]

    def unet_flags(self) -> dict[str, Any]:
        """What was given about the UNet by options of its own."""
        names = ["block_out_channels", "layers_per_block", "dropout", "resnet_time_scale_shift", *self.dia_names()]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def as_built(self, config: Mapping[str, Any]) -> "ModelOptions":
        """Return the options completed by the configuration of the UNet that was built, for the record."""
        return replace(self, **{name: config[name] for name in self.dia_names()})
