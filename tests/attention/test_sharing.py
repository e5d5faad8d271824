"""The rules of sharing: what the gates are, who shares a module, and how the state passes."""

import inspect
import itertools
from dataclasses import fields

import pytest
import torch
from torch import nn

from dia_diffusion import DIAUNet2DModel, attach
from dia_diffusion.attention.modules import ATTENTIONS
from dia_diffusion.attention.sharing import AttentionState, SharedAttention
from dia_diffusion.errors import UsageError
from dia_diffusion.options.attention import ATTENTION_NAMES, BRIDGES, AttentionOptions
from tiny_unets import TINY

WIDTHS = (8, 8, 16, 16, 8)


def run(attention: SharedAttention, branches: list[torch.Tensor], context=None):
    state = AttentionState(context=context)
    gates = []
    for branch in branches:
        gate, state = attention(branch, state)
        gates.append(gate)
    return gates


def branches(batch=3, size=4):
    return [torch.randn(batch, width, size, size) for width in WIDTHS]


def test_paper_lstm_by_level_is_the_cell_itself():
    attention = SharedAttention(WIDTHS, sharing="level", init="paper")
    features = branches()
    gates = run(attention, features)
    h = {8: torch.zeros(3, 8), 16: torch.zeros(3, 16)}
    c = dict(h)
    for x, gate, width in zip(features, gates, WIDTHS, strict=True):
        h[width], c[width] = attention.shared[str(width)](x.mean((2, 3)), (h[width], c[width]))
        torch.testing.assert_close(gate[:, :, 0, 0], h[width])


@pytest.mark.parametrize("kind", ["se", "eca", "srm"])
def test_paper_block_attention_is_the_sigmoid_of_the_module(kind):
    attention = SharedAttention(WIDTHS, kind, "block", init="paper").eval()
    x, *rest = branches()
    (gate, *_) = run(attention, [x, *rest])
    statistics = {"srm": lambda: torch.stack([x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-5).sqrt()], 1)}.get(
        kind, lambda: x.mean((2, 3))[:, None]
    )()
    torch.testing.assert_close(gate[:, :, 0, 0], torch.sigmoid(attention.shared["0"](statistics)))


@pytest.mark.parametrize("slope", [1.0, 4.0])
def test_identity_gates_are_twice_the_sigmoid_of_the_slope_times_the_module(slope):
    attention = SharedAttention(WIDTHS, "se", "block", gate_slope=slope)
    nn.init.normal_(attention.shared["0"].last.weight)
    x, *rest = branches()
    (gate, *others) = run(attention, [x, *rest])
    logits = slope * attention.shared["0"](x.mean((2, 3))[:, None])
    torch.testing.assert_close(gate[:, :, 0, 0], 2 / (1 + (-logits).exp()))
    assert all((other == 1).all() for other in others)


@pytest.mark.parametrize("sharing", ["network", "level", "block"])
def test_time_gates_depend_on_the_context_alone(sharing):
    attention = SharedAttention(WIDTHS, "time", sharing, hidden_size=6, init="paper", context_size=10)
    context = torch.randn(3, 10)
    gates = run(attention, branches(), context)
    assert all(map(torch.equal, gates, run(attention, branches(), context)))
    assert not any(map(torch.equal, gates, run(attention, branches(), context + 1)))
    projected = attention.initial_states[attention.keys[0]](nn.functional.silu(context))
    module = attention.shared[attention.keys[0]]
    expected = torch.sigmoid(module.last(module.first(projected).clamp(min=0)))
    if sharing == "network":
        expected = torch.sigmoid(attention.decoders["8"](expected))
    torch.testing.assert_close(gates[0][:, :, 0, 0], expected)
    loss = sum(gate.square().sum() for gate in gates)
    assert all(gradient is not None for gradient in torch.autograd.grad(loss, list(attention.parameters())))


