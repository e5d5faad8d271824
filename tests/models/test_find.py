"""Small networks of each kind: the branches that `find_branches` finds, and why it does not gate others."""

import copy
import warnings

import diffusers
import pytest
import torch
from backbones import noise
from networks import NETWORKS
from torch import nn
from torch.nn import functional as F

from dia_diffusion import attach, find_branches
from dia_diffusion.errors import UsageError
from tiny_unets import open_gates


class Small(nn.Module):
    """A network of one block, whose forward is a function of the module and features `(B, 6, 8)`."""

    def __init__(self, block, **layers):
        super().__init__()
        self.block = block
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.block(self, x)


def in_place(m, x):
    x = x.clone()
    x += m.second(m.first(x))
    return x


def twice(m, x):
    for _ in range(2):
        x = x + m.first(x)
    return x


def parallel(m, x):
    return x + (m.first(x) + m.second(x))


def one_after_the_other(m, x):
    return (x + m.first(x)) + m.second(x)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return {"left": self.left(x), "right": (self.right(x) * 2, None)}


class Complex(nn.Module):
    """A layer of complex numbers on features without an imaginary part, whose own imaginary part is dropped."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=torch.cfloat)

    def forward(self, x):
        x = torch.complex(x, torch.zeros_like(x))
        return x + self.layer(x)


class Experts(nn.Module):
    """Experts that add to a buffer, beside a shared one: their sum is the branch."""

    def __init__(self):
        super().__init__()
        self.some, self.shared = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        out = torch.zeros_like(x)
        out[:, :3] += self.some(x[:, :3])
        return out + self.shared(x)


class Unknown(nn.Module):
    """As experts add up their tokens: the shortcut alone shows which dimension holds the channels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.zeros_like(x).index_add(1, torch.arange(6), torch.tensordot(x, self.weight, 1))


class Transposed(nn.Module):
    """A convolution over tokens: its channels are in dimension 1 before they are turned to the last."""

    def __init__(self, turn):
        super().__init__()
        self.turn = turn
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.turn(self.conv(x.mT))


TURNS = {
    "mT": lambda y: y.mT,
    "transpose": lambda y: y.transpose(1, 2),
    "permute by keyword": lambda y: y.permute(dims=(0, 2, 1)),
    "movedim": lambda y: torch.movedim(y, 1, -1),
    "swapdims": lambda y: y.swapdims(-1, -2),
}


@pytest.mark.parametrize("turn", TURNS)
def test_channels_are_followed_through_turns(turn):
    model = Small(lambda m, x: x + m.turned(x), turned=Transposed(TURNS[turn]))
    found = find_branches(model, noise(3, 6, 8))
    assert [(branch.name, branch.width, branch.channel_dim) for branch in found] == [("turned", 8, -1)]


def positions(m, x):
    place = m.third.bias.expand(x.shape)
    x = x + m.first(x + place)
    return x + m.second(x + place)


def learned_queries(m, x):
    queries = m.first.bias.expand(x.shape)
    return queries + m.second(queries * x)


def cut(m, x):
    both = m.first(torch.cat([x[:, :2], x[:, 2:]], 1))
    return torch.cat([x[:, :2] + both[:, :2], x[:, 2:] + both[:, 2:]], 1)


def scores(m, x):
    """Attention with relative positions, whose queries and scores are sums of what several layers put out."""
    query = m.first(x) + m.second(x.flip(1))
    score = query @ x.mT + m.third(x) @ x.flip(1).mT
    return x + m.act(m.first_out(score.softmax(-1) @ x))


def beside_a_block(m, x):
    """A convolution beside a whole residual block, as in DeBERTa V2: the stream goes through the block."""
    return m.norm(x + m.second(m.third(x))) + m.first(x)


