"""Attention for the residual branches of a network, with its modules shared between the blocks.

Everything here works on any sequence of residual branches of shape `(B, C, H, W)`; nothing knows what network they
come from. Notation: B batch, C channels of a block, d width at which a shared module works. The sharing and the LSTM
are those of Huang et al., arXiv 2210.16101 and 1905.10671.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .modules import ATTENTIONS, CBAMSpatialAttention, LSTMState
from ..errors import UsageError

SHARINGS = ("network", "level", "block")
BRIDGES = ("carry", "skip", "reset")
INITS = ("identity", "paper")


def _mean(x: Tensor) -> Tensor:
    # The gradient of a sum is a view; that of a mean would be written out at full size.
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


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
        memory (`dict[str, tuple[Tensor, ...]]`):
            State `(h, c)` of each shared LSTM cell, zero if it is missing; for `time`, the projected context.
        maps (`tuple[Tensor, ...]`, *optional*): Channel gates `(B, C)` of the blocks passed so far, where asked for.
        left (`dict[str, tuple[Tensor, Tensor]]`, *optional*):
            What an earlier level left in its memory, for the next block to join with its own.
    """

    position: int
    memory: dict[str, LSTMState | tuple[Tensor]]
    maps: tuple[Tensor, ...] | None
    left: dict[str, LSTMState] | None = None


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
        attention (`str`, *optional*, defaults to `"lstm"`): One of `lstm`, `se`, `eca`, `srm`, `cbam`, `time`.
        sharing (`str`, *optional*, defaults to `"network"`):
            `network`: one module of width `hidden_size`, and for each channel width C one pair of linear adapters,
            C to `hidden_size` and back. `level`: one module for each channel width. `block`: one for each block.
        bridge (`str`, *optional*, defaults to `"carry"`): How the LSTM's state enters a level; see `enter_level`.
        hidden_size (`int`, *optional*, defaults to 64): Width of the module with `sharing="network"`.
        reduction (`int`, *optional*, defaults to 4): Reduction ratio of bottlenecks.
        init (`str`, *optional*, defaults to `"identity"`):
            `identity`: gates are `2 * sigmoid(s * .)` of a last layer that starts at zero, so exactly 1 at first.
            `paper`: gates are in (0, 1); an LSTM's output is the gate itself where the widths agree.
        gate_slope (`float`, *optional*, defaults to 1.0):
            The slope s of these gates: how fast they leave 1 in training (docs/study.md). `paper` has none.
        context_size (`int`, *optional*):
            Width of a vector (a time embedding, say) from which the LSTM's first state is projected; zero if `None`.
            `time` needs it.

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
        gate_slope: float = 1.0,
        context_size: int | None = None,
    ):
        super().__init__()
        _check_choices(attention=(attention, ATTENTIONS), sharing=(sharing, SHARINGS))
        _check_choices(bridge=(bridge, BRIDGES), init=(init, INITS))
        _check_sizes(hidden_size=hidden_size, reduction=reduction)
        if not gate_slope > 0:
            raise UsageError(f"gate_slope must be above 0, but is {gate_slope}.")
        self.recurrent = attention == "lstm"
        self.bridge = bridge
        self.gate_scale, self.gate_slope = (2.0, gate_slope) if init == "identity" else (1.0, 1.0)
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

        if attention == "time" and context_size is None:
            raise UsageError(
                "attention 'time' sees the time embedding alone, so it cannot do without: set time_conditioned."
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
        encoded = by_width if self.statistics else []
        self.encoders = nn.ModuleDict({str(width): nn.Linear(width, hidden_size) for width in encoded})
        self.decoders = nn.ModuleDict({str(width): nn.Linear(hidden_size, width) for width in by_width})
        if self.recurrent and sharing == "level" and init == "identity":
            self.decoders = nn.ModuleDict({key: ChannelScale(size) for key, size in sizes.items()})
        self.spatial = nn.ModuleDict(
            {key: CBAMSpatialAttention() for key in sizes} if attention == "cbam" else {},
        )
        self.initial_states = nn.ModuleDict(
            {key: nn.Linear(context_size, (2 if self.recurrent else 1) * size) for key, size in sizes.items()}
            if context_size is not None and (self.recurrent or not self.statistics)
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
        return state if left is None else state._replace(left=left.memory)

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
        sources = [_POOLS[name](branch) for name in self.statistics] or state.memory[key]
        # The cell takes its one statistic as it is.
        pooled = sources[0] if self.recurrent else torch.stack(list(sources), dim=1)
        if width in self.encoders:
            pooled = self.encoders[width](pooled)

        # Not in `enter_level`: hooks that fetch offloaded weights know of `forward` only.
        memory = state.memory if state.left is None else self._join(state.memory, state.left)
        if self.recurrent:
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

    def _join(self, memory: dict[str, LSTMState], left: dict[str, LSTMState]) -> dict[str, LSTMState]:
        shares = torch.sigmoid(self.skip_logits)
        return {
            key: tuple(now + s * (then - now) for s, now, then in zip(shares, held, left[key], strict=True))
            for key, held in memory.items()
        }

    def _gate(self, logits: Tensor) -> Tensor:
        if self.gate_slope != 1:
            logits = self.gate_slope * logits
        return self.gate_scale * torch.sigmoid(logits)

    def _initial_memory(self, context: Tensor | None) -> dict[str, LSTMState]:
        parts = 2 if self.recurrent else 1
        return {
            key: project(nn.functional.silu(context)).chunk(parts, dim=-1)
            for key, project in self.initial_states.items()
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
