"""Ways to call a model: twice in one forward pass, block by block, compiled, checkpointed, cast, loaded by others."""

import subprocess
import sys

import pytest
import torch
from backbones import BACKBONES, noise
from diffusers import AutoModel, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline, attach
from dia_diffusion.errors import UsageError
from tiny_unets import PLAIN, batch, make, open_gates, predict


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(torch.relu(x))


class Blocks(torch.nn.Module):
    """Residual blocks, which it checkpoints itself if `reentrant` is set."""

    def __init__(self, number=3, reentrant=None):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Residual() for _ in range(number))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def attached(model, **arguments):
    """The model with open gates on its blocks."""
    names = [name for name, module in model.named_modules() if name.endswith("conv")]
    attach(model, branches=names, hidden_size=8, **arguments)
    return open_gates(model)


# ---- twice in one forward pass


def test_a_backbone_that_is_called_twice_starts_anew():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Blocks()

        def forward(self, first, second):
            return self.backbone(first), self.backbone(second)

    model, (first, second) = Pair(), noise(2, 2, 4, 8, 8)
    model = attached(model)
    torch.testing.assert_close(model(first, second)[1], model(second, second)[0])


# ---- checkpointing that the model does itself


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_loses_the_state_is_refused(reentrant):
    model = attached(Blocks(reentrant=reentrant))
    with pytest.raises(UsageError, match=r"calls torch.utils.checkpoint itself, which recomputes 'blocks.\d.conv'"):
        model(noise(2, 4, 8, 8).requires_grad_()).sum().backward()


# ---- compiled


@pytest.mark.parametrize("order", [("plain", "attached"), ("attached", "plain"), ("plain compiled before", "attached")])
def test_a_plain_and_an_attached_model_of_one_class_compile(order, fresh_compiler):
    x, models = noise(2, 4, 8, 8), {}
    # As in a process in which nothing was attached before.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        for name in order:
            models[name] = Blocks() if name != "attached" else attached(Blocks())
            if name == "plain compiled before":
                torch.compile(models[name], backend="eager")(x)
        for model in models.values():
            expected = model(x)
            torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_blocks_that_are_compiled_one_by_one(fresh_compiler):
    model, x = attached(Blocks(12)), noise(2, 4, 8, 8)
    expected = model(x)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x), expected)


def test_an_exported_forward_is_no_mistake_and_blocks_that_were_replaced_are():
    model = UNet2DModel(**PLAIN).eval()
    expected = predict(model)
    exported = torch.export.export(model, batch()).module()
    attach(model, hidden_size=8)
    model.forward = lambda *args, **kwargs: exported(*args, **kwargs)
    torch.testing.assert_close(predict(model), expected)
    del model.forward
    for name in ("down_blocks", "mid_block", "up_blocks"):
        setattr(model, name, getattr(UNet2DModel(**PLAIN), name))
    with pytest.raises(UsageError, match="its blocks were replaced"):
        predict(model)


# ---- types, arguments, random numbers


@pytest.mark.parametrize("attention", ["lstm", "se", "eca", "srm", "cbam", "time"])
def test_layerwise_casting_to_float8_under_autocast(attention):
    """diffusers stores weights in float8 and computes in float32, and autocast makes branches of bfloat16."""
    unet = UNet2DModel(**PLAIN).eval()
    model = DIAUNet2DModel.from_unet(unet, dia_attention=attention, dia_hidden_size=8)
    sample, timestep = batch()
    for network in (unet, model):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, output = unet(sample, timestep).sample, model(sample, timestep).sample
    assert torch.equal(output, expected)
    output.float().square().mean().backward()


def test_every_parameter_has_a_gradient_where_no_level_joins_another():
    with pytest.warns(UserWarning, match="bridge 'skip' joins levels on the way up .* it does what 'carry' does"):
        model = attached(Blocks(), bridge="skip")
    model(noise(2, 4, 8, 8)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_gate_outside_of_a_forward_pass_says_that_it_does_nothing():
    model = attached(Blocks())
    with pytest.warns(UserWarning, match="branches such as 'blocks.0.conv' ran without their attention"):
        output = model.forward(noise(1, 4, 8, 8))
    assert not torch.equal(output, model(noise(1, 4, 8, 8)))


def test_what_is_no_model_or_no_input_is_refused_before_anything_changes(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(Blocks())
        with pytest.raises(UsageError, match="attach to the model before it is wrapped"):
            attach(wrapped, inputs=noise(1, 4, 8, 8))
    finally:
        distributed.destroy_process_group()
    for model in (5, lambda x: x):
        with pytest.raises(UsageError, match=r"attention is attached to a torch.nn.Module, and this is of"):
            attach(model, inputs=noise(1, 4, 8, 8))
    for arguments, words in (
        ({"inputs": 5}, "inputs must be a dict, a tuple or a tensor, but is of int"),
        ({"branches": "blocks.0.conv"}, "branches must be a list of names"),
    ):
        with pytest.raises(UsageError, match=words):
            attach(Blocks(), **arguments)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_a_convolution_over_pixels_is_refused_on_other_branches(dimensions):
    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = getattr(torch.nn, f"Conv{dimensions}d")(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x)

    model, x = Residual(), noise(2, 4, *[5] * dimensions)
    attach(model, inputs=x, attention="cbam", sharing="block")
    with pytest.raises(UsageError, match="'cbam' needs branches"):
        model(x)


@pytest.mark.parametrize("attention", ["lstm", "time"])
def test_a_unet_that_joins_the_class_to_the_time_embedding(attention):
    """As that of AudioLDM."""
    unet = UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=6,
        class_embeddings_concat=True,
    )
    inputs = {"encoder_hidden_states": noise(2, 5, 12), "class_labels": noise(2, 6)}
    expected = unet(noise(2, 4, 8, 8), 10, **inputs).sample
    attach(unet, attention=attention, hidden_size=8)
    assert torch.equal(unet(noise(2, 4, 8, 8), 10, **inputs).sample, expected)


def test_attach_leaves_the_random_state_as_it_was():
    model = BACKBONES["ResNetBackbone"].make()
    before = torch.get_rng_state()
    attach(model)
    assert torch.equal(torch.get_rng_state(), before)


# ---- loaded by others


def test_automodel_finds_the_code_of_a_saved_pipeline(tmp_path):
    unet = make().eval()
    DIAUNetPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="unet", trust_remote_code=True)
    assert torch.equal(predict(loaded), predict(unet))


def test_a_pipeline_of_diffusers_with_a_dia_unet_loads_after_the_package_alone_is_imported(tmp_path):
    DDPMPipeline(make(), DDPMScheduler()).save_pretrained(tmp_path)
    code = "import sys, dia_diffusion\nassert 'torch' not in sys.modules\nfrom diffusers import DDPMPipeline\n"
    code += f"print(type(DDPMPipeline.from_pretrained({str(tmp_path)!r}).unet).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["DIAUNet2DModel"], result.stderr
