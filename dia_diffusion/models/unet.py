"""DIAUNet2DModel: diffusers' UNet2DModel with shared attention on every residual branch."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

# diffusers loads a pipeline's component by the base class that the component's module names: ModelMixin.
from diffusers import ModelMixin, UNet2DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..attention.forward_pass import CarryState, ContextHook, ForwardPass, record_maps
from ..attention.sharing import SharedAttention
from ..errors import UsageError
from ..options.attention import ATTENTION_OPTIONS, attention_parameters
from .branches import Branch, fuse_resnets, gate_branches, resnet_branches

# The prefixes of the attention's weights and arguments.
_DIA_WEIGHTS, _DIA_ARGUMENTS = "dia.", "dia_"
DOWN_BLOCK_TYPES = tuple(
    "DownBlock2D ResnetDownsampleBlock2D AttnDownBlock2D SkipDownBlock2D AttnSkipDownBlock2D KDownBlock2D".split()
)
UP_BLOCK_TYPES = tuple(
    "UpBlock2D ResnetUpsampleBlock2D AttnUpBlock2D SkipUpBlock2D AttnSkipUpBlock2D KUpBlock2D "
    "KCrossAttnUpBlock2D".split()
)


def with_all_arguments(init: Any) -> Any:
    """Decorate the `__init__` of a UNet2DModel with attention, so that its signature names the arguments of the
    UNet2DModel and of the attention beside its own: diffusers' configurations go by the signature."""
    inherited = inspect.signature(UNet2DModel.__init__).parameters.values()
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
    init.__signature__ = inspect.Signature([*inherited, *attention_parameters(_DIA_ARGUMENTS), *own])
    return init


