"""The UNet of a run, from the configurations and the weights of others."""

import json

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.errors import UsageError
from dia_diffusion.options.model import ModelOptions
from dia_diffusion.training.architecture import build_unet
from training_runs import fresh_state, run

# Configurations as they stand in well-known repositories on the Hub, with a quarter of the width; what they do not say
# did not exist when they were written.
DDPM = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
PRETRAINED = {
    "ddpm-cifar10-32": DDPM
    | {
        "block_out_channels": [32, 64, 64, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "sample_size": 32,
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    # Also the one of ddpm-church-256, ddpm-bedroom-256, ddpm-cat-256 and their ddpm-ema-* siblings.
    "ddpm-celebahq-256": DDPM
    | {
        "block_out_channels": [32, 32, 64, 64, 128, 128],
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "sample_size": 256,
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    },
    "ncsnpp-celebahq-256": DDPM
    | {
        "block_out_channels": [32, 64, 64, 64, 64, 64, 64],
        "center_input_sample": False,
        "down_block_types": ["SkipDownBlock2D"] * 4 + ["AttnSkipDownBlock2D"] + ["SkipDownBlock2D"] * 2,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "mid_block_scale_factor": 1.41421356237,
        "norm_num_groups": None,
        "sample_size": 256,
        "time_embedding_type": "fourier",
        "up_block_types": ["SkipUpBlock2D"] * 2 + ["AttnSkipUpBlock2D"] + ["SkipUpBlock2D"] * 4,
    },
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def pretrained(name="ddpm-cifar10-32"):
    return UNet2DModel.from_config(PRETRAINED[name]).eval()


def predict(unet, size=64):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float32).to(unet.dtype)
    with torch.no_grad():
        return unet(sample, torch.tensor([3, 700])).sample


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_unet_keeps_its_output(name):
    unet = pretrained(name)
    model = DIAUNet2DModel.from_unet(unet)
    assert torch.equal(predict(model), predict(unet))
    assert torch.equal(predict(model.to_unet()), predict(unet))
    assert model.config.norm_eps == 1e-6
    assert sum(p.numel() for p in model.dia.parameters()) < 0.1 * sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize("where", ["file", "folder", "pipeline"])
@pytest.mark.parametrize("name", sorted(PRETRAINED.keys() - {"ncsnpp-celebahq-256"}))
def test_a_configuration_becomes_the_same_unet_with_dia(name, where, tmp_path):
    folder = tmp_path / "unet" if where == "pipeline" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PRETRAINED[name]))
    source = folder / "config.json" if where == "file" else tmp_path
    options = ModelOptions(model_config_name_or_path=str(source), dia_bridge="skip", dropout=0.1)
    model = build_unet(options, 64, channels=3, num_classes=None)
    expected = pretrained(name)
    assert model.to_unet().state_dict().keys() == expected.state_dict().keys()
    assert model.config.dia_bridge == "skip"
    same = dict(expected.config) | {"sample_size": 64, "dropout": 0.1}
    assert {key: model.config[key] for key in same if key[0] != "_"} == {k: v for k, v in same.items() if k[0] != "_"}
    model.eval().load_state_dict(expected.state_dict(), strict=False)
    assert torch.equal(predict(model), predict(expected))


def test_the_logarithm_of_timestep_0_is_not_trained_on(tmp_path):
    """The outputs for it are not finite, and neither would be the loss of its batch."""
    unet = pretrained("ncsnpp-celebahq-256")
    sample = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        finite = unet(sample, torch.tensor([0, 1])).sample.isfinite().flatten(1).all(dim=1)
    assert finite.tolist() == [False, True]
    unet.save_config(tmp_path)
    with pytest.raises(UsageError, match="'fourier' takes the logarithm of the timestep, which can be 0"):
        build_unet(ModelOptions(model_config_name_or_path=str(tmp_path)), 64, channels=3, num_classes=None)