FOUND = {
    "linear layers": (lambda m, x: x + m.second(m.first(x)), ["second"]),
    "in place": (in_place, ["second"]),
    "by a method in place": (lambda m, x: x.clone().add_(m.first(x)), ["first"]),
    "addcmul": (lambda m, x: torch.addcmul(x, m.first(x), torch.full((8,), 0.5)), ["first"]),
    "a shortcut with a layer": (lambda m, x: m.first(x) + m.second(m.third(x).relu()), ["second"]),
    "dropout and layer scale": (lambda m, x: x + 0.5 * F.dropout(m.first(x), 0.1, m.training), ["first"]),
    "parallel branches": (parallel, ["first", "second"]),
    "parallel branches in turn": (one_after_the_other, ["first", "second"]),
    "an output that is cut": (cut, ["first"]),
    "permuted": (lambda m, x: x + m.first(x.flip(1)).transpose(1, 2).contiguous().transpose(1, 2), ["first"]),
    "an element of a dictionary": (lambda m, x: x + m.several(x)["right"][0], ["several[1]"]),
    "a module that torch knows no layer of": (lambda m, x: m.norm(x) + m.unknown(m.norm(x)), ["unknown"]),
    "an activation that keeps scales": (lambda m, x: x + F.relu(m.first(x)), ["first"]),
    "reshaped like another": (lambda m, x: x + m.first(x.flatten(1).view_as(x)).view_as(x), ["first"]),
    "lerp": (lambda m, x: torch.lerp(x, m.first(x), 0.5), ["first"]),
    "positions that are added again": (positions, ["first", "second"]),
    "learned queries": (learned_queries, ["second"]),
    "a module without attributes": (lambda m, x: x + m.act(m.first(x)), ["act"]),
    "subtracted": (lambda m, x: x - m.first(x), ["first"]),
    "sums in attention": (scores, ["act"]),
    "sums in a mixture of experts": (lambda m, x: x + m.experts(x), ["experts"]),
    "beside a block": (beside_a_block, ["second", "first"]),
    "complex numbers": (lambda m, x: m.complex(x).real, ["complex.layer"]),
}


@pytest.mark.parametrize("name", FOUND)
def test_branches_of_small_networks(name):
    block, ends = FOUND[name]
    layers = {"third": nn.Linear(8, 8), "first_out": nn.Linear(8, 8), "several": Several(), "act": nn.GELU()}
    model = Small(block, **layers, unknown=Unknown(), norm=nn.LayerNorm(8), complex=Complex(), experts=Experts()).eval()
    x = noise(3, 6, 8)
    found = find_branches(model, x)
    assert [branch.name for branch in found] == ends, found
    assert all(branch.width == 8 for branch in found)
    assert found.not_gated == []
    # The gates multiply what is added: with all gates at zero the network is its shortcut.
    expected = model(x)
    dia = attach(model, branches=found)
    assert torch.equal(model(x), expected)
    for decoder in dia.decoders.values():
        nn.init.zeros_(decoder.weight)
        nn.init.constant_(decoder.bias, -200)
    shortcuts = {"a shortcut with a layer": model.first, "a module that torch knows no layer of": model.norm}
    shortcuts |= {"beside a block": model.norm}
    shortcuts |= {"lerp": lambda x: x / 2, "learned queries": model.first.bias.expand_as}
    shortcut = shortcuts[name](x) if name in shortcuts else x
    torch.testing.assert_close(model(x), shortcut)


