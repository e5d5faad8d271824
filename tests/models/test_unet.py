"""DIAUNet2DModel against UNet2DModel with the same weights, for everything that UNet2DModel can do."""

import copy
import json
import threading

import pytest
import torch
from diffusers import UNet2DModel

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.errors import UsageError
from dia_diffusion.models.unet import DOWN_BLOCK_TYPES, UP_BLOCK_TYPES

SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
PAIRS = [(down, up) for down in DOWN_BLOCK_TYPES for up in UP_BLOCK_TYPES if down.startswith("K") == up.startswith("K")]
FEATURES = {
    "no_mid": {"mid_block_type": None},
    "mid_without_attention": {"add_attention": False},
    "mid_scale": {"mid_block_scale_factor": 1.5},
    "fourier": {"time_embedding_type": "fourier"},
    "learned_time": {"time_embedding_type": "learned", "num_train_timesteps": 100},
    "time_embedding_dim": {"time_embedding_dim": 48},
    "centred": {"center_input_sample": True},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "classes": {"num_class_embeds": 5},
    "timestep_class": {"class_embed_type": "timestep"},
    "identity_class": {"class_embed_type": "identity"},
    "resnet_resampling": {
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "prefixed_names": {"down_block_types": ("UNetResDownBlock2D",) * 2, "up_block_types": ("UNetResUpBlock2D",) * 2},
    "grey_three_levels": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
    "act_and_head_dim": {"act_fn": "gelu", "attention_head_dim": None},
    "downsample_padding": {"downsample_padding": 0, "down_block_types": ("DownBlock2D", "DownBlock2D")},
}


def inputs(config, batch=2):
    sample = torch.randn(batch, config.get("in_channels", 3), 16, 16)
    timestep = torch.tensor([3, 70])[:batch]
    labels = None
    if "num_class_embeds" in config or config.get("class_embed_type") == "timestep":
        labels = torch.tensor([1, 4])[:batch]
    elif config.get("class_embed_type") == "identity":
        labels = torch.randn(batch, 4 * config["block_out_channels"][0])
    return sample, timestep, labels


def open_gates(model, scale=0.5):
    """Moves the last layers away from zero, so that the gates differ from one."""
    for layer in model.dia.decoders.values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=scale)


def assert_parity(config):
    unet = UNet2DModel(**config).eval()
    sample, timestep, labels = inputs(config)
    with torch.no_grad():
        expected = unet(sample, timestep, labels).sample
        identity = DIAUNet2DModel.from_unet(unet)
        assert torch.equal(identity(sample, timestep, labels).sample, expected)
        none = DIAUNet2DModel.from_unet(unet, dia_attention="none")
        assert torch.equal(none(sample, timestep, labels).sample, expected)
        assert none.state_dict().keys() == unet.state_dict().keys()
        extra = identity.state_dict().keys() - unet.state_dict().keys()
        assert unet.state_dict().keys() < identity.state_dict().keys()
        assert all(key.startswith("dia.") for key in extra)
        # The gates do act: moved away from one, they change the output.
        open_gates(identity)
        assert not torch.allclose(identity(sample, timestep, labels).sample, expected, atol=1e-4)
        assert torch.equal(identity.to_unet()(sample, timestep, labels).sample, expected)


@pytest.mark.parametrize(("down", "up"), PAIRS)
def test_parity_for_every_pair_of_block_types(down, up):
    assert_parity(SMALL | {"down_block_types": (down, down), "up_block_types": (up, up)})


@pytest.mark.parametrize("feature", FEATURES)
def test_parity_for_every_feature(feature):
    assert_parity(SMALL | FEATURES[feature])


