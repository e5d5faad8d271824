"""Code that diffusers runs to load this pipeline, if it is asked to with `trust_remote_code=True`.

dia-diffusion 0.1.0 wrote it when the pipeline was saved. It holds these of its modules:
errors, attention, sharing, residual, blocks, unet.
Where dia-diffusion is installed, `dia_diffusion.DIAUNetPipeline.from_pretrained` loads the pipeline without it.
Apache-2.0.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from os import PathLike
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


####################################################################################################
# errors: Exceptions whose messages say what was wrong and what to do about it.
####################################################################################################


class UsageError(ValueError):
    """A mistake that the caller can correct. Command lines print its message alone and exit with status 2."""


class NotFiniteError(UsageError):
    """Training has diverged: a loss, a gradient or a weight is not a finite number."""

    def __init__(self, step: int, what: str, learning_rate: float):
        super().__init__(f"at step {step} {what}, at learning rate {learning_rate:.3g}: training has diverged.")


####################################################################################################
# attention: Channel attention modules, on statistics pooled from features `(B, C, H, W)`; `sharing.py` puts them to work.
#
# Notation: B batch, C channels, S pooled statistics.
#
# Papers: DIA (Huang et al., arXiv 2210.16101 and 1905.10671), SE (Hu et al., CVPR 2018), ECA (Wang et al., CVPR 2020),
# SRM (Lee et al., ICCV 2019), CBAM (Woo et al., ECCV 2018).
####################################################################################################


LSTMState = tuple[Tensor, Tensor]


class DIALSTMCell(nn.Module):
    """The LSTM cell of Dense-and-Implicit Attention (arXiv 1905.10671, section 3.2).

    Two things differ from a textbook cell: each of the two maps to the gates is a bottleneck
    `Linear(C, C/r) -> ReLU -> Linear(C/r, 4C)`, and the output is `sigmoid(o) * sigmoid(c')`, so that it lies in
    (0, 1) and can serve as an attention map.

    Args:
        channels (`int`): Width C of the pooled features and of the state.
        reduction (`int`, *optional*, defaults to 4): Reduction ratio r of the bottlenecks.
    """

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.input_gates = _bottleneck(channels, 4 * channels, reduction)
        self.state_gates = _bottleneck(channels, 4 * channels, reduction)

    def forward(self, pooled: Tensor, state: LSTMState) -> LSTMState:
        """Maps pooled features `(B, C)` and a state `(h, c)`, each `(B, C)`, to the next state; h is in (0, 1)."""
        h, c = state
        i, f, z, o = (self.input_gates(pooled) + self.state_gates(h)).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.sigmoid(c)
        return h, c


class SEAttention(nn.Module):
    """Squeeze-and-Excitation: `logits = W2 relu(W1 mean(x))` (arXiv 1709.01507, eq. 2 and 3)."""

    statistics = ("mean",)

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.first = nn.Linear(channels, hidden)
        self.last = nn.Linear(hidden, channels)

    def forward(self, statistics: Tensor) -> Tensor:
        """Maps statistics `(B, S, C)` to logits `(B, C)`; each statistic goes through the same layers."""
        return self.last(torch.relu(self.first(statistics))).sum(1)


class ECAAttention(nn.Module):
    """Efficient Channel Attention: a 1D convolution over the channels of `mean(x)` (arXiv 1910.03151, eq. 9 and 12)."""

    statistics = ("mean",)

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        kernel_size = int((math.log2(channels) + 1) / 2)
        kernel_size += 1 - kernel_size % 2
        self.last = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, statistics: Tensor) -> Tensor:
        """Maps statistics `(B, 1, C)` to logits `(B, C)`."""
        return self.last(statistics)[:, 0]


class SRMAttention(nn.Module):
    """Style-based Recalibration: mean and standard deviation, a channel-wise linear layer and batch normalisation
    (arXiv 1903.10829, eq. 4 and 5). Like any batch normalisation it needs more than one image a batch in training;
    where blocks share it, they share its running statistics too, which is less exact in evaluation."""

    statistics = ("mean", "std")

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, channels) / math.sqrt(2))
        self.last = nn.BatchNorm1d(channels)

    def forward(self, statistics: Tensor) -> Tensor:
        """Maps statistics `(B, 2, C)` to logits `(B, C)`."""
        return self.last((statistics * self.weight).sum(1))


class CBAMAttention(SEAttention):
    """Convolutional Block Attention, channel part: the layers of SE on mean and maximum (arXiv 1807.06521, eq. 2)."""

    statistics = ("mean", "max")


class CBAMSpatialAttention(nn.Module):
    """Convolutional Block Attention, spatial part: a 7x7 convolution on the mean and the maximum over the channels
    (arXiv 1807.06521, eq. 3). It does not depend on the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps features `(B, C, H, W)` to logits `(B, 1, H, W)`."""
        return self.last(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1))


# Name of the attention in options, and its module.
ATTENTIONS: dict[str, type[nn.Module]] = {
    "lstm": DIALSTMCell,
    "se": SEAttention,
    "eca": ECAAttention,
    "srm": SRMAttention,
    "cbam": CBAMAttention,
}


def _bottleneck(in_features: int, out_features: int, reduction: int) -> nn.Sequential:
    hidden = max(in_features // reduction, 1)
    return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features))


####################################################################################################
# sharing: Attention for the residual branches of a network, with its modules shared between the blocks.
#
# Everything here works on any sequence of residual branches of shape `(B, C, H, W)`; nothing knows what network they
# come from. Notation: B batch, C channels of a block, d width at which a shared module works. The sharing and the LSTM
# are those of Huang et al., arXiv 2210.16101 and 1905.10671.
####################################################################################################


SHARINGS = ("network", "level", "block")
BRIDGES = ("carry", "skip", "reset")
INITS = ("identity", "paper")


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _std(x: Tensor) -> Tensor:
    # The small constant keeps the gradient finite where a channel is flat.
    return (x.var((2, 3), correction=0) + 1e-5).sqrt()


def _max(x: Tensor) -> Tensor:
    return x.amax((2, 3))


_POOLS = {"mean": _mean, "std": _std, "max": _max}


class AttentionState(NamedTuple):
    """What passes from one block to the next. It is never stored on a module.

    Attributes:
        position (`int`): Index of the next block.
        memory (`dict[str, tuple[Tensor, Tensor]]`): State `(h, c)` of each shared LSTM cell; a missing one is zero.
        maps (`tuple[Tensor, ...]`, *optional*): Channel gates `(B, C)` of the blocks passed so far, where asked for.
    """

    position: int
    memory: dict[str, LSTMState]
    maps: tuple[Tensor, ...] | None


class ChannelScale(nn.Module):
    """A weight and an offset for each channel: the last layer of a gate that has no layer of its own."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, x)