NOT_GATED = {
    "a block that runs twice": (twice, "'first' runs 2 times in a forward pass"),
    "an activation as a function": (lambda m, x: x + m.first(x).sin(), "'sin' stands between its last module"),
    "a layer that is no module": (lambda m, x: x + F.linear(x, m.first.weight), "no module puts out its branch"),
    "two layers": (lambda m, x: m.first(x) + m.second(x), r"both sides come through layers \(1 and 1\)"),
    "nodes of a graph": (
        lambda m, x: x + m.first(x.flip(0, 1)), "'first' mixes the samples: one changes with another"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_GATED)
def test_what_cannot_be_gated_is_told(name):
    block, words = NOT_GATED[name]
    model = Small(block, attention=nn.MultiheadAttention(8, 2))
    found = find_branches(model, noise(3, 6, 8))
    assert len(found) == 0
    assert len(found.not_gated) == (2 if name == "a block that runs twice" else 1)
    with pytest.raises(UsageError, match=f"no residual branches of Small can be gated.*{words}"):
        attach(model, inputs=noise(3, 6, 8))
    assert not hasattr(model, "dia")


def windows(m, x):
    x = x.reshape(-1, 2, 8)
    return (x + m.first(x)).reshape(-1, 6, 8)


def windows_in_turn(m, x):
    """The first windows of all samples, then their second ones."""
    parts = torch.cat(x.chunk(3, 1))
    return torch.cat((parts + m.first(parts)).chunk(3), 1)


def sequence_first(m, x):
    x = x.transpose(0, 1)
    x = x + m.attention(x, x, x, need_weights=False)[0]
    return (x + m.second(m.first(x).relu())).transpose(0, 1)


def frames(m, x):
    """Six frames of eight channels with 2 x 2 pixels, in the batch; the shortcut has a layer."""
    x = x.flatten(0, 1)[:, :, None, None].expand(-1, -1, 2, 2)
    return (x + m.conv(x)).mean((2, 3)).view(-1, 6, 8)


FOLDED = {
    "windows": (windows, ["first"]),
    "windows in turn": (windows_in_turn, ["first"]),
    "rows of tokens": (lambda m, x: (x.reshape(-1, 8) + m.first(x.reshape(-1, 8))).view(x.shape), ["first"]),
    "frames": (frames, ["conv"]),
    "samples in dimension 1": (sequence_first, ["attention[0]", "second"]),
}


@pytest.mark.parametrize("time", [0, 1])
def test_the_tokens_of_a_causal_model_are_no_samples(time):
    """The first token changes with no other, as a sample does not."""
    model, x = Small(lambda m, x: x + m.first(x.cumsum(time))).eval(), noise(3, 6, 8).transpose(0, 1 - time)
    dia = attach(model, inputs=x, hidden_size=4)
    with dia.record() as maps:
        model(x)
    assert [gate.shape for gate in maps.values()] == [(3, 8)]
    open_gates(model)
    for sample in range(3):
        torch.testing.assert_close(model(x.narrow(1 - time, sample, 1)), model(x).narrow(1 - time, sample, 1))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", FOLDED)
def test_samples_that_are_not_in_the_first_dimension_have_gates_of_their_own(name, dim, tmp_path):
    """A sample has the output that it has alone; the gates are of the pooled branch; with gates of 0 nothing is added.
    The inputs may hold the samples in dimension 1, too."""
    block, ends = FOLDED[name]
    given = (lambda m, x: block(m, x.transpose(0, 1)).transpose(0, 1)) if dim else block

    # Tokens see each other, so that one is no sample.
    def mixed(m, x):
        return given(m, x + m.mixer(x.movedim(1 - dim, -1)).movedim(-1, 1 - dim))

    layers = {"attention": nn.MultiheadAttention(8, 2), "conv": nn.Conv2d(8, 8, 1), "mixer": nn.Linear(6, 6)}
    model, x = Small(mixed, **layers).eval(), noise(3, 6, 8).transpose(0, dim)
    plain, expected = copy.deepcopy(model), model(x)
    found = find_branches(model, x)
    assert [branch.name for branch in found] == ["mixer", *ends], found
    dia = attach(model, branches=found, hidden_size=4)
    assert torch.equal(model(x), expected)
    open_gates(model)
    with dia.record() as maps:
        output = model(x)
    assert {gate.shape for gate in maps.values()} == {(3, 8), (3, 6)} - ({(3, 6)} if "mixer" not in maps else set())
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in dia.parameters())
    for sample in range(3):
        torch.testing.assert_close(model(x.narrow(dim, sample, 1)), output.narrow(dim, sample, 1))
    if (name, dim) == ("windows in turn", 1):
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x=x), output)
        torch._dynamo.reset()
    dia.save_pretrained(tmp_path)
    attach(plain, pretrained=tmp_path)
    assert torch.equal(plain(x=x), output)
    with pytest.raises(UsageError, match="the input 'x' must hold a tensor"):
        plain(x=None)


