"""The blocks of diffusers' UNet2DModel with attention on every residual branch.

Each class here is a block of diffusers with the same submodules and weights, and a `forward` that also takes the
attention module and its state (both `None` for no attention), and gives the next state back. `gate_residual_blocks`
turns the blocks of a UNet into these.
"""

from itertools import zip_longest

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets import unet_2d_blocks as blocks
from torch import Tensor, nn

from ..errors import UsageError
from .residual import DIAResnetBlock2D, DIAResnetBlockCondNorm2D, GatedResnet
from ..attention.sharing import AttentionState, SharedAttention


class _GatedBlock:
    """What the blocks of all three paths have in common."""

    def _run(
        self,
        resnet: nn.Module,
        hidden_states: Tensor,
        temb: Tensor,
        attention: SharedAttention | None,
        state: AttentionState | None,
    ) -> tuple[Tensor, AttentionState | None]:
        if torch.is_grad_enabled() and getattr(self, "gradient_checkpointing", False):
            return self._gradient_checkpointing_func(resnet, hidden_states, temb, attention, state)
        return resnet(hidden_states, temb, attention, state)

    def _resample(
        self,
        samplers: nn.ModuleList,
        hidden_states: Tensor,
        temb: Tensor,
        attention: SharedAttention | None,
        state: AttentionState | None,
    ) -> tuple[Tensor, AttentionState | None]:
        for sampler in samplers:
            if isinstance(sampler, ResnetBlock2D):
                hidden_states, state = self._run(sampler, hidden_states, temb, attention, state)
            else:
                hidden_states = sampler(hidden_states)
        return hidden_states, state

    def _self_attention(self, index: int, hidden_states: Tensor, temb: Tensor) -> Tensor:
        attentions = getattr(self, "attentions", ())
        if index < len(attentions) and attentions[index] is not None:
            return attentions[index](hidden_states)
        return hidden_states