class SharedAttention(nn.Module):
    """Attention for a sequence of residual blocks, with one module shared by all, by those of equal width, or by none.

    For the block at position l with residual branch F: pool F to statistics; encode them to the width of the module
    (`sharing="network"` only); apply the module; decode to C channels; gate. With an LSTM the state `(h, c)` goes in
    and comes out with the `AttentionState`.

    Args:
        widths (`Sequence[int]`): Channels of each block, in order of execution.
        attention (`str`, *optional*, defaults to `"lstm"`): One of `lstm`, `se`, `eca`, `srm`, `cbam`.
        sharing (`str`, *optional*, defaults to `"network"`):
            `network`: one module of width `hidden_size`, and for each channel width C one pair of linear adapters,
            C to `hidden_size` and back. `level`: one module for each channel width. `block`: one for each block.
        bridge (`str`, *optional*, defaults to `"carry"`): How the LSTM's state enters a level; see `enter_level`.
        hidden_size (`int`, *optional*, defaults to 64): Width of the module with `sharing="network"`.
        reduction (`int`, *optional*, defaults to 4): Reduction ratio of bottlenecks.
        init (`str`, *optional*, defaults to `"identity"`):
            `identity`: gates are `2 * sigmoid(.)` of a last layer that starts at zero, so exactly 1 at first.
            `paper`: gates are in (0, 1); an LSTM's output is the gate itself where the widths agree.
        context_size (`int`, *optional*):
            Width of a vector (a time embedding, say) from which the LSTM's first state is projected; zero if `None`.

    Raises:
        UsageError: for an unknown name, and for combinations that have no meaning.
    """

    def __init__(
        self,
        widths: Sequence[int],
        attention: str = "lstm",
        sharing: str = "network",
        bridge: str = "carry",
        hidden_size: int = 64,
        reduction: int = 4,
        init: str = "identity",
        context_size: int | None = None,
    ):
        super().__init__()
        _check_choices(attention=(attention, ATTENTIONS), sharing=(sharing, SHARINGS))
        _check_choices(bridge=(bridge, BRIDGES), init=(init, INITS))
        _check_sizes(hidden_size=hidden_size, reduction=reduction)
        self.recurrent = attention == "lstm"
        self.bridge = bridge
        self.gate_scale = 2.0 if init == "identity" else 1.0
        if self.recurrent and sharing == "block":
            raise UsageError(
                "attention 'lstm' with sharing 'block' has no meaning: the LSTM's state passes between blocks that "
                "share one cell. Use sharing 'network' or 'level', or another attention."
            )
        if not self.recurrent and bridge != "carry":
            raise UsageError(f"bridge '{bridge}' has no meaning for attention '{attention}': only 'lstm' has a state.")
        if sharing == "level" and bridge == "skip":
            raise UsageError(
                "bridge 'skip' with sharing 'level' has no meaning: each width keeps a state of its own, which the up "
                "path takes up where the down path left it. Use bridge 'carry' or 'reset', or sharing 'network'."
            )

        self.widths = tuple(widths)
        self.keys = tuple(_module_key(sharing, position, width) for position, width in enumerate(self.widths))
        sizes = {
            key: hidden_size if sharing == "network" else width
            for key, width in zip(self.keys, self.widths, strict=True)
        }
        make = ATTENTIONS[attention]
        self.shared = nn.ModuleDict({key: make(size, reduction) for key, size in sizes.items()})
        self.statistics = ("mean",) if self.recurrent else make.statistics

        by_width = sorted(set(self.widths)) if sharing == "network" else []
        self.encoders = nn.ModuleDict({str(width): nn.Linear(width, hidden_size) for width in by_width})
        self.decoders = nn.ModuleDict({str(width): nn.Linear(hidden_size, width) for width in by_width})
        if self.recurrent and sharing == "level" and init == "identity":
            self.decoders = nn.ModuleDict({key: ChannelScale(size) for key, size in sizes.items()})
        self.spatial = nn.ModuleDict(
            {key: CBAMSpatialAttention() for key in sizes} if attention == "cbam" else {},
        )
        self.initial_states = nn.ModuleDict(
            {key: nn.Linear(context_size, 2 * size) for key, size in sizes.items()}
            if self.recurrent and context_size is not None
            else {}
        )
        # Per channel, the logit of the share that the state of the matching earlier level has in the joined state.
        self.skip_logits = nn.Parameter(torch.zeros(2, hidden_size)) if bridge == "skip" else None
        if init == "identity":
            self._close_gates()

    def _close_gates(self) -> None:
        """Sets the last layer before each gate to zero."""
        own = [] if self.recurrent else [module.last for module in self.shared.values()]
        last_layers = [*self.decoders.values()] or own
        for layer in [*last_layers, *(module.last for module in self.spatial.values())]:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def initial_state(self, context: Tensor | None = None, record: bool = False) -> AttentionState:
        """The state before the first block, from a context `(B, context_size)` where the module was built with one.

        With `record=True` the state collects the channel gates in `maps`.
        """
        return AttentionState(0, self._initial_memory(context), () if record else None)

    def enter_level(
        self, state: AttentionState, context: Tensor | None = None, left: AttentionState | None = None
    ) -> AttentionState:
        """Applies the bridge where a new level of the network begins.

        `carry` lets the state go on. `reset` starts again from the initial state. `skip` joins the state with the one
        that the matching earlier level `left` behind, if there is one: a learned convex combination for each channel.
        """
        if not self.recurrent or self.bridge == "carry":
            return state
        if self.bridge == "reset":
            return state._replace(memory=self._initial_memory(context))
        if left is None:
            return state
        shares = torch.sigmoid(self.skip_logits)
        memory = {
            key: tuple(now + s * (then - now) for s, now, then in zip(shares, held, left.memory[key], strict=True))
            for key, held in state.memory.items()
        }
        return state._replace(memory=memory)

    def forward(self, branch: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """The gate for a residual branch, and the state for the next block.

        Args:
            branch (`Tensor` of shape `(B, C, H, W)`): F(x) of the block at `state.position`.
            state (`AttentionState`): What the block before passed on.

        Returns:
            The gate, of shape `(B, C, 1, 1)` or with a spatial part `(B, C, H, W)`, and the next state.
        """
        key, width = self.keys[state.position], str(self.widths[state.position])
        module = self.shared[key]
        pooled = torch.stack([_POOLS[name](branch) for name in self.statistics], dim=1)
        if width in self.encoders:
            pooled = self.encoders[width](pooled)

        memory = state.memory
        if self.recurrent:
            pooled = pooled[:, 0]
            attended, cell = module(pooled, memory.get(key) or (torch.zeros_like(pooled),) * 2)
            memory = {**memory, key: (attended, cell)}
        else:
            logits = module(pooled)
            attended = torch.sigmoid(logits) if self.decoders else self._gate(logits)
        if self.decoders:
            decoder = self.decoders[width]
            attended = self._gate(decoder(attended))

        gate = attended[:, :, None, None]
        if key in self.spatial:
            gate = gate * self._gate(self.spatial[key](branch * gate))
        maps = None if state.maps is None else (*state.maps, attended)
        return gate.to(branch.dtype), AttentionState(state.position + 1, memory, maps)

    def _gate(self, logits: Tensor) -> Tensor:
        return self.gate_scale * torch.sigmoid(logits)

    def _initial_memory(self, context: Tensor | None) -> dict[str, LSTMState]:
        return {
            key: project(nn.functional.silu(context)).chunk(2, dim=-1) for key, project in self.initial_states.items()
        }


def _module_key(sharing: str, position: int, width: int) -> str:
    return {"network": "network", "level": str(width), "block": str(position)}[sharing]


def _check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise UsageError(f"unknown {name} '{value}'. Choose one of: {', '.join(known)}.")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} must be at least 1, but is {size}.")