def test_cbam_gate_is_channel_times_spatial():
    attention = SharedAttention(WIDTHS, "cbam", "block", init="paper")
    x, *_ = features = branches()
    gate = run(attention, features)[0]
    channel = torch.sigmoid(attention.shared["0"](torch.stack([x.mean((2, 3)), x.amax((2, 3))], 1)))[:, :, None, None]
    refined = x * channel
    planes = torch.cat([refined.mean(1, keepdim=True), refined.amax(1, keepdim=True)], 1)
    convolution = attention.spatial["0"].last
    spatial = torch.sigmoid(nn.functional.conv2d(planes, convolution.weight, convolution.bias, padding=3))
    torch.testing.assert_close(gate, channel * spatial)


COMBINATIONS = [
    (kind, sharing, bridge)
    for kind, sharing, bridge in itertools.product(
        ("lstm", "se", "eca", "srm", "cbam", "time"), ("network", "level", "block"), BRIDGES
    )
    if (kind == "lstm" and sharing != "block" and (sharing, bridge) != ("level", "skip"))
    or (kind != "lstm" and bridge == "carry")
]


@pytest.mark.parametrize(("kind", "sharing", "bridge"), COMBINATIONS)
def test_identity_gates_are_exactly_one(kind, sharing, bridge):
    attention = SharedAttention(WIDTHS, kind, sharing, bridge, hidden_size=6, context_size=10)
    for gate in run(attention, branches(), torch.randn(3, 10)):
        assert torch.equal(gate, torch.ones_like(gate))


@pytest.mark.parametrize(("kind", "sharing", "bridge"), COMBINATIONS)
def test_paper_gates_lie_between_zero_and_one_and_depend_on_the_input(kind, sharing, bridge):
    attention = SharedAttention(WIDTHS, kind, sharing, bridge, hidden_size=6, init="paper", context_size=10)
    for gate in run(attention, branches(), torch.randn(3, 10)):
        assert gate.min() > 0
        assert gate.max() < 1
        assert not torch.equal(gate[0], gate[1])


@pytest.mark.parametrize(
    ("sharing", "modules", "adapters"), [("network", 1, 4), ("level", 2, 0), ("block", len(WIDTHS), 0)]
)
def test_number_of_modules_by_sharing(sharing, modules, adapters):
    attention = SharedAttention(WIDTHS, "se", sharing)
    assert len(attention.shared) == modules
    assert len(attention.encoders) + len(attention.decoders) == adapters


def test_no_tensor_is_stored_twice():
    for kind, sharing, bridge in COMBINATIONS:
        attention = SharedAttention(WIDTHS, kind, sharing, bridge, context_size=10)
        pointers = [tensor.data_ptr() for tensor in attention.state_dict().values() if tensor.numel()]
        assert len(set(pointers)) == len(pointers)


def test_state_carries_from_block_to_block_and_starts_from_the_context():
    attention = SharedAttention((8, 8), hidden_size=6, init="paper", context_size=10)
    first, other, second = torch.randn(3, 1, 8, 4, 4).unbind()
    context = torch.randn(1, 10)
    gate = run(attention, [first, second], context)[1]
    assert not torch.equal(gate, run(attention, [other, second], context)[1])
    assert not torch.equal(gate, run(attention, [first, second], context + 1)[1])


def test_bridges_differ_as_they_say():
    """Two blocks on the way down, on one level each, then one on the way up, beside the first."""
    context, features = torch.randn(2, 10), torch.randn(3, 2, 8, 4, 4)
    for bridge in BRIDGES:
        attention = SharedAttention(
            (8, 8, 8),
            bridge=bridge,
            hidden_size=6,
            init="paper",
            context_size=10,
            levels=("down 0", "down 1", "up 0"),
            joins={"up 0": "down 0"},
        )
        if bridge == "skip":
            nn.init.normal_(attention.skip_logits)
        gates = run(attention, features, context)

        # The same by hand, from the cell alone.
        start = attention.initial_states["network"](nn.functional.silu(context)).chunk(2, dim=1)
        cell = attention.shared["network"]
        pooled = [attention.encoders["8"](x.mean((2, 3))) for x in features]
        first = cell(pooled[0], start)
        second = cell(pooled[1], start if bridge == "reset" else first)
        before_third = {"carry": second, "reset": start}.get(bridge)
        if bridge == "skip":
            shares = torch.sigmoid(attention.skip_logits)
            before_third = tuple((1 - s) * now + s * then for s, now, then in zip(shares, second, first, strict=True))
        third = cell(pooled[2], before_third)
        for gate, (hidden, _) in zip(gates, (first, second, third), strict=True):
            torch.testing.assert_close(gate[:, :, 0, 0], torch.sigmoid(attention.decoders["8"](hidden)))


