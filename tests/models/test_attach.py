"""What `attach` and `detach` refuse, and that the words say why."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from backbones import BACKBONES, CONDITION, PlainCNN, noise
from diffusers import AutoencoderKL, LatteTransformer3DModel, UNet2DConditionModel

from dia_diffusion import DIAUNet2DModel, attach, detach
from dia_diffusion.attention.forward_pass import GatedBlocks
from dia_diffusion.errors import UsageError
from dia_diffusion.models.attached import AttachedAttention
from tiny_unets import TINY, open_gates

ENDS = ["first.1", "second", "third"]


def unet(**arguments):
    return UNet2DConditionModel(**CONDITION | arguments)


def refusal(function, *args, **kwargs):
    with pytest.raises(UsageError) as error:
        function(*args, **kwargs)
    return str(error.value)


def test_a_second_attention_is_refused():
    model = unet()
    dia = attach(model)
    assert "UNet2DConditionModel has attention attached already: detach it first" in refusal(attach, model)
    assert model.dia is dia
    around = torch.nn.Module()
    around.unet = model
    assert "the part 'unet' of Module has attention attached" in refusal(attach, around)
    detach(model)
    attach(around)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv_shortcut"])
def test_a_branch_that_is_named_inside_of_a_block_of_diffusers_is_gated_there(layer):
    """Multiplying what that layer gives by hand is the same."""
    torch.manual_seed(0)
    model, inputs = unet().eval(), (noise(2, 4, 8, 8), 7, noise(2, 5, 12))
    plain = copy.deepcopy(model)
    name = next(name for name, _ in model.named_modules() if name.endswith(f".{layer}"))
    dia = attach(model, branches=[name])
    open_gates(model)
    with torch.no_grad(), dia.record() as maps:
        output = model(*inputs).sample
        gate = maps[name][:, :, None, None]
        plain.get_submodule(name).register_forward_hook(lambda module, args, features: features * gate)
        torch.testing.assert_close(output, plain(*inputs).sample)
    assert (gate - 1).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["lstm", "none"])
def test_a_model_with_attention_of_its_own_is_refused(attention):
    model = DIAUNet2DModel(**TINY, dia_attention=attention)
    words = refusal(attach, model)
    assert "'dia' of its own" in words
    assert "dia_attention" in words
    assert "no attention attached" in refusal(detach, model)


def test_detach_needs_an_attention():
    model = unet()
    assert refusal(detach, model) == "UNet2DConditionModel has no attention attached."
    attach(model)
    detach(model)
    refusal(detach, model)


def test_an_unknown_model_is_told_of_branches():
    words = refusal(attach, PlainCNN())
    for word in ("PlainCNN", "diffusers UNet", "ViT", "attach(model, inputs=", 'branches=["layer1.0.bn2"'):
        assert word in words


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (["second", "nowhere"], "PlainCNN has no module 'nowhere' (branches)"),
        (["third", "second", "third"], "name each end of a residual branch once, but are ['third', 'second', 'third']"),
        ([], "name each end of a residual branch once, but are []"),
        (["first"], "'first' (Sequential) does not say how many channels"),
    ],
)
def test_branches_must_be_there_once_and_have_channels(ends, words):
    assert words in refusal(attach, PlainCNN(), branches=ends)


class Wrong(PlainCNN):
    """Goes another way than its names say."""

    def __init__(self, *ways):
        super().__init__()
        self.ways = ways

    def forward(self, images):
        x = self.widen(self.stem(images))
        for way in self.ways:
            x = x + getattr(self, way)(x)
        return x


@pytest.mark.parametrize(
    ("ways", "words"),
    [
        (("third", "second"), "the branch 'second' ran after 'third': list branches in order"),
        (("second", "second", "third"), "the branch 'second' ran after 'second'"),
        (("second",), "the branch 'third' did not run in this forward pass: leave it out of branches"),
    ],
)
def test_named_branches_must_run_once_in_their_order(ways, words):
    model = Wrong(*ways)
    attach(model, branches=["second", "third"])
    with pytest.raises(UsageError) as error:
        model(noise(2, 3, 8, 8))
    assert words in str(error.value)
    # The mistake leaves nothing behind.
    detach(model)
    attach(model, branches=list(dict.fromkeys(ways)))
    if len(set(ways)) == len(ways):
        model(noise(2, 3, 8, 8))


def test_named_branches_must_have_the_channels_that_their_modules_say():
    model = PlainCNN()
    attach(model, branches=["second", "third"])
    second = model.second
    model.second = torch.nn.Conv2d(12, 5, 1)
    model.third = torch.nn.Conv2d(5, 12, 1)
    assert "'second' should have 12 channels in dimension 1, but is (2, 5, 8, 8)" in refusal(model, noise(2, 3, 8, 8))
    model.second = second
    second.register_forward_hook(lambda module, args, output: (output, None), prepend=True)
    assert "'second' should have 12 channels in dimension 1, but is tuple" in refusal(model, noise(2, 3, 8, 8))


def test_gates_follow_modules_that_are_replaced():
    """As adapters replace linear layers, and detectors the norms of their backbone."""
    backbone = BACKBONES["ResNetBackbone"]
    plain = backbone.make().eval()
    model = copy.deepcopy(plain)
    attach(model)
    open_gates(model)
    expected = model(**backbone.inputs(2)).feature_maps
    layers = [
        module for module in model.modules() if isinstance(getattr(module, "normalization", None), torch.nn.Module)
    ]
    for layer in layers:
        layer.normalization = copy.deepcopy(layer.normalization)
        layer.normalization._forward_hooks.clear()
    assert all(map(torch.equal, model(**backbone.inputs(2)).feature_maps, expected))
    # Blocks that are replaced as a whole are lost, and that is said.
    model.encoder = copy.deepcopy(plain.encoder)
    assert "its blocks were replaced after attach" in refusal(model, **backbone.inputs(2))
    detach(model)
    assert all(map(torch.equal, model(**backbone.inputs(2)).feature_maps, plain(**backbone.inputs(2)).feature_maps))


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention": "lstmm"},
        {"sharing": "all"},
        {"bridge": "jump"},
        {"init": "zero"},
        {"hidden_size": 0},
        {"reduction": -1},
        {"gate_slope": 0.0},
        {"sharing": "block"},
        {"attention": "se", "bridge": "skip"},
        {"sharing": "level", "bridge": "skip"},
        {"attention": "time", "time_conditioned": False},
    ],
    ids=str,
)
def test_wrong_arguments_get_the_words_of_the_unet(arguments):
    expected = refusal(DIAUNet2DModel, **TINY | {f"dia_{name}": value for name, value in arguments.items()})
    model = unet()
    assert refusal(attach, model, **arguments) == expected
    # And the model is as it was.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {type(module).__name__ for module in model.modules()} & {"FusedResnetBlock2D"} == set()


def test_what_a_model_lacks_is_refused():
    vit = BACKBONES["ViTForImageClassification"].make()
    assert "no embedding of the timestep" in refusal(attach, vit, time_conditioned=True)
    assert "no embedding of the timestep" in refusal(attach, PlainCNN(), branches=["second"], time_conditioned=True)
    assert "these branches hold tokens" in refusal(attach, vit, attention="cbam", sharing="block")
    assert "no input but the time embedding" in refusal(attach, vit, attention="time")


@pytest.fixture
def saved(tmp_path):
    attach(unet(), hidden_size=8).save_pretrained(tmp_path)
    return tmp_path


def test_an_attention_for_another_model_is_refused_by_name(saved, tmp_path):
    def words(model, **arguments):
        found = refusal(attach, model, pretrained=saved, **arguments)
        assert str(saved) in found
        assert not hasattr(model, "dia")
        return found

    vit = BACKBONES["ViTForImageClassification"].make()
    assert "made for diffusers UNet, and ViTForImageClassification is of ViT" in words(vit)
    assert "is of named branches" in words(PlainCNN(), branches=ENDS[1:])
    assert "made for 8 branches, and UNet2DConditionModel has 12" in words(unet(layers_per_block=2))
    wider = unet(block_out_channels=(8, 24))
    assert "'down_blocks.1.resnets.0.conv2' of 16 channels, here is 'down_blocks.1.resnets.0.conv2' of 24" in words(
        wider
    )
    context = unet(time_embedding_dim=40)
    assert "time embedding of width 32, here it is 40" in words(context)
    # An attention without a context fits whatever the width of the embedding is.
    attach(unet(), hidden_size=8, time_conditioned=False).save_pretrained(tmp_path / "untimed")
    attach(context, pretrained=tmp_path / "untimed")


def test_named_branches_of_other_names_are_refused(tmp_path):
    attach(PlainCNN(), branches=["second", "third"]).save_pretrained(tmp_path)
    words = refusal(attach, PlainCNN(), branches=["third", "second"], pretrained=tmp_path)
    assert "made for 'second' of 12 channels, here is 'third' of 12" in words


def test_a_saved_attention_brings_its_own_arguments(saved):
    words = refusal(attach, unet(), attention="se", hidden_size=16, pretrained=saved)
    assert "brings its own attention, hidden_size" in words
    assert "brings its own time_conditioned" in refusal(attach, unet(), time_conditioned=False, pretrained=saved)


def test_a_folder_without_an_attention_is_told(tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    reasons = {"none": "there is no such folder", ".": "no file named config.json", "unet": "it holds another model"}
    for folder, reason in reasons.items():
        with pytest.raises(UsageError, match=f"cannot load an attention from '{tmp_path / folder}': .*{reason}"):
            attach(unet(), pretrained=tmp_path / folder)


def test_an_autoencoder_is_gated_in_its_parts():
    """Pipelines call encode and decode, never its forward."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).eval()
    with pytest.raises(UsageError, match="attach to its encoder or its decoder"):
        attach(vae)
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        dia = attach(vae.decoder, hidden_size=8)
        assert torch.equal(vae.decode(latents).sample, expected)
        torch.nn.init.normal_(dia.decoders["8"].weight)
        assert not torch.equal(vae.decode(latents).sample, expected)


