"""Attention modules against the formulas of their papers written out."""

import pytest
import torch
from torch import nn

from dia_diffusion.attention.modules import CBAMAttention, DIALSTMCell, ECAAttention, SEAttention, SRMAttention


def test_cell_agrees_with_the_formulas_and_their_gradients():
    cell = DIALSTMCell(12, reduction=4).double()
    inputs = [torch.randn(5, 12, dtype=torch.double, requires_grad=True) for _ in range(3)]
    weights = list(cell.parameters())

    def written_out(g, h, c):
        u1, u1b, u2, u2b, v1, v1b, v2, v2b = weights
        u = (g @ u1.T + u1b).clamp(min=0) @ u2.T + u2b
        v = (h @ v1.T + v1b).clamp(min=0) @ v2.T + v2b
        gates = u + v
        i, f, z, o = gates[:, :12], gates[:, 12:24], gates[:, 24:36], gates[:, 36:]
        sigmoid = lambda x: 1 / (1 + (-x).exp())  # noqa: E731
        tanh = (z.exp() - (-z).exp()) / (z.exp() + (-z).exp())
        new_c = sigmoid(f) * c + sigmoid(i) * tanh
        return sigmoid(o) * sigmoid(new_c), new_c

    g, h, c = inputs
    ours, reference = cell(g, (h, c)), written_out(g, h, c)
    seeds = [torch.randn_like(t) for t in reference]
    grads = [
        torch.autograd.grad(sum((o * s).sum() for o, s in zip(out, seeds, strict=True)), [*inputs, *weights])
        for out in (ours, reference)
    ]
    for a, b in zip([*ours, *grads[0]], [*reference, *grads[1]], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert len(weights) == 8


def test_cell_passes_gradcheck():
    cell = DIALSTMCell(4, reduction=2).double()
    inputs = tuple(torch.randn(2, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda g, h, c: cell(g, (h, c)), inputs)


def test_se_agrees_with_its_formula():
    x = torch.randn(2, 8, 5, 5)
    module = SEAttention(8, reduction=2)
    squeezed = x.flatten(2).sum(-1) / 25
    hidden = (squeezed @ module.first.weight.T + module.first.bias).clamp(min=0)
    expected = hidden @ module.last.weight.T + module.last.bias
    torch.testing.assert_close(module(x.mean((2, 3))[:, None]), expected)


@pytest.mark.parametrize(("channels", "kernel"), [(8, 3), (64, 3), (128, 5), (256, 5), (512, 5)])
def test_eca_kernel_follows_the_number_of_channels(channels, kernel):
    module = ECAAttention(channels)
    assert module.last.weight.shape == (1, 1, kernel)
    pooled = torch.randn(2, 1, channels)
    padded = nn.functional.pad(pooled, (kernel // 2, kernel // 2))
    expected = sum(module.last.weight[0, 0, k] * padded[:, 0, k : k + channels] for k in range(kernel))
    torch.testing.assert_close(module(pooled), expected)


def test_srm_agrees_with_its_formula():
    module = SRMAttention(8)
    x = torch.randn(6, 8, 5, 5)
    style = torch.stack([x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-5).sqrt()], dim=1)
    z = style[:, 0] * module.weight[0] + style[:, 1] * module.weight[1]
    expected = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(module(style), expected, atol=1e-5, rtol=1e-4)


def test_cbam_runs_mean_and_maximum_through_the_same_layers():
    module = CBAMAttention(8, reduction=2)
    x = torch.randn(2, 8, 5, 5)
    mlp = nn.Sequential(module.first, nn.ReLU(), module.last)
    expected = mlp(x.mean((2, 3))) + mlp(x.amax((2, 3)))
    torch.testing.assert_close(module(torch.stack([x.mean((2, 3)), x.amax((2, 3))], 1)), expected)