def test_the_position_is_the_blocks_own():
    """A block that is left out, or run twice, does not move the others to modules that are not theirs."""
    attention = SharedAttention((8, 8, 16), "se", "block", init="paper")
    small, large = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)
    expected, _ = attention(large, AttentionState(position=2))
    for positions in ((0, 2), (0, 1, 1, 2), (2,)):
        state = AttentionState()
        for position in positions:
            gate, state = attention(large if position == 2 else small, state._replace(position=position))
        torch.testing.assert_close(gate, expected)


def test_tokens_are_pooled_as_pixels_are():
    """Branches of shape (B, N, C) get the gates of the same values as (B, C, H, W)."""
    for kind in ("lstm", "se", "eca", "srm"):
        pixels = SharedAttention((8, 8), kind, init="paper", hidden_size=6).eval()
        tokens = SharedAttention((8, 8), kind, init="paper", hidden_size=6, channel_dim=-1).eval()
        tokens.load_state_dict(pixels.state_dict())
        features = torch.randn(2, 3, 8, 4, 5)
        by_pixels, by_tokens = run(pixels, features), run(tokens, features.flatten(3).transpose(2, 3))
        for gate, other in zip(by_pixels, by_tokens, strict=True):
            torch.testing.assert_close(gate[:, :, 0, 0], other[:, 0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention": "sse"}, "lstm, se, eca, srm, cbam"),
        ({"sharing": "stage"}, "network, level, block"),
        ({"bridge": "long"}, "carry, skip, reset"),
        ({"init": "ones"}, "identity, paper"),
        ({"sharing": "block"}, "no meaning"),
        ({"attention": "se", "bridge": "reset"}, "'se' has none: leave it out"),
        ({"sharing": "level", "bridge": "skip"}, "state of its own"),
        ({"attention": "time"}, "no input but the time embedding"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"gate_slope": 0}, "gate_slope must be above 0"),
        ({"reduction": 0}, "reduction must be at least 1"),
        ({"attention": "cbam", "channel_dim": -1}, "tokens"),
    ],
)
def test_errors_say_what_to_choose(arguments, words):
    with pytest.raises(UsageError, match=words):
        SharedAttention(WIDTHS, **arguments)


def test_a_context_that_is_missing_is_said():
    with pytest.raises(UsageError, match="starts from a context"):
        run(SharedAttention(WIDTHS, context_size=10), branches())


def test_two_blocks_of_half_precision_do_not_overflow():
    """The sum over 128 x 128 pixels of mean 4 is more than half precision holds, their mean is not."""
    for kind in ("lstm", "se", "srm"):
        attention = SharedAttention((8, 8), kind, init="paper", hidden_size=6).half().eval()
        branch = torch.full((1, 8, 128, 128), 4.0, dtype=torch.float16)
        for gate in run(attention, [branch, branch]):
            assert gate.dtype == torch.float16
            assert gate.isfinite().all()


def test_the_attention_is_described_once():
    """The modules, the signatures of all that takes an attention, and the description of its options agree."""
    assert tuple(ATTENTIONS) == ATTENTION_NAMES
    for function, prefix in ((SharedAttention.__init__, ""), (attach, ""), (DIAUNet2DModel.__init__, "dia_")):
        parameters = inspect.signature(function).parameters
        for option in fields(AttentionOptions):
            assert parameters[prefix + option.name].default == option.default
    with pytest.raises(TypeError, match="dia_atention"):
        DIAUNet2DModel(**TINY, dia_atention="se")
    with pytest.raises(TypeError, match="atention"):
        attach(nn.Linear(2, 2), atention="se")