def state_of(model):
    return {
        name: (type(module), {*vars(module)}, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("attention", [None, "lstm"])
def test_a_part_of_a_model_that_has_attention_is_refused_without_damage(attention):
    model = unet() if attention is None else DIAUNet2DModel(**TINY)
    if attention is None:
        attach(model, hidden_size=8)
    before = state_of(model)
    for part in (model.mid_block, model.down_blocks[0].resnets[0]):
        assert "is a part of a model that has attention" in refusal(attach, part)
        assert "is a part of a model that has attention" in refusal(attach, part, branches=["conv1"])
    assert state_of(model) == before
    if attention is None:
        detach(model)
        attach(model.mid_block, hidden_size=8)


def test_containers_are_refused_and_modules_that_call_all_of_their_children_say_so():
    for container in (torch.nn.Sequential(PlainCNN()), torch.nn.ModuleList([PlainCNN()])):
        assert "calls all of its submodules" in refusal(attach, container, branches=["0.third"])
    assert "calls all of its submodules" in refusal(attach, torch.nn.ModuleDict({"a": PlainCNN()}))

    class All(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = PlainCNN()

        def forward(self, x):
            for child in self.children():
                x = child(x)
            return x

    model = All()
    expected = model(noise(2, 3, 8, 8))[0]
    attach(model, branches=[f"one.{end}" for end in ENDS])
    assert "put it into a module of your own" in refusal(model, noise(2, 3, 8, 8))
    detach(model)
    assert torch.equal(model(noise(2, 3, 8, 8))[0], expected)


def test_latte_is_refused_before_it_runs():
    """Some of its blocks have frames in the batch dimension, others positions."""
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8, "patch_size": 2}
    latte = LatteTransformer3DModel(
        **size, num_layers=1, caption_channels=8, cross_attention_dim=16, norm_type="ada_norm_single", video_length=2
    )
    before = state_of(latte)
    assert "LatteTransformer3DModel cannot be gated: a gate belongs to one sample" in refusal(attach, latte)
    assert state_of(latte) == before


class BasicBlock(torch.nn.Module):
    """As in timm's ResNets: with channel attention of its own between the last norm and the addition."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn2, self.se = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3), Scale()

    def forward(self, x):
        return x + self.se(self.bn2(self.conv1(x)))


class Scale(torch.nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


def test_the_gate_of_a_resnet_comes_behind_the_attention_of_its_own(tmp_path):
    model = torch.nn.Module()
    model.layer1 = torch.nn.Sequential(BasicBlock())
    model.forward = model.layer1.forward
    dia = attach(model, hidden_size=8)
    assert dia.config.ends == ["layer1.0.se"]
    # What an earlier version saved gates the norm, and still does.
    dia.save_pretrained(tmp_path)
    detach(model)
    config = json.loads((tmp_path / "config.json").read_text()) | {"ends": ["layer1.0.bn2"]}
    for entry in ("elements", "context"):
        del config[entry]
    (tmp_path / "config.json").write_text(json.dumps(config))
    attach(model, pretrained=tmp_path)
    assert model.layer1[0].bn2._forward_hooks
    assert not model.layer1[0].se._forward_hooks


def test_an_attention_does_not_take_its_model_along(tmp_path):
    model = PlainCNN()
    model.ballast = torch.nn.Parameter(torch.zeros(1_000_000))
    dia = attach(model, branches=ENDS, hidden_size=8)
    torch.save(dia, tmp_path / "dia.pt")
    assert (tmp_path / "dia.pt").stat().st_size < 200_000
    copied = copy.deepcopy(dia)
    assert sum(parameter.numel() for parameter in copied.parameters()) == sum(p.numel() for p in dia.parameters())
    seen, queue = set(), [copied]
    while queue:
        item = queue.pop()
        if id(item) not in seen and isinstance(item, torch.nn.Module | dict | list | tuple | GatedBlocks):
            seen.add(id(item))
            assert not isinstance(item, PlainCNN)
            queue += (
                item if isinstance(item, list | tuple) else (item if isinstance(item, dict) else vars(item)).values()
            )


def test_maps_of_an_attention_that_is_not_attached_are_refused(tmp_path):
    model = PlainCNN()
    dia = attach(model, branches=ENDS)
    dia.save_pretrained(tmp_path)
    assert "not attached to a model" in refusal(AttachedAttention.from_pretrained(tmp_path).record)
    detach(model)
    assert "not attached to a model" in refusal(dia.record)


def test_attaching_leaves_the_random_state_and_depends_on_it():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        weights.append(attach(unet(), hidden_size=8).state_dict()["encoders.8.weight"])
        torch.manual_seed(seed)
        model = unet()
        state = torch.get_rng_state()
        attach(model)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def replicate(module):
    """One replica, as torch.nn.parallel.replicate makes them: parameters are plain tensors there."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replicate(child)
    for name, parameter in module._parameters.items():
        copied._parameters.pop(name, None)
        setattr(copied, name, None if parameter is None else parameter * 1)
    for name, buffer in module._buffers.items():
        copied._buffers[name] = buffer
    return copied


def test_replicas_of_data_parallel_compute_the_same():
    model, inputs = unet().eval(), (noise(2, 4, 8, 8), 7, noise(2, 5, 12))
    attach(model, hidden_size=8)
    open_gates(model)
    with torch.no_grad():
        torch.testing.assert_close(replicate(model)(*inputs).sample, model(*inputs).sample)


def test_attached_after_offloading():
    """accelerate keeps the weights on the meta device between forward passes."""
    model, inputs = unet().eval(), (noise(2, 4, 8, 8), 7, noise(2, 5, 12))
    with torch.no_grad():
        expected = model(*inputs).sample
        cpu_offload(model, execution_device="cpu")
        dia = attach(model, hidden_size=8)
        assert {parameter.device.type for parameter in dia.parameters()} == {"cpu"}
        assert torch.equal(model(*inputs).sample, expected)
        open_gates(model)
        assert not torch.equal(model(*inputs).sample, expected)


def test_attached_to_a_compiled_model_that_has_run():
    model, inputs = PlainCNN().eval(), noise(2, 3, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = compiled(inputs)[0]
        dia = attach(compiled, branches=ENDS, hidden_size=8)
        assert model.dia is dia
        torch.testing.assert_close(compiled(inputs)[0], expected)
        open_gates(model)
        torch.testing.assert_close(compiled(inputs)[0], model(inputs)[0])
        assert not torch.allclose(compiled(inputs)[0], expected)
        detach(compiled)
        torch.testing.assert_close(compiled(inputs)[0], expected)
    torch._dynamo.reset()
