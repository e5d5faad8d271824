"""Channel attention modules, on statistics pooled from a residual branch; `sharing.py` shares them between blocks.

Notation: B batch, C channels, S pooled statistics.

Papers: DIA (Huang et al., arXiv 2210.16101 and 1905.10671), SE (Hu et al., CVPR 2018), ECA (Wang et al., CVPR 2020),
SRM (Lee et al., ICCV 2019), CBAM (Woo et al., ECCV 2018).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError

LSTMState = tuple[Tensor, Tensor]


class Affine(NamedTuple):
    """An affine map `x @ matrix + offset` of vectors `(B, in)`: a linear layer, ready to be used by many blocks."""

    matrix: Tensor  # (in, out)
    offset: Tensor  # (out,)


class CellMatrices(NamedTuple):
    """Both bottlenecks of a `DIALSTMCell` merged: one affine map before the ReLU, one after it."""

    hidden: Affine  # from [pooled, h], of width 2 C, to 2 C/r
    gates: Affine  # from 2 C/r to the gates i, f, 2 z, o, of width 4 C


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
        self.channels = channels
        self.input_gates = _bottleneck(channels, 4 * channels, reduction)
        self.state_gates = _bottleneck(channels, 4 * channels, reduction)

    def matrices(self, like: Tensor) -> CellMatrices:
        """Merge the cell's layers, once for all blocks that share it.

        Args:
            like (`Tensor`): Has the type and device that the matrices should have.
        """
        (pooled_in, _, pooled_out), (state_in, _, state_out) = self.input_gates, self.state_gates

        def hidden(x: Tensor) -> Tensor:
            pooled, h = x.chunk(2, dim=1)
            return torch.cat([pooled_in(pooled), state_in(h)], dim=1)

        def gates(x: Tensor) -> Tensor:
            of_pooled, of_state = x.chunk(2, dim=1)
            i, f, z, o = (pooled_out(of_pooled) + state_out(of_state)).chunk(4, dim=1)
            return torch.cat([i, f, 2 * z, o], dim=1)

        return CellMatrices(
            _affine_map(hidden, 2 * self.channels, like), _affine_map(gates, 2 * pooled_out.in_features, like)
        )

    def forward(self, pooled: Tensor, state: LSTMState, matrices: CellMatrices | None = None) -> LSTMState:
        """Map pooled features `(B, C)` and a state `(h, c)`, each `(B, C)`, to the next state; h is in (0, 1).

        With `gates = U(pooled) + V(h)` of the two bottlenecks U and V:
        `c' = sigmoid(f) c + sigmoid(i) tanh(z)` and `h' = sigmoid(o) sigmoid(c')`.
        """
        h, c = state
        to_hidden, to_gates = self.matrices(pooled) if matrices is None else matrices
        hidden = torch.addmm(to_hidden.offset, torch.cat([pooled, h], dim=1), to_hidden.matrix).relu()
        gates = torch.addmm(to_gates.offset, hidden, to_gates.matrix).sigmoid()
        i, f, z, o = gates.split([self.channels] * 4, dim=1)
        # tanh(z) is 2 sigmoid(2 z) - 1: one call serves all gates.
        c = torch.addcmul(f * c - i, i, z, value=2)
        return o * torch.sigmoid(c), c


def _affine_map(function: Callable[[Tensor], Tensor], size: int, like: Tensor) -> Affine:
    """Return an affine function of vectors `(B, size)` as matrix and offset, from its values at the unit vectors and at
    zero, in the type and on the device of `like`.

    Layers are called, not read: what fetches, casts or adapts weights does so when a layer is called.
    """
    values = function(torch.eye(size + 1, size, dtype=like.dtype, device=like.device)).to(like.dtype)
    return Affine(values[:-1] - values[-1], values[-1])


class CastsInput(nn.Module):
    """A mixin for a layer: cast the input to the type that its weights have while it runs. Only then is that known,
    where diffusers casts weights layer by layer."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        return super().forward(x if x.dtype == dtype else x.to(dtype))


class Linear(CastsInput, nn.Linear):
    """A linear layer that takes any floating type."""


class Conv1d(CastsInput, nn.Conv1d):
    """A convolution over channels that takes any floating type."""


class Conv2d(CastsInput, nn.Conv2d):
    """A convolution over pixels that takes any floating type."""


class SEAttention(nn.Module):
    """Squeeze-and-Excitation: `logits = W2 relu(W1 mean(x))` (arXiv 1709.01507, eq. 2 and 3)."""

    statistics = ("mean",)

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.first = Linear(channels, hidden)
        self.last = Linear(hidden, channels)

    def forward(self, statistics: Tensor) -> Tensor:
        """Map statistics `(B, S, C)` to logits `(B, C)`; each statistic goes through the same layers."""
        return self.last(torch.relu(self.first(statistics))).sum(1)


class ECAAttention(nn.Module):
    """Efficient Channel Attention: a 1D convolution over the channels of `mean(x)` (arXiv 1910.03151, eq. 9 and 12)."""

    statistics = ("mean",)

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        kernel_size = int((math.log2(channels) + 1) / 2)
        kernel_size += 1 - kernel_size % 2
        self.last = Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, statistics: Tensor) -> Tensor:
        """Map statistics `(B, 1, C)` to logits `(B, C)`."""
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
        """Map statistics `(B, 2, C)` to logits `(B, C)`. A batch that checkpointing recomputes is not counted in the
        running statistics once more."""
        norm = self.last
        styles = (statistics * self.weight).sum(1).to(norm.weight.dtype)
        if self.training and in_backward_pass():
            copies = norm.running_mean.clone(), norm.running_var.clone()
            return nn.functional.batch_norm(styles, *copies, norm.weight, norm.bias, training=True, eps=norm.eps)
        return norm(styles)


class CBAMAttention(SEAttention):
    """Convolutional Block Attention, channel part: the layers of SE on mean and maximum (arXiv 1807.06521, eq. 2)."""

    statistics = ("mean", "max")


class TimeAttention(SEAttention):
    """A control: the layers of SE on a projection of the time embedding. It pools nothing and sees no features."""

    statistics = ()


class CBAMSpatialAttention(nn.Module):
    """Convolutional Block Attention, spatial part: a 7x7 convolution on the mean and the maximum over the channels
    (arXiv 1807.06521, eq. 3). It does not depend on the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.last = Conv2d(2, 1, kernel_size=7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Map a branch `(B, C, H, W)` to logits `(B, 1, H, W)`."""
        if x.ndim != 4:
            raise UsageError(f"attention 'cbam' needs branches (B, C, H, W), but one is {tuple(x.shape)}: use another.")
        return self.last(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1))


# Name of the attention in options, and its module.
ATTENTIONS: dict[str, type[nn.Module]] = {
    "lstm": DIALSTMCell,
    "se": SEAttention,
    "eca": ECAAttention,
    "srm": SRMAttention,
    "cbam": CBAMAttention,
    "time": TimeAttention,
}


def _bottleneck(in_features: int, out_features: int, reduction: int) -> nn.Sequential:
    hidden = max(in_features // reduction, 1)
    return nn.Sequential(Linear(in_features, hidden), nn.ReLU(), Linear(hidden, out_features))


def in_backward_pass() -> bool:
    """Return whether autograd is computing gradients in this thread: what runs then is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