class DIAUNet2DModel(UNet2DModel):
    r"""
    A 2D UNet that takes a noisy sample and a timestep and returns a sample shaped output, with Dense-and-Implicit
    Attention (arXiv 2210.16101): the residual branches of all blocks are gated by one shared attention module, whose
    LSTM carries a state through the down path, the middle and the up path.

    It is a [`~diffusers.UNet2DModel`] in every other respect, takes all of its arguments, and its state dict is that
    of the UNet2DModel plus the keys under `dia.`.

    Parameters:
        dia_attention (`str`, *optional*, defaults to `"lstm"`):
            The attention module: `lstm` (DIA), `se`, `eca`, `srm`, `cbam`, or `none` for a plain UNet2DModel. `time`
            is a control for studies: gates from the time embedding alone.
        dia_sharing (`str`, *optional*, defaults to `"network"`):
            `network`: one module for the whole network. `level`: one for each channel width. `block`: one for each
            block.
        dia_bridge (`str`, *optional*, defaults to `"carry"`):
            How the LSTM's state enters a level: `carry` goes on, `skip` joins it on the way up with the state that
            the matching down level left, `reset` starts anew at each level.
        dia_hidden_size (`int`, *optional*, defaults to 64): Width of the module that the whole network shares.
        dia_reduction (`int`, *optional*, defaults to 4): Reduction ratio of the bottlenecks in the module.
        dia_time_conditioned (`bool`, *optional*, defaults to `True`):
            Whether the LSTM's first state is projected from the time embedding, or zero.
        dia_init (`str`, *optional*, defaults to `"identity"`):
            `identity`: a fresh model computes exactly what the UNet2DModel with the same weights computes. `paper`:
            gates in (0, 1).
        dia_gate_slope (`float`, *optional*, defaults to 1.0):
            Slope s of the gates `2 * sigmoid(s * x)` that `identity` has: how fast they leave 1 in training.

    Raises:
        UsageError: for block types that UNet2DModel cannot run and for DIA arguments without a meaning.
    """

    @register_to_config
    @with_all_arguments
    def __init__(self, *args: Any, dia_time_conditioned: bool = True, **kwargs: Any):
        own = {_DIA_ARGUMENTS + name for name in ATTENTION_OPTIONS}
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        unet = inspect.signature(UNet2DModel.__init__).bind(self, *args, **kwargs)
        unet.apply_defaults()
        arguments = {name: value for name, value in unet.arguments.items() if name != "self"}
        check_block_types(arguments["down_block_types"], arguments["up_block_types"], arguments["in_channels"])
        super().__init__(**arguments)
        fuse_resnets(self)
        self.dia = None
        if self.config.dia_attention == "none":
            return
        branches = self._branches()
        self.dia = self._make_attention(branches)
        self._gated_blocks, _ = gate_branches(self, branches)
        # The time embedding with that of the class, as all residual blocks get it.
        context = ContextHook(self._gated_blocks, "temb", 1)
        self.down_blocks[0].register_forward_pre_hook(context.of_arguments, with_kwargs=True)

    def _branches(self) -> list[Branch]:
        down = [f"down_blocks.{number}" for number in range(len(self.down_blocks))]
        middle = ["mid_block"] if self.mid_block is not None else []
        up = [f"up_blocks.{number}" for number in range(len(self.up_blocks))]
        return resnet_branches(self, [*down, *middle, *up])

    def _make_attention(self, branches: list[Branch]) -> SharedAttention:
        """Return new attention for these branches from the configuration."""
        arguments = {
            name.removeprefix(_DIA_ARGUMENTS): value
            for name, value in self.config.items()
            if name.startswith(_DIA_ARGUMENTS)
        }
        timed, levels = arguments.pop("time_conditioned"), len(self.down_blocks)
        return SharedAttention(
            widths=[branch.width for branch in branches],
            context_size=self.time_embedding.linear_2.out_features if timed else None,
            levels=[branch.level for branch in branches],
            joins={f"up_blocks.{number}": f"down_blocks.{levels - 1 - number}" for number in range(levels)},
            **arguments,
        )

    @classmethod
    def from_unet(cls, unet: UNet2DModel, **dia_arguments: Any) -> "DIAUNet2DModel":
        """Return a DIA-UNet with the weights of a UNet2DModel, and with the default `dia_init` also its output.

        Args:
            unet (`UNet2DModel`): The UNet to start from. It is not changed.
            dia_arguments: Any `dia_*` argument of this class.
        """
        known = inspect.signature(cls.__init__).parameters
        unknown = [name for name in dia_arguments if not name.startswith(_DIA_ARGUMENTS) or name not in known]
        if unknown:
            raise TypeError(f"from_unet() got an unexpected keyword argument '{unknown[0]}'")
        model = _cast(cls.from_config(unet.config, **dia_arguments), unet)
        missing, unexpected = model.load_state_dict(unet.state_dict(), strict=False)
        strangers = [key for key in missing if not key.startswith(_DIA_WEIGHTS)] + unexpected
        if strangers:
            raise UsageError(f"the weights do not fit a UNet2DModel of this configuration, for example {strangers[0]}.")
        return model.train(unet.training)

    def to_unet(self) -> UNet2DModel:
        """Return the UNet2DModel with this model's weights, without DIA. Its output differs unless all gates are 1."""
        config = {name: value for name, value in self.config.items() if not name.startswith(_DIA_ARGUMENTS)}
        unet = _cast(UNet2DModel.from_config(config), self)
        weights = self.state_dict()
        unet.load_state_dict({key: weights[key] for key in weights if not key.startswith(_DIA_WEIGHTS)})
        return unet.train(self.training)

    @functools.wraps(UNet2DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_inputs(*args, **kwargs)
        if self.dia is None:
            return super().forward(*args, **kwargs)
        with ForwardPass(self._gated_blocks, self.dia):
            return super().forward(*args, **kwargs)

    def _check_inputs(
        self, sample: Tensor, timestep: object, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> None:
        """Refuse images and labels at which UNet2DModel fails later, without a reason."""
        factor, (height, width) = self.downsampling_factor, sample.shape[-2:]
        if height % factor or width % factor:
            raise UsageError(
                f"images of {height}x{width} pixels cannot pass the {len(self.down_blocks)} levels of this UNet: "
                f"height and width must be multiples of {factor}."
            )
        if class_labels is not None and self.class_embedding is None:
            raise UsageError("class_labels were given, but this model is not class-conditional.")
        if class_labels is None and self.class_embedding is not None:
            raise UsageError("this model is class-conditional: give class_labels.")

    @torch.no_grad()
    def attention_maps(
        self, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the channel gates of one forward pass.

        Args:
            sample, timestep, class_labels: As for `forward`.

        Returns:
            `dict[str, Tensor]`: for each residual block, in order of execution, its name and its gate `(batch,
            channels)`. Values lie in (0, 2) with `dia_init="identity"` and in (0, 1) with `"paper"`.
        """
        with self.record_attention_maps() as maps:
            self(sample, timestep, class_labels)
        return maps

    def record_attention_maps(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Return a context that yields a dictionary, which holds the result of `attention_maps` after each forward pass
        in this thread: for those who do not call the model themselves."""
        if self.dia is None:
            raise UsageError("this model has no attention maps: dia_attention is 'none'.")
        return record_maps(self._gated_blocks)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint
    ) -> None:
        if self.dia is not None:
            gradient_checkpointing_func = CarryState(self._gated_blocks, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    @property
    def downsampling_factor(self) -> int:
        """Return the number that height and width of the images must be a multiple of."""
        return 2 ** sum(block.downsamplers is not None for block in self.down_blocks)

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: dict | None, files: list, source: Any, loaded_keys: list[str], **kwargs: Any
    ) -> tuple:
        # Weights that a file lacks would stay without values. Fresh ones of the attention go in as if it had them, so
        # that whatever is done about types and devices is done to them as well.
        missing = [key for key in model.state_dict() if key.startswith(_DIA_WEIGHTS) and key not in loaded_keys]
        if missing:
            weights = model._make_attention(model._branches()).state_dict(prefix=_DIA_WEIGHTS)
            fresh = {key: weights[key] for key in missing}
            if state_dict is not None:
                state_dict |= fresh
            else:
                files = [*files, fresh]
        model, missing_keys, *rest = super()._load_pretrained_model(
            model, state_dict, files, source, [*loaded_keys, *missing], **kwargs
        )
        return model, [*missing_keys, *missing], *rest


def check_block_types(down_block_types: tuple[str, ...], up_block_types: tuple[str, ...], in_channels: int) -> None:
    """Refuse block types that UNet2DModel cannot run, and combinations of them that cannot work.

    Raises:
        UsageError: names the block types that work.
    """
    kinds = (("down", down_block_types, DOWN_BLOCK_TYPES), ("up", up_block_types, UP_BLOCK_TYPES))
    for kind, name, known in ((kind, name, known) for kind, names, known in kinds for name in names):
        if name.removeprefix("UNetRes") not in known:
            raise UsageError(f"{kind} block type '{name}' does not work here. Choose among: {', '.join(known)}.")
    if len({name.startswith("K") for name in (*down_block_types, *up_block_types)}) > 1:
        raise UsageError(
            "K blocks join their long skip connections in their own way and do not mix with others: "
            f"use them on every level or on none, but got {down_block_types} and {up_block_types}."
        )
    skips = [name for name in (*down_block_types, *up_block_types) if "Skip" in name]
    if skips and in_channels != 3:
        raise UsageError(f"{skips[0]} is built for 3 channels, but in_channels is {in_channels}: use another block.")


def _cast(model: UNet2DModel, other: UNet2DModel) -> UNet2DModel:
    """Move a model to the device and the data type of another."""
    model = model.to(other.device)
    # A cast that changes nothing makes diffusers warn.
    return model if model.dtype == other.dtype else model.to(dtype=other.dtype)
