"""What holds for every backbone that attention is attached to. Another backbone is a line in `backbones.py`."""

import copy
import pickle

import pytest
import torch
from backbones import BACKBONES, outputs
from torch import distributed
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from dia_diffusion import detach
from tiny_unets import open_gates

ATTENTIONS = [
    {"hidden_size": 8},
    {"sharing": "level", "bridge": "reset", "init": "paper"},
    {"attention": "se", "sharing": "block"},
]


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


def attached(backbone, model=None, **arguments):
    """A model whose gates differ from one."""
    model = (model or backbone.make()).eval()
    # Of a narrow one all rectified units may be zero for each image.
    backbone.attach(model, **{"hidden_size": 32} | arguments)
    return open_gates(model)


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(0)  # class labels are dropped at random in training
    sum(output.float().square().mean() for output in outputs(model, inputs)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def predict(model, inputs):
    return outputs(model, inputs)


def assert_equal(some, others):
    assert len(some) == len(others) > 0
    assert all(map(torch.equal, some, others))


def test_it_starts_as_the_identity_and_detach_restores_the_model_to_the_last_bit(backbone):
    model, inputs = backbone.make().eval(), backbone.inputs(2)
    expected, before = predict(model, inputs), copy.deepcopy(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for arguments in ({}, {"attention": "se", "sharing": "block"}, {"attention": "srm", "sharing": "level"}):
        dia = backbone.attach(model, **arguments)
        assert len(dia.widths) == backbone.branches
        assert model.dia is dia
        assert_equal(predict(model, inputs), expected)
        assert not all(map(torch.equal, predict(open_gates(model), inputs), expected))
        detach(model)
        assert_equal(predict(model, inputs), expected)
    assert not any(name.startswith("dia") for name in model.state_dict())
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in before.named_modules()
    }
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gates_multiply_the_branches(backbone):
    """The recorded gates, put by hand behind the branch ends of the plain model, give the same output."""
    plain, inputs = backbone.make().eval(), backbone.inputs(2)
    model = attached(backbone, copy.deepcopy(plain))
    with model.dia.record() as maps:
        expected = predict(model, inputs)
    assert list(maps) == list(model.dia.config.names)
    for end, gate, dim in zip(model.dia.config.ends, maps.values(), model.dia.channel_dims, strict=True):
        assert not torch.equal(gate[0], gate[1])

        def multiply(module, arguments, output, gate=gate, dim=dim):
            shape = [len(gate)] + [1] * (output.ndim - 1)
            shape[dim] = gate.shape[1]
            return output * gate.reshape(shape)

        plain.get_submodule(end).register_forward_hook(multiply)
    for ours, theirs in zip(expected, predict(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arguments", ATTENTIONS, ids=str)
def test_every_parameter_of_the_attention_has_a_gradient(backbone, arguments):
    model = backbone.make()
    backbone.attach(model, **arguments)
    found = gradients(model, backbone.inputs(3))
    assert [name for name, gradient in found.items() if name.startswith("dia.") and gradient is None] == []


def test_the_attention_alone_can_be_trained(backbone):
    model, inputs = backbone.make().eval(), backbone.inputs(2)
    backbone.attach(model)
    model.requires_grad_(False)
    model.dia.requires_grad_(True)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    start = predict(model, inputs)
    gradients(model, inputs)
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(name.startswith("dia.decoders") for name in changed)
    assert not all(map(torch.equal, predict(model, inputs), start))


def test_checkpointing_is_exact_whenever_it_is_switched_on(backbone):
    inputs = backbone.inputs(2)
    model = backbone.make()
    enable = getattr(model, "enable_gradient_checkpointing", getattr(model, "gradient_checkpointing_enable", None))
    if not getattr(model, "_supports_gradient_checkpointing", getattr(model, "supports_gradient_checkpointing", False)):
        pytest.skip("the model has no gradient checkpointing")
    backbone.attach(model, hidden_size=8)
    open_gates(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(model, inputs)
    enable()
    for name, gradient in gradients(model, inputs).items():
        assert (gradient is None) == (expected[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], msg=name)
    # Two forward passes before one backward pass.
    other = backbone.inputs(3)
    model.zero_grad()
    losses = []
    for pair in (inputs, other):
        torch.manual_seed(0)
        losses.append(sum(output.float().square().mean() for output in outputs(model, pair)))
    sum(losses).backward()
    together = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients(model, other).items():
        if gradient is not None:
            torch.testing.assert_close(together[name], gradient + expected[name], msg=name, atol=1e-4, rtol=1e-4)


def test_it_compiles_without_a_break(backbone):
    inputs = backbone.inputs(2)
    model = attached(backbone)
    expected = predict(model, inputs)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        for ours, theirs in zip(predict(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_it_is_saved_and_loaded_alone(backbone, tmp_path):
    plain, inputs = backbone.make().eval(), backbone.inputs(2)
    model = attached(backbone, copy.deepcopy(plain))
    model.dia.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    backbone.attach(plain, pretrained=tmp_path)
    assert_equal(predict(plain, inputs), predict(model, inputs))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_independent(backbone, way):
    model, inputs = attached(backbone), backbone.inputs(2)
    expected, copied = predict(model, inputs), way(model)
    assert_equal(predict(copied, inputs), expected)
    detach(copied)
    assert_equal(predict(model, inputs), expected)
    assert not all(map(torch.equal, predict(copied, inputs), expected))


def test_half_precision_is_that_of_the_model_at_the_start(backbone):
    def half(inputs):
        return {
            name: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }

    model, inputs = backbone.make().eval().bfloat16(), backbone.inputs(2)
    inputs = half(inputs)
    if isinstance(inputs.get("added_cond_kwargs"), dict):
        inputs["added_cond_kwargs"] = half(inputs["added_cond_kwargs"])
    expected = predict(model, inputs)
    # In full precision on a model in half, and then in half as well.
    backbone.attach(model, hidden_size=8)
    assert_equal(predict(model, inputs), expected)
    assert all(output.isfinite().all() for output in predict(open_gates(model), inputs))
    assert all(output.isfinite().all() for output in predict(model.bfloat16(), inputs))


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_training(backbone, process_group):
    """DDP names parameters without a gradient at the second step."""
    model = attached(backbone)
    expected = gradients(model, backbone.inputs(2))
    unused = {name for name, gradient in expected.items() if gradient is None}
    for name in unused:
        assert not name.startswith("dia.")
        model.get_parameter(name).requires_grad_(False)
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        for name, gradient in gradients(parallel, backbone.inputs(2)).items():
            if gradient is not None:
                torch.testing.assert_close(gradient, expected[name.removeprefix("module.")], msg=name)
