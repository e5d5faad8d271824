"""Channel attention modules and their sharing between the residual blocks of a network.

Everything here works on any sequence of residual branches of shape `(B, C, H, W)`; nothing knows what network they
come from. Notation: B batch, C channels of a block, d width at which a shared module works, S pooled statistics.

Papers: DIA (Huang et al., arXiv 2210.16101 and 1905.10671), SE (Hu et al., CVPR 2018), ECA (Wang et al., CVPR 2020),
SRM (Lee et al., ICCV 2019), CBAM (Woo et al., ECCV 2018).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import UsageError

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
    (arXiv 1903.10829, eq. 4 and 5). Like any batch normalisation it needs more than one image a batch in training."""

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


class ChannelScale(nn.Module):
    """A weight and an offset for each channel: the last layer of a gate that has no layer of its own."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, x)


ATTENTIONS: dict[str, type[nn.Module]] = {
    "lstm": DIALSTMCell,
    "se": SEAttention,
    "eca": ECAAttention,
    "srm": SRMAttention,
    "cbam": CBAMAttention,
}
SHARINGS = ("network", "level", "block")
BRIDGES = ("carry", "skip", "reset")
INITS = ("identity", "paper")


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


def _bottleneck(in_features: int, out_features: int, reduction: int) -> nn.Sequential:
    hidden = max(in_features // reduction, 1)
    return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features))


def _module_key(sharing: str, position: int, width: int) -> str:
    return {"network": "network", "level": str(width), "block": str(position)}[sharing]


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _std(x: Tensor) -> Tensor:
    # The small constant keeps the gradient finite where a channel is flat.
    return (x.var((2, 3), correction=0) + 1e-5).sqrt()


def _max(x: Tensor) -> Tensor:
    return x.amax((2, 3))


_POOLS = {"mean": _mean, "std": _std, "max": _max}


def _check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise UsageError(f"unknown {name} '{value}'. Choose one of: {', '.join(known)}.")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} must be at least 1, but is {size}.")