####################################################################################################
# residual: The residual blocks of diffusers with a gate on the residual branch.
####################################################################################################


class GatedResnet:
    """A residual block `S(x) + F(x)` that computes `S(x) + F(x) * gate` in one pass (arXiv 2210.16101, eq. 2)."""

    def forward(
        self, hidden_states: Tensor, temb: Tensor, attention: SharedAttention | None, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState | None]:
        shortcut, branch = hidden_states, self.nonlinearity(self._first_norm(hidden_states, temb))
        resample = self.upsample or self.downsample
        if resample is not None:
            shortcut, branch = resample(shortcut), resample(branch)
        branch = self._second_norm(self.conv1(branch), temb)
        branch = self.conv2(self.dropout(self.nonlinearity(branch)))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)

        if attention is None:
            output = shortcut + branch
        else:
            gate, state = attention(branch, state)
            output = torch.addcmul(shortcut, branch, gate)
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor, state


class DIAResnetBlock2D(GatedResnet, ResnetBlock2D):
    def _first_norm(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return self.norm1(hidden_states)

    def _second_norm(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = time.chunk(2, dim=1)
            return self.norm2(hidden_states) * (1 + scale) + shift
        return self.norm2(hidden_states + time)


class DIAResnetBlockCondNorm2D(GatedResnet, ResnetBlockCondNorm2D):
    def _first_norm(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return self.norm1(hidden_states, temb)

    def _second_norm(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return self.norm2(hidden_states, temb)


####################################################################################################
# blocks: The blocks of diffusers' UNet2DModel with attention on every residual branch.
#
# Each class here is a block of diffusers with the same submodules and weights, and a `forward` that also takes the
# attention module and its state (both `None` for no attention), and gives the next state back. `gate_residual_blocks`
# turns the blocks of a UNet into these.
####################################################################################################


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


####################################################################################################
# unet: DIAUNet2DModel: diffusers' UNet2DModel with shared attention on every residual branch.
####################################################################################################


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
            The attention module: `lstm` (DIA), `se`, `eca`, `srm`, `cbam`, or `none` for a plain UNet2DModel.
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
        model = _cast(cls.from_config({**unet.config, **dia_arguments}), unet)
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
            loaded, model = model, _cast(cls.from_config(model.config), model).eval()
            weights = {k: v for k, v in loaded.state_dict().items() if not k.startswith(_DIA_PREFIX)}
            model.load_state_dict(weights, strict=False)
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
