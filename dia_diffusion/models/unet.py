"""DIAUNet2DModel: diffusers' UNet2DModel with shared attention on every residual branch."""

import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

# diffusers loads a pipeline's component by the base class that the component's module names: ModelMixin.
from diffusers import ModelMixin, UNet2DModel  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from .blocks import check_block_types, gate_residual_blocks
from ..errors import UsageError
from ..attention.sharing import AttentionState, SharedAttention

_DIA_PREFIX = "dia."


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
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        dia_attention: str = "lstm",
        dia_sharing: str = "network",
        dia_bridge: str = "carry",
        dia_hidden_size: int = 64,
        dia_reduction: int = 4,
        dia_time_conditioned: bool = True,
        dia_init: str = "identity",
        dia_gate_slope: float = 1.0,
    ):
        check_block_types(down_block_types, up_block_types, in_channels)
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        widths = gate_residual_blocks(self)
        self._block_names = tuple(widths)
        self.dia = None
        if dia_attention == "none":
            return
        self.dia = SharedAttention(
            widths=tuple(widths.values()),
            attention=dia_attention,
            sharing=dia_sharing,
            bridge=dia_bridge,
            hidden_size=dia_hidden_size,
            reduction=dia_reduction,
            init=dia_init,
            gate_slope=dia_gate_slope,
            context_size=self.time_embedding.linear_2.out_features if dia_time_conditioned else None,
        )

    @classmethod
    def from_unet(cls, unet: UNet2DModel, **dia_arguments: Any) -> "DIAUNet2DModel":
        """A DIA-UNet with the weights of a UNet2DModel, and with the default `dia_init` also its output.

        Args:
            unet (`UNet2DModel`): The UNet to start from. It is not changed.
            dia_arguments: Any `dia_*` argument of this class.
        """
        unknown = [name for name in dia_arguments if not name.startswith("dia_") or name not in _arguments(cls)]
        if unknown:
            raise TypeError(f"from_unet() got an unexpected keyword argument '{unknown[0]}'")
        model = _cast(cls.from_config(unet.config, **dia_arguments), unet)
        missing, unexpected = model.load_state_dict(unet.state_dict(), strict=False)
        strangers = [key for key in missing if not key.startswith(_DIA_PREFIX)] + unexpected
        if strangers:
            raise UsageError(f"the weights do not fit a UNet2DModel of this configuration, for example {strangers[0]}.")
        return model.train(unet.training)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, output_loading_info: bool = False, **kwargs: Any
    ) -> "DIAUNet2DModel":
        """Loads a saved model as [`~diffusers.ModelMixin.from_pretrained`] does, with the same arguments.

        A UNet2DModel saved without DIA loads too: its DIA starts fresh, as in `from_unet`.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if any(key.startswith(_DIA_PREFIX) for key in info["missing_keys"]):
            # diffusers leaves weights that a file lacks uninitialised.
            fresh = cls.from_config(model.config).dia
            model.dia = fresh.to(device=model.device, dtype=model.dtype).eval()
        return (model, info) if output_loading_info else model

    def to_unet(self) -> UNet2DModel:
        """The UNet2DModel with this model's weights, without DIA. Its output differs unless all gates are 1."""
        config = {name: value for name, value in self.config.items() if not name.startswith("dia_")}
        unet = _cast(UNet2DModel.from_config(config), self)
        weights = self.state_dict()
        unet.load_state_dict({key: weights[key] for key in weights if not key.startswith(_DIA_PREFIX)})
        return unet.train(self.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The [`DIAUNet2DModel`] forward method.

        Args:
            sample (`Tensor` of shape `(batch, channel, height, width)`):
                The noisy input. Height and width must be divisible by the product of all downsampling.
            timestep (`Tensor` or `float` or `int`): The timestep of each image, or one for all.
            class_labels (`Tensor` of shape `(batch,)`, *optional*): Class labels for conditioning.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `UNet2DOutput` or a tuple.

        Returns:
            `UNet2DOutput` or `tuple`: the prediction, of the shape of `sample`.
        """
        self._check_size(sample)
        output, _ = self._predict(sample, timestep, class_labels)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    @torch.no_grad()
    def attention_maps(
        self, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The channel gates of one forward pass.

        Args:
            sample, timestep, class_labels: As for `forward`.

        Returns:
            `dict[str, Tensor]`: for each residual block, in order of execution, its name and its gate `(batch,
            channels)`. Values lie in (0, 2) with `dia_init="identity"` and in (0, 1) with `"paper"`.
        """
        if self.dia is None:
            raise UsageError("this model has no attention maps: dia_attention is 'none'.")
        self._check_size(sample)
        _, state = self._predict(sample, timestep, class_labels, record=True)
        return dict(zip(self._block_names, state.maps, strict=True))

    def _predict(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None,
        record: bool = False,
    ) -> tuple[Tensor, AttentionState | None]:
        # 0. center input if necessary
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        # 1. time, and the attention state that starts from it
        timesteps = self._broadcast(timestep, sample)
        emb = self._embed(timesteps, class_labels)
        state = None if self.dia is None else self.dia.initial_state(emb, record=record)

        # 2. pre-process
        skip_sample = sample
        sample = self.conv_in(sample)

        # 3. down
        residuals, left = (sample,), []
        for down_block in self.down_blocks:
            state = self._enter_level(state, emb)
            sample, block_residuals, skip_sample, state = down_block(sample, emb, self.dia, state, skip_sample)
            residuals += block_residuals
            left.append(state)

        # 4. mid
        if self.mid_block is not None:
            state = self._enter_level(state, emb)
            sample, state = self.mid_block(sample, emb, self.dia, state)

        # 5. up
        skip_sample = None
        for up_block in self.up_blocks:
            state = self._enter_level(state, emb, left.pop())
            taken, residuals = residuals[-len(up_block.resnets) :], residuals[: -len(up_block.resnets)]
            sample, skip_sample, state = up_block(sample, taken, emb, self.dia, state, skip_sample)

        # 6. post-process
        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        if skip_sample is not None:
            sample = sample + skip_sample
        if self.config.time_embedding_type == "fourier":
            sample = sample / timesteps.reshape(-1, *[1] * (sample.ndim - 1))
        return sample, state

    def _enter_level(
        self, state: AttentionState | None, emb: Tensor, left: AttentionState | None = None
    ) -> AttentionState | None:
        return None if self.dia is None else self.dia.enter_level(state, emb, left)

    def _broadcast(self, timestep: Tensor | float | int, sample: Tensor) -> Tensor:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        # UNet2DModel truncates a Python float to an integer too.
        return timestep.to(sample.device).reshape(-1).expand(sample.shape[0])

    def _embed(self, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        emb = self.time_embedding(self.time_proj(timesteps).to(dtype=self.dtype))
        if self.class_embedding is None:
            if class_labels is not None:
                raise UsageError("class_labels were given, but this model is not class-conditional.")
            return emb
        if class_labels is None:
            raise UsageError("this model is class-conditional: give class_labels.")
        if self.config.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels)
        return emb + self.class_embedding(class_labels).to(dtype=self.dtype)

    @property
    def downsampling_factor(self) -> int:
        """What height and width of the images must be a multiple of."""
        return 2 ** sum(block.downsamplers is not None for block in self.down_blocks)

    def _check_size(self, sample: Tensor) -> None:
        factor = self.downsampling_factor
        if sample.shape[-1] % factor or sample.shape[-2] % factor:
            raise UsageError(
                f"images of {sample.shape[-2]}x{sample.shape[-1]} pixels cannot pass the {len(self.down_blocks)} "
                f"levels of this UNet: height and width must be multiples of {factor}."
            )


def _arguments(cls: type) -> Mapping[str, Any]:
    return inspect.signature(cls.__init__).parameters


def _cast(model: UNet2DModel, other: UNet2DModel) -> UNet2DModel:
    """Moves a model to the device and the data type of another."""
    model = model.to(other.device)
    # A cast that changes nothing makes diffusers warn.
    return model if model.dtype == other.dtype else model.to(dtype=other.dtype)