def test_a_configuration_with_dia_keeps_it(tmp_path):
    DIAUNet2DModel.from_unet(pretrained(), dia_attention="se", dia_hidden_size=16).save_config(tmp_path)
    options = ModelOptions(model_config_name_or_path=str(tmp_path), dia_hidden_size=24)
    model = build_unet(options, 32, channels=3, num_classes=None)
    assert (model.config.dia_attention, model.config.dia_hidden_size) == ("se", 24)


def with_old_names(unet, folder):
    """Saves as the first versions of diffusers named the weights of self-attention."""
    unet.save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for new, old in OLD_NAMES.items():
        weights = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in weights.items()}
    assert not weights.keys() & {name for name in unet.state_dict() if ".to_" in name}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("saved", ["plain", "old_names", "shards", "variant", "bin"])
def test_weights_load_however_they_were_saved(saved, tmp_path):
    unet, arguments = pretrained(), {}
    if saved == "old_names":
        with_old_names(unet, tmp_path)
    elif saved == "shards":
        unet.save_pretrained(tmp_path, max_shard_size="1MB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif saved == "variant":
        unet.save_pretrained(tmp_path, variant="ema")
        arguments["variant"] = "ema"
    else:
        unet.save_pretrained(tmp_path)
    model = DIAUNet2DModel.from_pretrained(tmp_path, **arguments)
    assert torch.equal(predict(model), predict(unet))
    assert torch.equal(
        predict(DIAUNet2DModel.from_unet(UNet2DModel.from_pretrained(tmp_path, **arguments))), predict(unet)
    )
    assert not model.training


@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": "1MB"}, {"variant": "fp16"}], ids=str)
def test_a_model_with_dia_is_saved_in_every_form(arguments, tmp_path):
    model = DIAUNet2DModel.from_unet(pretrained())
    for parameter in model.dia.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path, **arguments)
    loaded = DIAUNet2DModel.from_pretrained(tmp_path, variant=arguments.get("variant"))
    assert torch.equal(predict(loaded), predict(model))
    # A plain UNet2DModel takes the same files: it leaves out what is under "dia.".
    assert torch.equal(
        predict(UNet2DModel.from_pretrained(tmp_path, variant=arguments.get("variant"))), predict(model.to_unet())
    )


@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
def test_weights_load_in_half_precision(argument, tmp_path):
    unet = pretrained()
    unet.save_pretrained(tmp_path)
    half = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    model = DIAUNet2DModel.from_pretrained(tmp_path, **{argument: torch.bfloat16})
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(predict(model), predict(half))
    assert torch.equal(predict(DIAUNet2DModel.from_unet(half)), predict(half))