def test_every_block_type_that_unet2dmodel_runs_is_known():
    """The lists of block types hold exactly those with which UNet2DModel itself gets through a forward pass."""
    from diffusers.models.unets import unet_2d_blocks

    def runs(down, up):
        try:
            model = UNet2DModel(**SMALL | {"down_block_types": (down,) * 2, "up_block_types": (up,) * 2})
            return model(torch.randn(1, 3, 16, 16), 1).sample.shape == (1, 3, 16, 16)
        except Exception:
            return False

    names = [name for name in dir(unet_2d_blocks) if name.endswith("Block2D")]
    downs, ups = [[n for n in names if word in n and n != "UNetMidBlock2D"] for word in ("Down", "Up")]
    partners = {True: ("KDownBlock2D", "KUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    assert {n for n in downs if runs(n, partners[n.startswith("K")][1])} == set(DOWN_BLOCK_TYPES)
    assert {n for n in ups if runs(partners[n.startswith("K")][0], n)} == set(UP_BLOCK_TYPES)


def test_every_residual_block_is_gated():
    config = SMALL | FEATURES["resnet_resampling"]
    model = DIAUNet2DModel(**config)
    maps = model.attention_maps(*inputs(config))
    residual_blocks = {name for name, module in model.named_modules() if "Resnet" in type(module).__name__}
    residual_blocks -= {name for name in residual_blocks if name.endswith("blocks")}
    assert set(maps) == residual_blocks
    assert all(gate.shape == (2, model.get_submodule(name).out_channels) for name, gate in maps.items())
    assert next(iter(maps)) == "down_blocks.0.resnets.0"
    assert list(maps)[-1] == "up_blocks.1.resnets.1"


DIA_ARGUMENTS = [
    {"dia_attention": attention, "dia_sharing": sharing}
    for attention in ("lstm", "se", "eca", "srm", "cbam", "time")
    for sharing in ("network", "level", "block")
    if (attention, sharing) != ("lstm", "block")
] + [
    {"dia_bridge": "skip"},
    {"dia_bridge": "reset"},
    {"dia_bridge": "reset", "dia_sharing": "level"},
    {"dia_time_conditioned": False},
    {"dia_gate_slope": 4.0},
    {"dia_init": "paper", "dia_hidden_size": 16, "dia_reduction": 2},
]


@pytest.mark.parametrize("arguments", DIA_ARGUMENTS, ids=str)
def test_gradient_reaches_every_parameter(arguments):
    model = DIAUNet2DModel(**SMALL, **arguments)
    for parameter in model.dia.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.5)
    sample, timestep, _ = inputs(SMALL)
    model(sample, timestep).sample.square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    # SE's and CBAM's few hidden units may all be negative in a tiny model; nothing else may stay without gradient.
    assert [name for name in dead if ".first." not in name] == []


def test_one_step_from_identity_opens_the_gates():
    model = DIAUNet2DModel(**SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sample, timestep, _ = inputs(SMALL)
    for _ in range(2):
        optimizer.zero_grad()
        model(sample, timestep).sample.square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in model.dia.parameters())
    assert all((gate != 1).any() for gate in model.attention_maps(sample, timestep).values())


@pytest.mark.parametrize("arguments", DIA_ARGUMENTS, ids=str)
def test_save_and_load_round_trip(arguments, tmp_path):
    model = DIAUNet2DModel(**SMALL, **arguments, num_class_embeds=5).eval()
    for parameter in model.dia.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    loaded = DIAUNet2DModel.from_pretrained(tmp_path).eval()
    public = lambda config: json.loads(json.dumps({k: v for k, v in config.items() if k[0] != "_"}))  # noqa: E731
    assert public(loaded.config) == public(model.config)
    assert loaded.config.dia_hidden_size == arguments.get("dia_hidden_size", 64)
    sample, timestep, _ = inputs(SMALL)
    labels = torch.tensor([0, 4])
    with torch.no_grad():
        assert torch.equal(loaded(sample, timestep, labels).sample, model(sample, timestep, labels).sample)


def test_a_unet2dmodel_checkpoint_loads_as_dia(tmp_path):
    unet = UNet2DModel(**SMALL).eval()
    unet.save_pretrained(tmp_path)
    model = DIAUNet2DModel.from_pretrained(tmp_path)
    assert not model.training
    sample, timestep, _ = inputs(SMALL)
    with torch.no_grad():
        assert torch.equal(model(sample, timestep).sample, unet(sample, timestep).sample)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = DIAUNet2DModel(**SMALL, dia_bridge="skip", dropout=0.1)
    open_gates(model)
    sample, timestep, _ = inputs(SMALL)

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(sample, timestep).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.enable_gradient_checkpointing()
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_no_state_stays_on_the_model():
    model = DIAUNet2DModel(**SMALL).eval()
    open_gates(model)
    sample, timestep, _ = inputs(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        alone = model(sample[:1], timestep[:1]).sample
        results = [None] * 4

        def work(slot):
            torch.set_grad_enabled(False)
            results[slot] = model(sample[slot % 2 :][:1], timestep[slot % 2 :][:1]).sample

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert torch.equal(results[0], alone)
    assert torch.equal(results[2], alone)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_copy_is_independent():
    model = DIAUNet2DModel(**SMALL).eval()
    other = copy.deepcopy(model)
    open_gates(other)
    sample, timestep, _ = inputs(SMALL)
    with torch.no_grad():
        assert not torch.equal(model(sample, timestep).sample, other(sample, timestep).sample)


def test_attention_maps_agree_with_the_forward_pass():
    """Scaling each residual branch of the plain UNet by the reported gates gives the output of the DIA-UNet."""
    model = DIAUNet2DModel(**SMALL).eval()
    open_gates(model)
    sample, timestep, _ = inputs(SMALL)
    unet = model.to_unet()
    for name, gate in model.attention_maps(sample, timestep).items():
        hook = lambda module, args, output, gate=gate: output * gate[:, :, None, None]  # noqa: E731
        unet.get_submodule(name).conv2.register_forward_hook(hook)
    with torch.no_grad():
        torch.testing.assert_close(unet(sample, timestep).sample, model(sample, timestep).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dia_attention": "senet"}, "lstm, se, eca, srm, cbam"),
        ({"dia_sharing": "block"}, "no meaning"),
        ({"down_block_types": ("CrossAttnDownBlock2D",) * 2}, "Choose among: DownBlock2D"),
        ({"up_block_types": ("UpDecoderBlock2D",) * 2}, "Choose among: UpBlock2D"),
        ({"down_block_types": ("KDownBlock2D",) * 2}, "do not mix"),
        ({"in_channels": 1, "down_block_types": ("SkipDownBlock2D",) * 2}, "in_channels is 1"),
    ],
)
def test_construction_errors(arguments, words):
    with pytest.raises(UsageError, match=words):
        DIAUNet2DModel(**SMALL | arguments)


def test_from_unet_takes_dia_arguments_only():
    unet = UNet2DModel(**SMALL)
    for name in ("dia_bridg", "dropout"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            DIAUNet2DModel.from_unet(unet, **{name: 1})


def test_from_unet_does_not_lose_the_gates_of_a_model_that_has_some():
    model = DIAUNet2DModel(**SMALL)
    open_gates(model)
    sample, timestep, _ = inputs(SMALL)
    assert torch.equal(DIAUNet2DModel.from_unet(model)(sample, timestep).sample, model(sample, timestep).sample)
    with pytest.raises(UsageError, match="the weights do not fit"):
        DIAUNet2DModel.from_unet(model, dia_attention="none")


def test_call_errors():
    model = DIAUNet2DModel(**SMALL)
    with pytest.raises(UsageError, match=r"15x16 pixels.*multiples of 2"):
        model(torch.randn(1, 3, 15, 16), 1)
    with pytest.raises(UsageError, match="not class-conditional"):
        model(torch.randn(1, 3, 16, 16), 1, torch.tensor([1]))
    with pytest.raises(UsageError, match="give class_labels"):
        DIAUNet2DModel(**SMALL, num_class_embeds=3)(torch.randn(1, 3, 16, 16), 1)
    with pytest.raises(UsageError, match="no attention maps"):
        DIAUNet2DModel(**SMALL, dia_attention="none").attention_maps(torch.randn(1, 3, 16, 16), 1)
