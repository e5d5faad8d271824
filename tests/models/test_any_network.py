"""Branches that one forward pass shows, on many networks. Another network is an entry in `networks.py`."""

import copy

import pytest
import torch
from backbones import outputs
from networks import NETWORKS

from dia_diffusion import DIAUNet2DModel, attach, detach, find_branches
from tiny_unets import open_gates
from training_runs import ROOT

# Frames are in its batch.
CHECKPOINTED = ("UNetMotionModel",)
COMPILED = ("Flux", "Swin", "pre-activation ResNet")


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    network = NETWORKS[request.param]
    return network, network.make().eval(), request.param


def predict(model, inputs):
    # With gradients, since torch's encoder has another, fused form without.
    return [output.detach() for output in outputs(model, inputs)]


def snapshot(model):
    """All that belongs to a model, but the values of its weights."""
    return {
        name: (
            type(module),
            {*vars(module)},
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


def test_each_network_keeps_the_promises(network, tmp_path):
    network, model, name = network
    inputs, fewer = network.inputs(2), network.inputs(1)
    plain, expected = copy.deepcopy(model), predict(model, inputs)
    before, random = snapshot(model), torch.get_rng_state()

    found = find_branches(model, **inputs)
    assert len(found) == network.branches, found
    assert len(found.not_gated) == network.not_gated, found
    assert (found.context and found.context.module) == network.context
    assert torch.equal(torch.get_rng_state(), random)
    assert snapshot(model) == before

    # Identity at the start.
    dia = attach(model, branches=found, hidden_size=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, predict(model, inputs), expected))

    # Each gate is asked for once and in order, and has a gradient for each parameter.
    open_gates(model)
    with dia.record() as maps:
        results = outputs(model, inputs)
    assert list(maps) == [branch.name for branch in found]
    assert all(gate.shape == (2, branch.width) for gate, branch in zip(maps.values(), found, strict=True))
    assert not all(map(torch.equal, results, expected))
    sum(output.float().square().mean() for output in results if output.requires_grad).backward()
    assert [key for key, parameter in dia.named_parameters() if parameter.grad is None] == []

    # Samples do not mix: one alone has the gates that it has beside another.
    single = {key: value[:1] if value.ndim == 2 else value for key, value in maps.items()}
    with dia.record() as maps:
        outputs(model, fewer)
    if all(torch.equal(a[:1], b) for a, b in zip(tensors(inputs), tensors(fewer), strict=True)):
        for key, gate in maps.items():
            torch.testing.assert_close(gate, single[key], atol=1e-4, rtol=1e-4)

    # Saved, taken off, and attached to another model from the folder alone.
    gated = predict(model, inputs)
    dia.save_pretrained(tmp_path)
    detach(model)
    assert snapshot(model) == before
    assert all(map(torch.equal, predict(model, inputs), expected))
    attach(plain, pretrained=tmp_path)
    assert all(map(torch.equal, predict(plain, inputs), gated))
    if name in CHECKPOINTED:
        plain.enable_gradient_checkpointing()
        sum(output.float().square().mean() for output in outputs(plain, inputs)).backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.dia.parameters(), dia.parameters(), strict=True))
    if name in COMPILED:
        compiled = torch.compile(plain, backend="eager", fullgraph=True)
        for ours, theirs in zip(predict(compiled, inputs), gated, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch._dynamo.reset()


def tensors(inputs):
    return [value for value in torch.utils._pytree.tree_leaves(inputs) if isinstance(value, torch.Tensor)]


def test_the_table_of_the_documentation_has_each_network():
    """`python tools/backbones_table.py` writes it."""
    rows = (line.split(" | ") for line in (ROOT / "docs" / "backbones.md").read_text().splitlines() if "`" in line)
    written = {row[0].removeprefix("| "): row for row in rows if len(row) == 5 and row[2].isdigit()}
    assert list(written) == list(NETWORKS)
    for name, network in NETWORKS.items():
        _, _, branches, context, not_gated = written[name]
        assert int(branches) == network.branches
        assert context.split("`")[-2 if network.context else 0] == (network.context or "zero")
        assert not_gated.split(":")[0].strip(" |") == str(network.not_gated or "")
    network = NETWORKS["UNet2DModel"]
    unet = DIAUNet2DModel.from_unet(network.make())
    found = [branch.name for branch in find_branches(unet, **network.inputs(2))]
    assert [name for name in found if "resnets" in name] == [
        f"{n}.conv2" for n in unet.attention_maps(**network.inputs(2))
    ]
    assert (len(found), sum("attentions" in name for name in found)) == (8 + 4, 4)