@pytest.mark.parametrize(
    "x", [noise(1, 6, 8), torch.ones(2, 6, 8), torch.zeros(2, 6, 8, device="meta")], ids=["one", "equal", "meta"]
)
def test_samples_that_do_not_differ_do_not_show_whose_the_rows_are(x):
    (line,) = find_branches(Small(windows).to(x.device), x).not_gated
    assert f"'first' puts out {3 * len(x)} rows for {len(x)} samples: give inputs of at least two samples" in line


def test_compiled_code_is_watched_as_it_was_written():
    model = Small(lambda m, x: x + m.first(x))
    model.compile(backend="aot_eager")
    model(noise(3, 6, 8))
    assert [branch.name for branch in find_branches(model, noise(3, 6, 8))] == ["first"]


def test_a_network_without_additions_is_told():
    with pytest.raises(UsageError, match="no residual branches of Small can be gated"):
        attach(Small(lambda m, x: m.first(x)), branches=find_branches(Small(lambda m, x: m.first(x)), noise(3, 6, 8)))
    with pytest.raises(UsageError, match="shows no sum of two tensors of one shape"):
        attach(Small(lambda m, x: m.first(x)), inputs=noise(3, 6, 8))


@torch.jit.script
def scripted_gelu(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@torch.jit.script
def scripted_addition(x, branch):
    return x + 0.5 * branch


def test_scripted_parts_are_seen():
    def block(m, x):
        x = m.scripted(x)
        return scripted_addition(x, m.second(scripted_gelu(m.first(x))))

    model = Small(block, scripted=torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout()))).train()
    found = find_branches(model, noise(3, 6, 8))
    assert [branch.name for branch in found] == ["second"]
    assert model.scripted.training


def test_a_scripted_model_is_refused():
    with pytest.raises(UsageError, match=r"is compiled by torch\.jit, .* take the model before torch\.jit\.script"):
        find_branches(torch.jit.script(nn.Linear(8, 8)), noise(3, 6, 8))


class Batch:
    """Inputs of a model as attributes."""

    def __init__(self, x):
        self.x = x


def test_inputs_may_be_an_object_that_holds_tensors():
    model = Small(lambda m, batch: batch.x + m.first(batch.x))
    dia = attach(model, inputs=(Batch(noise(3, 6, 8)),))
    with dia.record() as maps:
        model(Batch(noise(3, 6, 8)))
    assert maps["first"].shape == (3, 8)


def test_a_network_of_vectors():
    model = Small(lambda m, x: x + m.second(m.first(x).relu()))
    x = noise(5, 8)
    dia = attach(model, inputs=x, hidden_size=4)
    open_gates(model)
    with dia.record() as maps:
        y = model(x)
    branch = model.second.bias + F.linear(model.first(x).relu(), model.second.weight)
    torch.testing.assert_close(y, x + branch * maps["second"])


def test_the_shortcut_may_be_on_either_side_and_named_branches_need_no_attributes():
    model = Small(lambda m, x: m.act(m.first(x)) + x, act=nn.GELU())
    with pytest.raises(UsageError, match=r"'act' .* does not say how many channels"):
        attach(model, branches=["act"])
    dia = attach(model, branches=["act"], inputs={"x": noise(3, 6, 8)})
    assert (dia.widths, dia.channel_dims) == ((8,), (-1,))


