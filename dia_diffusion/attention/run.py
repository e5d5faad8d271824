"""The run: one forward pass of one model, in which its blocks ask for their gates.

A block does not hold the attention: it finds the run that is under way in its thread and tells it its position. So
nothing is kept between forward passes, several threads do not meet, and a block that is called outside of a run, or
inside of another model's, is a plain block.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .sharing import AttentionState, SharedAttention

# The one global: the run under way, and the recording that was asked for. torch.compile and torch.export follow it.
_thread = threading.local()
# Set here, a run leaves the main thread as it found it, and torch.compile need not compile a second time.
_thread.run = _thread.recording = None


class Chain:
    """The gated blocks of one model, in order of execution; what ties them to the runs of that model alone.

    Args:
        names (tuple of `str`): Names of the blocks.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names


class Run:
    """One forward pass of one model: a context, in which the blocks of its chain find it.

    Args:
        chain (`Chain`): Whose blocks take part.
        attention (`SharedAttention`): What their gates come from.
        state (`AttentionState`, *optional*): What the first block gets; by default that of the start.

    Attributes:
        state (`AttentionState`): What the next block gets.
    """

    def __init__(self, chain: Chain, attention: SharedAttention, state: AttentionState | None = None):
        self.chain = chain
        self.attention = attention
        self.recorded = _recording(chain) if state is None else None
        self.state = AttentionState(maps=None if self.recorded is None else {}) if state is None else state

    def __enter__(self) -> "Run":
        # It may begin in the middle of another, of this model or of one around it.
        self._outer = getattr(_thread, "run", None)
        _thread.run = self
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.run = self._outer
        if self.recorded is not None:
            self.recorded.clear()
            for position, gate in sorted(self.state.maps.items()):
                self.recorded[self.chain.names[position]] = gate

    def gate(self, branch: Tensor, position: int) -> Tensor:
        """The gate of the block at this position; the state goes on."""
        gate, self.state = self.attention(branch, self.state._replace(position=position))
        # The attention may live on another device than the block.
        return gate if gate.device == branch.device else gate.to(branch.device)


def run_under_way(chain: Chain) -> Run | None:
    """The run in this thread, if it is one of the model that the chain belongs to."""
    run = getattr(_thread, "run", None)
    return run if run is not None and run.chain is chain else None


@contextmanager
def record_maps(chain: Chain) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that holds, after each forward pass of the model in this thread, the channel gates `(B, C)`
    of its blocks by name, in order of execution."""
    before, maps = getattr(_thread, "recording", None), {}
    _thread.recording = (chain, maps)
    try:
        yield maps
    finally:
        _thread.recording = before


def _recording(chain: Chain) -> dict[str, Tensor] | None:
    recording = getattr(_thread, "recording", None)
    return recording[1] if recording is not None and recording[0] is chain else None
