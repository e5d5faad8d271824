"""Channel attention modules, on statistics pooled from a residual branch; `sharing.py` puts them to work.

Notation: B batch, C channels, S pooled statistics.

Papers: DIA (Huang et al., arXiv 2210.16101 and 1905.10671), SE (Hu et al., CVPR 2018), ECA (Wang et al., CVPR 2020),
SRM (Lee et al., ICCV 2019), CBAM (Woo et al., ECCV 2018).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

LSTMState = tuple[Tensor, Tensor]


class CellMatrices(NamedTuple):
    """The layers of a `DIALSTMCell` as one affine map before its ReLU, of both bottlenecks, and one behind it.

    From pooled features and the state h to what the ReLU takes: `(2 * C, 2 * C/r)` and `(2 * C/r,)`. From there to the
    gates i, f, 2 z, o: `(2 * C/r, 4 * C)` and `(4 * C,)`.
    """

    hidden: Tensor
    hidden_offset: Tensor
    gates: Tensor
    gates_offset: Tensor


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

    def matrices(self, like: Tensor, layer_dtype: torch.dtype | None = None) -> CellMatrices:
        """The cell's layers multiplied out, once for all blocks that share it.

        Args:
            like (`Tensor`): Has the type and place that the matrices should have.
            layer_dtype (`torch.dtype`, *optional*): What the layers take, where it is not that type.
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
            *_affine_map(hidden, 2 * self.channels, like, layer_dtype),
            *_affine_map(gates, 2 * pooled_out.in_features, like, layer_dtype),
        )

    def forward(self, pooled: Tensor, state: LSTMState, matrices: CellMatrices | None = None) -> LSTMState:
        """Maps pooled features `(B, C)` and a state `(h, c)`, each `(B, C)`, to the next state; h is in (0, 1).

        With `gates = U(pooled) + V(h)` of the two bottlenecks U and V:
        `c' = sigmoid(f) c + sigmoid(i) tanh(z)` and `h' = sigmoid(o) sigmoid(c')`.
        """
        h, c = state
        matrices = self.matrices(pooled) if matrices is None else matrices
        hidden = torch.addmm(matrices.hidden_offset, torch.cat([pooled, h], dim=1), matrices.hidden).relu()
        i, f, z, o = torch.addmm(matrices.gates_offset, hidden, matrices.gates).sigmoid().chunk(4, dim=1)
        # tanh(z) is 2 sigmoid(2 z) - 1: one call serves all gates.
        c = torch.addcmul(f * c - i, i, z, value=2)
        return o * torch.sigmoid(c), c


def _affine_map(
    function: Callable[[Tensor], Tensor], size: int, like: Tensor, layer_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Matrix and offset of an affine function of vectors `(B, size)`, from its values at the unit vectors and at zero.

    The layers are called, not read: what fetches, casts or adapts weights does so when a layer is called.
    """
    values = function(torch.eye(size + 1, size, dtype=layer_dtype or like.dtype, device=like.device)).to(like.dtype)
    return values[:-1] - values[-1], values[-1]


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

    def forward(self, statistics: Tensor, again: bool = False) -> Tensor:
        """Maps statistics `(B, 2, C)` to logits `(B, C)`. With `again` a batch that was seen before is not counted
        in the running statistics once more."""
        styles = (statistics * self.weight).sum(1)
        if again and self.training:
            norm = self.last
            copies = norm.running_mean.clone(), norm.running_var.clone()
            return nn.functional.batch_norm(styles, *copies, norm.weight, norm.bias, training=True, eps=norm.eps)
        return self.last(styles)


class CBAMAttention(SEAttention):
    """Convolutional Block Attention, channel part: the layers of SE on mean and maximum (arXiv 1807.06521, eq. 2)."""

    statistics = ("mean", "max")


class TimeAttention(SEAttention):
    """A control: the layers of SE on a projection of the time embedding. It pools nothing and sees no features, so what
    it gains is gained without attention."""

    statistics = ()


class CBAMSpatialAttention(nn.Module):
    """Convolutional Block Attention, spatial part: a 7x7 convolution on the mean and the maximum over the channels
    (arXiv 1807.06521, eq. 3). It does not depend on the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps a branch `(B, C, H, W)` to logits `(B, 1, H, W)`."""
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
    return nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, out_features))