class Timed(nn.Module):
    """Blocks that are given an embedding, which a module makes, and another one that only the first is given."""

    def __init__(self):
        super().__init__()
        self.embed, self.other = nn.Linear(1, 5), nn.Linear(1, 3)
        self.blocks = nn.ModuleList([TimedBlock() for _ in range(2)])

    def forward(self, x, t):
        embedding, other = self.embed(t), self.other(t)
        x = x + other.mean(1)[:, None, None]
        for block in self.blocks:
            x = block(x, embedding)
        return x


class TimedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.layer = nn.Linear(5, 8), nn.Linear(8, 8)

    def forward(self, x, embedding):
        return x + self.layer(x + self.time(embedding)[:, None])


def test_the_context_is_found_or_named():
    model, inputs = Timed(), (noise(2, 6, 8), noise(2, 1))
    found = find_branches(model, *inputs)
    assert (found.context.module, found.context.size) == ("embed", 5)
    assert "Context: the output of 'embed', of width 5" in str(found)
    assert list(found.embeddings)[:2] == ["embed", "other"]
    assert attach(model, branches=found).config.context_size == 5
    model = Timed()
    dia = attach(model, inputs=inputs, context="other", hidden_size=4)
    open_gates(model)
    assert dia.config.context_size == 3
    with dia.record() as maps:
        model(*inputs)
        before = dict(maps)
        nn.init.normal_(model.other.weight, std=5.0)
        model(*inputs)
    assert not torch.equal(maps["blocks.0.layer"], before["blocks.0.layer"])
    with pytest.raises(UsageError, match=r"'blocks' returns no tensor .* Modules that do: embed, other"):
        attach(Timed(), inputs=inputs, context="blocks")
    with pytest.raises(UsageError, match="give inputs, so that a forward pass shows them"):
        attach(Timed(), branches=["blocks.0.layer"], context="embed")


def test_branches_can_be_left_out_and_names_stay_possible():
    inputs = (noise(2, 6, 8), noise(2, 1))
    found = find_branches(Timed(), *inputs)
    kept = found.without(r"blocks\.0")
    assert [branch.name for branch in kept] == ["blocks.1.layer"]
    assert kept.context == found.context
    dia = attach(Timed(), branches=[branch for branch in found if "0" in branch.name])
    assert (dia.config.names, dia.config.context_size) == (["blocks.0.layer"], None)


class Careless(nn.Module):
    """Keeps what it should not."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.drop = nn.BatchNorm1d(6), nn.Linear(8, 8), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.cache = x
        torch.rand(3)
        return x + self.drop(self.layer(self.norm(x)))


def test_nothing_of_the_model_changes():
    model = Careless().train()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert len(find_branches(model, noise(2, 6, 8))) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "cache")
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UsageError, match="the inputs hold no tensor"):
        find_branches(model, "x")


def test_an_error_of_the_model_leaves_nothing_behind():
    model = Careless().train()
    with pytest.raises(RuntimeError):
        find_branches(model, noise(2, 5, 8))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_flux_as_it_is_published_on_the_meta_device():
    """19 double blocks with four branches and 38 single ones, 12 billion parameters."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        inputs = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }
        dia = attach(model, inputs=inputs)
    assert sum(parameter.numel() for parameter in model.parameters()) > 11.9e9
    assert len(dia.widths) == 19 * 4 + 38
    assert set(dia.widths) == {3072}
    assert dia.config.context == ["time_text_embed", None, None]
    assert all(parameter.device.type == "meta" for parameter in dia.parameters())


def test_a_causal_model_is_warned_about():
    """A gate from the mean over all tokens lets a token see later ones."""
    words = {"input_ids": torch.tensor([[5, 7, 9]])}
    with pytest.warns(UserWarning, match=r"LlamaModel is causal, .* a token sees later ones"):
        attach(NETWORKS["Llama"].make(), inputs=words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(NETWORKS["BERT"].make(), inputs=words)
