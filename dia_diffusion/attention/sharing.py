"""Attention for the residual branches of a network, with its modules shared between the blocks.

Everything here works on any sequence of residual branches; nothing knows what network they come from. Notation:
B batch, C channels of a block, d width at which a shared module works. The sharing and the LSTM are those of Huang et
al., arXiv 2210.16101 and 1905.10671.
"""

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..options.attention import AttentionOptions, with_attention_options
from .modules import ATTENTIONS, Affine, CBAMSpatialAttention, CellMatrices, Linear

# The largest number of float16.
_LARGE = 65504.0
# State (h, c) of each shared LSTM cell; for `time`, the projected context.
Memory = dict[str, tuple[Tensor, ...]]


class Constants(NamedTuple):
    """Tensors that are the same for all blocks of a forward pass: computed at the first one, in the type and on the
    device in which the small products of all gates are done."""

    start: Memory  # the memory at the first block; without it, zero
    cells: dict[str, CellMatrices]
    encoders: dict[str, Affine]  # by width; without those whose layer has to be called
    decoders: dict[str, Affine]


class AttentionState(NamedTuple):
    """The state that one block passes to the next. It is never stored on a module; it is replaced, not changed."""

    position: int = 0  # index of the next block
    first: int | None = None  # index of the block that ran first
    context: Tensor | None = None  # (B, context_size), from which the memory starts; zero without it
    level: str | None = None  # level of the block before; None at the start
    memory: Memory = {}  # of each cell; one that is missing is zero  # noqa: RUF012
    left: dict[str, Memory] = {}  # memory at the end of each level, for the bridge `skip`  # noqa: RUF012
    constants: Constants | None = None


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
            again as at the first block; a level that comes again goes on where it was left. `skip` joins it with the
            one that the level in `joins` left behind: a learned convex combination for each channel.
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
        channel_dim (`int` or `Sequence[int]`, *optional*, defaults to 1):
            The dimension of the branches that holds their channels, for all or for each.

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
        channel_dim: int | Sequence[int] = 1,
        **options: Any,
    ):
        super().__init__()
        chosen = AttentionOptions(**options)
        self.widths = tuple(widths)
        self.channel_dims = (channel_dim,) * len(self.widths) if isinstance(channel_dim, int) else tuple(channel_dim)
        chosen.check_place(context_size is not None, next((dim for dim in self.channel_dims if dim != 1), 1))
        attention, sharing, init, hidden_size = chosen.attention, chosen.sharing, chosen.init, chosen.hidden_size
        self.recurrent = attention == "lstm"
        self.bridge = chosen.bridge
        self.gate_scale, self.gate_slope = (2.0, chosen.gate_slope) if init == "identity" else (1.0, 1.0)
        self.levels = ("",) * len(self.widths) if levels is None else tuple(levels)
        self.joins = dict(joins or {})
        # Levels that are entered more than once: streams of image and text take turns.
        entered = [level for level, before in zip(self.levels, (None, *self.levels), strict=False) if level != before]
        self._returning = {level for level in entered if entered.count(level) > 1}
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
        self.encoders = nn.ModuleDict({str(width): Linear(width, hidden_size) for width in encoded})
        self.decoders = nn.ModuleDict({str(width): Linear(hidden_size, width) for width in by_width})
        if self.recurrent and sharing == "level" and init == "identity":
            self.decoders = nn.ModuleDict({key: ChannelScale(size) for key, size in sizes.items()})
        self.spatial = nn.ModuleDict({key: CBAMSpatialAttention() for key in sizes} if attention == "cbam" else {})
        self.initial_states = nn.ModuleDict(
            {key: Linear(context_size, (2 if self.recurrent else 1) * size) for key, size in sizes.items()}
            if context_size is not None and (self.recurrent or not self.statistics)
            else {}
        )
        # Per channel, the logit of the share that the state of the matching earlier level has in the joined state. A
        # parameter that nothing uses has no gradient, which DistributedDataParallel refuses.
        joined = chosen.bridge == "skip" and joins_somewhere(self.levels, self.joins)
        self.skip_logits = nn.Parameter(torch.zeros(2, hidden_size)) if joined else None
        if init == "identity":
            self._close_gates()

    def _close_gates(self) -> None:
        """Set the last layer before each gate to zero."""
        own = [] if self.recurrent else [module.last for module in self.shared.values()]
        last_layers = [*self.decoders.values()] or own
        for layer in [*last_layers, *(module.last for module in self.spatial.values())]:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, branch: Tensor, state: AttentionState, maps: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Return the gate for a residual branch, and the state for the next block.

        Args:
            branch (`Tensor` of shape `(B, C, H, W)`, or with `channel_dim=-1` `(B, N, C)`):
                F(x) of the block at `state.position`.
            state (`AttentionState`): The state from the block before; at the start one with a context or none.
            maps (`dict[int, Tensor]`, *optional*): Filled with the channel gate `(B, C)` at this position.

        Returns:
            The gate, of shape `(B, C, 1, 1)` (`(B, 1, C)`), or with a spatial part `(B, C, H, W)`, and the next state.
        """
        # The small products are done in full precision, whatever the network around them computes in.
        with _without_autocast(branch):
            if state.constants is None:
                state = state._replace(constants=self._constants(branch, state.context))
            if state.first is None or state.position <= state.first:
                # The first block, also of a network that is called a second time in one forward pass.
                state = state._replace(first=state.position, level=None, memory={}, left={})
            if self.recurrent:
                channel_gate, state = self._recurrent_gate(branch, self._enter_level(state))
            else:
                channel_gate = self._memoryless_gate(branch, state)
            if maps is not None:
                maps[state.position] = channel_gate
            shape = [1] * branch.ndim
            shape[0], shape[self.channel_dims[state.position]] = channel_gate.shape
            gate, key = channel_gate.view(shape), self.keys[state.position]
            if key in self.spatial:
                gate = gate * self._gate(self.spatial[key](branch * gate.to(branch.dtype)))
        state = state._replace(position=state.position + 1, level=self.levels[state.position])
        return gate if gate.dtype == branch.dtype else gate.to(branch.dtype), state

    def _constants(self, branch: Tensor, context: Tensor | None) -> Constants:
        like = torch.empty((), dtype=_full_precision(branch), device=branch.device)
        start: Memory = {}
        if self.initial_states:
            if context is None:
                raise UsageError(
                    "this attention starts from a context, such as the time embedding, but none was given."
                )
            context, parts = nn.functional.silu(context.to(like.dtype)), 2 if self.recurrent else 1
            for key, project in self.initial_states.items():
                start[key] = project(context).to(like.dtype).chunk(parts, dim=-1)
        if not self.recurrent:
            return Constants(start, {}, {}, {})
        return Constants(
            start,
            {key: cell.matrices(like) for key, cell in self.shared.items()},
            {width: _read(layer, like) for width, layer in self.encoders.items() if _is_plain(layer)},
            {width: _read(layer, like) for width, layer in self.decoders.items() if _is_plain(layer)},
        )

    def _recurrent_gate(self, branch: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """Return the gate of each channel `(B, C)`, and the state with the LSTM's new memory."""
        key, width, constants = self.keys[state.position], str(self.widths[state.position]), state.constants
        pooled = self._pool("mean", branch, state.position)
        if self.encoders:
            pooled = _apply(constants.encoders.get(width), self.encoders[width], pooled)
        memory = state.memory.get(key) or (torch.zeros_like(pooled),) * 2
        hidden, cell = self.shared[key](pooled, memory, constants.cells[key])
        state = state._replace(memory={**state.memory, key: (hidden, cell)})
        if not self.decoders:
            return hidden, state
        return self._gate(_apply(constants.decoders.get(width), self.decoders[width], hidden)), state

    def _memoryless_gate(self, branch: Tensor, state: AttentionState) -> Tensor:
        """Return the gate of each channel `(B, C)` from the statistics of this branch, or for `time` the context."""
        key, width = self.keys[state.position], str(self.widths[state.position])
        statistics = [self._pool(name, branch, state.position) for name in self.statistics] or state.constants.start[
            key
        ]
        pooled = torch.stack(list(statistics), dim=1)
        if width in self.encoders:
            pooled = self.encoders[width](pooled)
        logits = self.shared[key](pooled)
        if self.decoders:
            logits = self.decoders[width](torch.sigmoid(logits))
        return self._gate(logits.to(_full_precision(branch)))

    def _enter_level(self, state: AttentionState) -> AttentionState:
        """Apply the bridge if the block is on another level than the last one; start the memory."""
        level = self.levels[state.position]
        if level == state.level:
            return state
        memory, left = state.memory, state.left
        if state.level is None:
            memory = state.constants.start
        elif self.bridge == "reset":
            if state.level in self._returning:
                left = {**left, state.level: memory}
            memory = left.get(level, state.constants.start)
        elif self.bridge == "skip":
            left = {**left, state.level: memory}
            if self.joins.get(level) in left:
                memory = self._join(memory, left[self.joins[level]])
        return state._replace(memory=memory, left=left)

    def _join(self, memory: Memory, left: Memory) -> Memory:
        shares = torch.sigmoid(self.skip_logits.to(next(iter(memory.values()))[0].dtype))
        return {
            key: tuple(now + s * (then - now) for s, now, then in zip(shares, held, left[key], strict=True))
            for key, held in memory.items()
        }

    def _pool(self, statistic: str, branch: Tensor, position: int) -> Tensor:
        """Return a statistic `(B, C)` over all dimensions but the channels, in full precision: half would overflow."""
        if branch.is_complex():
            branch = branch.abs()
        if branch.ndim == 2:
            branch = branch.unsqueeze(-1)
        channels = self.channel_dims[position] % branch.ndim
        dims = [dim for dim in range(1, branch.ndim) if dim != channels]
        dtype = _full_precision(branch)
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
        # A sum of two is one operation; a product with a number casts it first.
        return gate if self.gate_scale == 1 else gate + gate


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is not wrapped, hooked or offloaded: its weights can be used without a call."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is Linear and "forward" not in vars(layer) and not any(hooks)


def _read(layer: Linear, like: Tensor) -> Affine:
    # Copy: sharded weights may be freed before the next block runs.
    return Affine(layer.weight.t().to(like, copy=True), layer.bias.to(like, copy=True))


def _apply(affine: Affine | None, layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer to `(B, in)`: by the affine map that was read from it, or by a call."""
    if affine is not None:
        return torch.addmm(affine.offset, x, affine.matrix)
    y = layer(x)
    # Values above the largest float16 would become infinite, and then NaN.
    return y if y.dtype == x.dtype else y.to(x.dtype).clamp(-_LARGE, _LARGE)


def _full_precision(branch: Tensor) -> torch.dtype:
    return torch.float64 if branch.dtype == torch.float64 else torch.float32


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def joins_somewhere(levels: Sequence[str], joins: Mapping[str, str]) -> bool:
    """Return whether a block enters a level whose partner in `joins` ran before it."""
    return any(
        level != before and joins.get(level) in levels[:position]
        for position, (before, level) in enumerate(itertools.pairwise(levels), start=1)
    )


def _module_key(sharing: str, position: int, width: int) -> str:
    return {"network": "network", "level": str(width), "block": str(position)}[sharing]