@pytest.mark.parametrize("train_only", ["dia", "all"])
def test_a_pretrained_unet_is_fine_tuned(train_only, tmp_path):
    unet = pretrained()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pretrained")
    with_old_names(unet, tmp_path / "pretrained" / "unet")
    fresh_state()
    options = {} if train_only is None else {"train_only": train_only}
    run(
        tmp_path / "run",
        init_from=str(tmp_path / "pretrained"),
        channels=3,
        block_out_channels=None,
        layers_per_block=None,
        use_ema=False,
        max_train_steps=2,
        **options,
    )
    tuned = DIAUNetPipeline.from_pretrained(tmp_path / "run").unet
    weights = tuned.to_unet().state_dict()
    changed = [name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert not changed if train_only == "dia" else len(changed) > 0.9 * len(weights)
    assert any((gate != 1).any() for gate in tuned.attention_maps(torch.randn(1, 3, 32, 32), 5).values())


def saved_unets(folder):
    """A plain UNet2DModel and one with SE, in folders of these names."""
    pretrained().save_pretrained(folder / "plain")
    DIAUNet2DModel.from_unet(pretrained(), dia_attention="se", dia_hidden_size=16).save_pretrained(folder / "se")
    return str(folder / "plain"), str(folder / "se")


def test_what_is_given_about_a_saved_model_is_obeyed_or_refused(tmp_path):
    plain, se = saved_unets(tmp_path)

    def build(**options):
        return build_unet(ModelOptions(**options), 32, channels=3, num_classes=None)

    for source in (plain, se):
        unet = build(init_from=source, dropout=0.3, layers_per_block=2, block_out_channels=[32, 64, 64, 64])
        assert unet.config.dropout == 0.3
        assert {block.dropout.p for block in unet.modules() if hasattr(block, "time_emb_proj")} == {0.3}
        for name, value in {
            "layers_per_block": 7,
            "block_out_channels": [32, 32],
            "resnet_time_scale_shift": "scale_shift",
            "norm_num_groups": 8,
        }.items():
            options = {"unet_arguments": {name: value}} if name == "norm_num_groups" else {name: value}
            with pytest.raises(UsageError, match=f"{name} .* does not fit the loaded model, which has"):
                build(init_from=source, **options)
    assert build(init_from=plain).config.dia_attention == "lstm"
    assert build(init_from=plain, dia_attention="eca").config.dia_attention == "eca"
    assert build(init_from=se).config.dia_attention == "se"
    with pytest.raises(UsageError, match="dia_attention lstm does not fit the loaded model, which has se"):
        build(init_from=se, dia_attention="lstm")
    # The default, asked for.
    config = str(tmp_path / "se" / "config.json")
    assert build(model_config_name_or_path=config).config.dia_attention == "se"
    assert build(model_config_name_or_path=config, dia_attention="lstm").config.dia_attention == "lstm"


def test_the_record_of_a_run_says_what_the_model_is(tmp_path):
    _, se = saved_unets(tmp_path)
    fresh_state()
    options = {"init_from": se, "channels": 3, "block_out_channels": None, "layers_per_block": None}
    options |= {"dia_hidden_size": None, "max_train_steps": 2, "use_ema": False}
    run(tmp_path / "run", **options)
    record = yaml.safe_load((tmp_path / "run" / "training_config.yaml").read_text())
    assert (record["dia_attention"], record["dia_hidden_size"]) == ("se", 16)
    assert "(`se`, sharing `network`)" in (tmp_path / "run" / "README.md").read_text()
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    assert json.loads(state.read_text())["config"]["dia_attention"] == "se"


def test_a_model_that_learned_the_variance_or_is_of_another_class_is_refused(tmp_path):
    UNet2DModel.from_config(PRETRAINED["ddpm-cifar10-32"] | {"out_channels": 6}).save_pretrained(tmp_path)
    for name in ("init_from", "model_config_name_or_path"):
        with pytest.raises(UsageError, match="predicts 6 channels for images of 3"):
            build_unet(ModelOptions(**{name: str(tmp_path)}), 32, channels=3, num_classes=None)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    for name in ("init_from", "model_config_name_or_path"):
        with pytest.raises(UsageError, match="is a UNet2DConditionModel"):
            build_unet(ModelOptions(**{name: str(tmp_path)}), 32, channels=3, num_classes=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_out_channels": [10, 20]}, "multiples of norm_num_groups"),
        ({"unet_arguments": {"norm_num_groups": 0}}, "no UNet can be built"),
        ({"unet_arguments": {"norm_num_groups": "many"}}, "norm_num_groups in unet_arguments must be a whole number"),
        ({"unet_arguments": {"act_fn": "loud"}}, "no UNet can be built as asked"),
        ({"unet_arguments": {"time_embedding_type": "sine"}}, "must be one of positional, fourier, learned"),
        ({"unet_arguments": {"time_embedding_type": "learned"}}, "no UNet can be built as asked"),
        (
            {"unet_arguments": {"time_embedding_type": "learned", "num_train_timesteps": 10}},
            "knows 10 timesteps .*fewer than --ddpm_num_steps 1000",
        ),
        ({"unet_arguments": {"center_input_sample": "perhaps"}}, "must be true or false"),
        ({"unet_arguments": {"class_embed_type": "timestep"}}, "class_embed_type 'timestep' has no"),
    ],
)
def test_a_unet_that_cannot_be_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        build_unet(ModelOptions(**({"block_out_channels": [32, 32]} | options)), 8, channels=1, num_classes=None)