class _GatedDownBlock(_GatedBlock):
    keeps_downsampled = True

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        attention: SharedAttention | None,
        state: AttentionState | None,
        skip_sample: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, AttentionState | None]:
        """Returns the features, those for the long skip connections, the skip sample and the next state."""
        residuals = ()
        for index, resnet in enumerate(self.resnets):
            hidden_states, state = self._run(resnet, hidden_states, temb, attention, state)
            hidden_states = self._self_attention(index, hidden_states, temb)
            residuals += (hidden_states,)
        if self.downsamplers is not None:
            hidden_states, skip_sample, state = self._downsample(hidden_states, temb, attention, state, skip_sample)
            residuals += (hidden_states,) if self.keeps_downsampled else ()
        return hidden_states, residuals, skip_sample, state

    def _downsample(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        attention: SharedAttention | None,
        state: AttentionState | None,
        skip_sample: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        hidden_states, state = self._resample(self.downsamplers, hidden_states, temb, attention, state)
        return hidden_states, skip_sample, state


class _GatedSkipDownBlock(_GatedDownBlock):
    def _downsample(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        attention: SharedAttention | None,
        state: AttentionState | None,
        skip_sample: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        hidden_states, state = self._run(self.resnet_down, hidden_states, temb, attention, state)
        for downsampler in self.downsamplers:
            skip_sample = downsampler(skip_sample)
        return self.skip_conv(skip_sample) + hidden_states, skip_sample, state


class _GatedKDownBlock(_GatedDownBlock):
    # The downsampled features are not among those that a K block passes over its long skip connections.
    keeps_downsampled = False


class _GatedUpBlock(_GatedBlock):
    def forward(
        self,
        hidden_states: Tensor,
        residuals: tuple[Tensor, ...],
        temb: Tensor,
        attention: SharedAttention | None,
        state: AttentionState | None,
        skip_sample: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        """Returns the features, the skip sample and the next state. `residuals` are consumed from the end."""
        for index, (resnet, residual) in enumerate(zip_longest(self.resnets, self._order(residuals))):
            if residual is not None:
                hidden_states = torch.cat([hidden_states, residual], dim=1)
            hidden_states, state = self._run(resnet, hidden_states, temb, attention, state)
            hidden_states = self._self_attention(index, hidden_states, temb)
        return self._upsample(hidden_states, temb, attention, state, skip_sample)

    def _order(self, residuals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return residuals[::-1]

    def _upsample(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        attention: SharedAttention | None,
        state: AttentionState | None,
        skip_sample: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        if self.upsamplers is not None:
            hidden_states, state = self._resample(self.upsamplers, hidden_states, temb, attention, state)
        return hidden_states, skip_sample, state


class _GatedSkipUpBlock(_GatedUpBlock):
    def _self_attention(self, index: int, hidden_states: Tensor, temb: Tensor) -> Tensor:
        # These blocks attend once, after their last residual block.
        if index < len(self.resnets) - 1:
            return hidden_states
        return super()._self_attention(0, hidden_states, temb)

    def _upsample(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        attention: SharedAttention | None,
        state: AttentionState | None,
        skip_sample: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        skip_sample = 0 if skip_sample is None else self.upsampler(skip_sample)
        if self.resnet_up is not None:
            skip_sample = skip_sample + self.skip_conv(self.act(self.skip_norm(hidden_states)))
            hidden_states, state = self._run(self.resnet_up, hidden_states, temb, attention, state)
        return hidden_states, skip_sample, state


class _GatedKUpBlock(_GatedUpBlock):
    def _order(self, residuals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A K block joins only the last of its long skip connections, before its first residual block.
        return residuals[-1:]

    def _self_attention(self, index: int, hidden_states: Tensor, temb: Tensor) -> Tensor:
        if hasattr(self, "attentions"):
            return self.attentions[index](hidden_states, emb=temb)
        return hidden_states


class DIAUNetMidBlock2D(_GatedBlock, blocks.UNetMidBlock2D):
    def forward(
        self, hidden_states: Tensor, temb: Tensor, attention: SharedAttention | None, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState | None]:
        for index, resnet in enumerate(self.resnets):
            if index > 0:
                hidden_states = self._self_attention(index - 1, hidden_states, temb)
            hidden_states, state = self._run(resnet, hidden_states, temb, attention, state)
        return hidden_states, state


class DIADownBlock2D(_GatedDownBlock, blocks.DownBlock2D):
    pass


class DIAResnetDownsampleBlock2D(_GatedDownBlock, blocks.ResnetDownsampleBlock2D):
    pass


class DIAAttnDownBlock2D(_GatedDownBlock, blocks.AttnDownBlock2D):
    pass


class DIASkipDownBlock2D(_GatedSkipDownBlock, blocks.SkipDownBlock2D):
    pass


class DIAAttnSkipDownBlock2D(_GatedSkipDownBlock, blocks.AttnSkipDownBlock2D):
    pass


class DIAKDownBlock2D(_GatedKDownBlock, blocks.KDownBlock2D):
    pass


class DIAUpBlock2D(_GatedUpBlock, blocks.UpBlock2D):
    pass


class DIAResnetUpsampleBlock2D(_GatedUpBlock, blocks.ResnetUpsampleBlock2D):
    pass


class DIAAttnUpBlock2D(_GatedUpBlock, blocks.AttnUpBlock2D):
    pass


class DIASkipUpBlock2D(_GatedSkipUpBlock, blocks.SkipUpBlock2D):
    pass


class DIAAttnSkipUpBlock2D(_GatedSkipUpBlock, blocks.AttnSkipUpBlock2D):
    pass


class DIAKUpBlock2D(_GatedKUpBlock, blocks.KUpBlock2D):
    pass


class DIAKCrossAttnUpBlock2D(_GatedKUpBlock, blocks.KCrossAttnUpBlock2D):
    pass


_DOWN_BLOCKS = (
    DIADownBlock2D,
    DIAResnetDownsampleBlock2D,
    DIAAttnDownBlock2D,
    DIASkipDownBlock2D,
    DIAAttnSkipDownBlock2D,
    DIAKDownBlock2D,
)
_UP_BLOCKS = (
    DIAUpBlock2D,
    DIAResnetUpsampleBlock2D,
    DIAAttnUpBlock2D,
    DIASkipUpBlock2D,
    DIAAttnSkipUpBlock2D,
    DIAKUpBlock2D,
    DIAKCrossAttnUpBlock2D,
)
_OTHERS = (DIAResnetBlock2D, DIAResnetBlockCondNorm2D, DIAUNetMidBlock2D)
# Each class names its form in diffusers as its last base.
_GATED_CLASSES = {gated.__bases__[-1]: gated for gated in (*_DOWN_BLOCKS, *_UP_BLOCKS, *_OTHERS)}

DOWN_BLOCK_TYPES = tuple(gated.__bases__[-1].__name__ for gated in _DOWN_BLOCKS)
UP_BLOCK_TYPES = tuple(gated.__bases__[-1].__name__ for gated in _UP_BLOCKS)


def check_block_types(down_block_types: tuple[str, ...], up_block_types: tuple[str, ...], in_channels: int) -> None:
    """Refuses block types that UNet2DModel cannot run, and combinations of them that cannot work.

    Raises:
        UsageError: names the block types that work.
    """
    for kind, names, known in (
        ("down", down_block_types, DOWN_BLOCK_TYPES),
        ("up", up_block_types, UP_BLOCK_TYPES),
    ):
        for name in names:
            if name.removeprefix("UNetRes") not in known:
                raise UsageError(f"{kind} block type '{name}' does not work here. Choose among: {', '.join(known)}.")
    down_is_k = {name.startswith("K") for name in down_block_types}
    up_is_k = {name.startswith("K") for name in up_block_types}
    if len(down_is_k | up_is_k) > 1:
        raise UsageError(
            "K blocks join their long skip connections in their own way and do not mix with others: "
            f"use them on every level or on none, but got {down_block_types} and {up_block_types}."
        )
    skips = [name for name in (*down_block_types, *up_block_types) if "Skip" in name]
    if skips and in_channels != 3:
        raise UsageError(f"{skips[0]} is built for 3 channels, but in_channels is {in_channels}: use another block.")


def gate_residual_blocks(unet: nn.Module) -> dict[str, int]:
    """Gives every residual block of a UNet2DModel its attention form, in place; weights and names stay as they are.

    Returns:
        `dict[str, int]`: name of each residual block, in order of execution, and its number of output channels.
    """
    for module in unet.modules():
        module.__class__ = _GATED_CLASSES.get(type(module), type(module))
    paths = [("down_blocks", unet.down_blocks), ("mid_block", unet.mid_block), ("up_blocks", unet.up_blocks)]
    return {
        f"{path}.{name}": module.conv2.out_channels
        for path, root in paths
        if root is not None
        for name, module in root.named_modules()
        if isinstance(module, GatedResnet)
    }
