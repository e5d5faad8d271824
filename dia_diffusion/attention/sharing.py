"""Attention for the residual branches of a network, with its modules shared between the blocks.

Everything here works on any sequence of residual branches; nothing knows what network they come from. Notation:
B batch, C channels of a block, d width at which a shared module works. The sharing and the LSTM are those of Huang et
al., arXiv 2210.16101 and 1905.10671.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..options.attention import AttentionOptions, with_attention_options
from .modules import ATTENTIONS, CBAMSpatialAttention, CellMatrices

# The largest number of float16.
_LARGE = 65504.0
# State (h, c) of each shared LSTM cell; for `time`, the projected context.
Memory = dict[str, tuple[Tensor, ...]]


class AttentionState(NamedTuple):
    """What passes from one block to the next. It is never stored on a module, and never changed, but replaced."""

    position: int = 0  # index of the next block
    context: Tensor | None = None  # (B, context_size): what the memory starts from; zero without
    level: str | None = None  # that of the block before; None at the start
    memory: Memory = {}  # of each cell; one that is missing is zero  # noqa: RUF012
    left: dict[str, Memory] = {}  # what each level left behind, for the bridge `skip`  # noqa: RUF012
    matrices: dict[str, CellMatrices] = {}  # of each cell, multiplied out at the first block  # noqa: RUF012
    maps: dict[int, Tensor] | None = None  # channel gates (B, C) by position, where they are asked for
    again: bool = False  # whether blocks that ran before are run once more, to compute gradients


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
        bridge (`str`, *optional*, defaults to `"carry"`):
            How the LSTM's state enters another level. `carry` lets it go on; with `sharing="level"` that of each width,
            where this width comes again, so that in a network whose widths come once it is `reset`. `reset` starts
            again as at the first block. `skip` joins it with the one that the level in `joins` left behind: a learned
            convex combination for each channel.
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
        levels (`Sequence[str]`, *optional*): The level of each block; by default all are on one.
        joins (`dict[str, str]`, *optional*): For a level, the earlier one whose state it joins with `skip`.
        channel_dim (`int`, *optional*, defaults to 1): The dimension of the branches that holds their channels.

    Raises:
        UsageError: for an unknown name, and for combinations that have no meaning.
    """

    @with_attention_options
    def __init__(
        self,
        widths: Sequence[int],
        context_size: int | None = None,
        levels: Sequence[str] | None = None,
        joins: Mapping[str, str] | None = None,
        channel_dim: int = 1,
        **options: Any,
    ):
        super().__init__()
        chosen = AttentionOptions(**options)
        chosen.check_place(context_size is not None, channel_dim)
        attention, sharing, init, hidden_size = chosen.attention, chosen.sharing, chosen.init, chosen.hidden_size
        self.recurrent = attention == "lstm"
        self.bridge = chosen.bridge
        self.gate_scale, self.gate_slope = (2.0, chosen.gate_slope) if init == "identity" else (1.0, 1.0)
        self.widths = tuple(widths)
        self.levels = ("",) * len(self.widths) if levels is None else tuple(levels)
        self.joins = dict(joins or {})
        self.channel_dim = channel_dim
        self.keys = tuple(_module_key(sharing, position, width) for position, width in enumerate(self.widths))
        sizes = {
            key: hidden_size if sharing == "network" else width
            for key, width in zip(self.keys, self.widths, strict=True)
        }
        make = ATTENTIONS[attention]
        self.shared = nn.ModuleDict({key: make(size, chosen.reduction) for key, size in sizes.items()})
        self.statistics = ("mean",) if self.recurrent else make.statistics

        by_width = sorted(set(self.widths)) if sharing == "network" else []
        encoded = by_width if self.statistics else []
        self.encoders = nn.ModuleDict({str(width): nn.Linear(width, hidden_size) for width in encoded})
        self.decoders = nn.ModuleDict({str(width): nn.Linear(hidden_size, width) for width in by_width})
        if self.recurrent and sharing == "level" and init == "identity":
            self.decoders = nn.ModuleDict({key: ChannelScale(size) for key, size in sizes.items()})
        self.spatial = nn.ModuleDict({key: CBAMSpatialAttention() for key in sizes} if attention == "cbam" else {})
        self.initial_states = nn.ModuleDict(
            {key: nn.Linear(context_size, (2 if self.recurrent else 1) * size) for key, size in sizes.items()}
            if context_size is not None and (self.recurrent or not self.statistics)
            else {}
        )
        # Per channel, the logit of the share that the state of the matching earlier level has in the joined state.
        self.skip_logits = nn.Parameter(torch.zeros(2, hidden_size)) if chosen.bridge == "skip" else None
        if init == "identity":
            self._close_gates()

    def _close_gates(self) -> None:
        """Sets the last layer before each gate to zero."""
        own = [] if self.recurrent else [module.last for module in self.shared.values()]
        last_layers = [*self.decoders.values()] or own
        for layer in [*last_layers, *(module.last for module in self.spatial.values())]:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, branch: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """The gate for a residual branch, and the state for the next block.

        Args:
            branch (`Tensor` of shape `(B, C, H, W)`, or with `channel_dim=-1` `(B, N, C)`):
                F(x) of the block at `state.position`.
            state (`AttentionState`): What the block before passed on; at the start one with a context or none.

        Returns:
            The gate, of shape `(B, C, 1, 1)` (`(B, 1, C)`), or with a spatial part `(B, C, H, W)`, and the next state.
        """
        # Its small products are done in the precision of its weights, whatever the network around it computes in.
        with _without_autocast(branch):
            layer_dtype = self._layer_dtype(branch)
            state = self._enter_level(state, branch, layer_dtype)
            channel_gate, state = self._channel_gate(branch, state, layer_dtype)
        shape = [1] * branch.ndim
        shape[0], shape[self.channel_dim] = channel_gate.shape
        gate = channel_gate.view(shape)
        key = self.keys[state.position]
        if key in self.spatial:
            gate = gate.to(branch.dtype)
            gate = gate * self._gate(self.spatial[key](branch * gate))
        if state.maps is not None:
            state = state._replace(maps={**state.maps, state.position: channel_gate})
        state = state._replace(position=state.position + 1)
        return gate if gate.dtype == branch.dtype else gate.to(branch.dtype), state

    def _channel_gate(
        self, branch: Tensor, state: AttentionState, layer_dtype: torch.dtype
    ) -> tuple[Tensor, AttentionState]:
        """The gate of each channel, `(B, C)`, and the state with the LSTM's new memory."""
        key, width = self.keys[state.position], str(self.widths[state.position])
        module = self.shared[key]
        if self.recurrent:
            pooled = self._pool("mean", branch)
            if self.encoders:
                encoded = self.encoders[width](pooled if pooled.dtype == layer_dtype else pooled.to(layer_dtype))
                # Past the largest number of half precision is infinity, which later would be no number.
                pooled = encoded if encoded.dtype == pooled.dtype else encoded.to(pooled.dtype).clamp(-_LARGE, _LARGE)
            if not state.matrices:
                matrices = {name: cell.matrices(pooled, layer_dtype) for name, cell in self.shared.items()}
                state = state._replace(matrices=matrices)
            memory = state.memory.get(key) or (torch.zeros_like(pooled),) * 2
            hidden, cell = module(pooled, memory, state.matrices[key])
            state = state._replace(memory={**state.memory, key: (hidden, cell)})
            if not self.decoders:
                return hidden, state
            attended = hidden if hidden.dtype == layer_dtype else hidden.to(layer_dtype)
            return self._gate(self.decoders[width](attended)), state
        statistics = [self._pool(name, branch) for name in self.statistics] or state.memory[key]
        pooled = torch.stack(list(statistics), dim=1).to(layer_dtype)
        if width in self.encoders:
            pooled = self.encoders[width](pooled)
        logits = module(pooled, again=True) if state.again and "std" in self.statistics else module(pooled)
        if not self.decoders:
            return self._gate(logits), state
        return self._gate(self.decoders[width](torch.sigmoid(logits))), state

    def _enter_level(self, state: AttentionState, branch: Tensor, layer_dtype: torch.dtype) -> AttentionState:
        """Applies the bridge where the block is on another level than the one before; starts the memory."""
        level = self.levels[state.position]
        if level == state.level:
            return state
        memory, left = state.memory, state.left
        if state.level is None or self.bridge == "reset":
            memory = self._initial_memory(state.context, _pooled_dtype(branch), layer_dtype)
        elif self.bridge == "skip":
            left = {**left, state.level: memory}
            if self.joins.get(level) in left:
                memory = self._join(memory, left[self.joins[level]])
        return state._replace(level=level, memory=memory, left=left)

    def _initial_memory(self, context: Tensor | None, dtype: torch.dtype, layer_dtype: torch.dtype) -> Memory:
        if not self.initial_states:
            return {}
        if context is None:
            raise UsageError("this attention starts from a context, such as the time embedding, and was given none.")
        context = nn.functional.silu(context).to(layer_dtype)
        parts = 2 if self.recurrent else 1
        return {key: project(context).to(dtype).chunk(parts, dim=-1) for key, project in self.initial_states.items()}

    def _join(self, memory: Memory, left: Memory) -> Memory:
        shares = torch.sigmoid(self.skip_logits.to(next(iter(memory.values()))[0].dtype))
        return {
            key: tuple(now + s * (then - now) for s, now, then in zip(shares, held, left[key], strict=True))
            for key, held in memory.items()
        }

    def _pool(self, statistic: str, branch: Tensor) -> Tensor:
        """A statistic `(B, C)` over all but the channels. A sum of half-precision numbers would overflow in theirs."""
        channels = self.channel_dim % branch.ndim
        dims = [dim for dim in range(1, branch.ndim) if dim != channels]
        dtype = _pooled_dtype(branch)
        if statistic == "max":
            return branch.amax(dims).to(dtype)
        if statistic == "std":
            # The small constant keeps the gradient finite where a channel is flat.
            return (branch.to(dtype).var(dims, correction=0) + 1e-5).sqrt()
        # The gradient of a sum is a view; that of a mean would be written out at full size.
        return branch.sum(dims, dtype=dtype) / math.prod([branch.shape[dim] for dim in dims])

    def _gate(self, logits: Tensor) -> Tensor:
        if self.gate_slope != 1:
            logits = self.gate_slope * logits
        gate = torch.sigmoid(logits)
        return gate if self.gate_scale == 1 else self.gate_scale * gate

    def _layer_dtype(self, branch: Tensor) -> torch.dtype:
        """What the layers compute in. Where diffusers casts weights layer by layer they are stored smaller than that,
        and an attention trained in full precision may be attached to a network in half."""
        stored = next(self.parameters()).dtype
        return max(stored, branch.dtype, key=lambda dtype: dtype.itemsize)


def _pooled_dtype(branch: Tensor) -> torch.dtype:
    return torch.float64 if branch.dtype == torch.float64 else torch.float32


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _module_key(sharing: str, position: int, width: int) -> str:
    return {"network": "network", "level": str(width), "block": str(position)}[sharing]
