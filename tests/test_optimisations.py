"""What torch and diffusers offer to save time or memory: the results stay those of the model without it."""

import copy
import io
import itertools
import pickle
from contextlib import suppress

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import distributed
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.attention import ATTENTIONS
from dia_diffusion.blocks import DOWN_BLOCK_TYPES, UP_BLOCK_TYPES
from dia_diffusion.errors import UsageError
from dia_diffusion.sharing import BRIDGES, INITS, SHARINGS

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "dia_hidden_size": 8,
}
PLAIN = {name: value for name, value in TINY.items() if not name.startswith("dia_")}
PAIRS = [(down, up) for down in DOWN_BLOCK_TYPES for up in UP_BLOCK_TYPES if down.startswith("K") == up.startswith("K")]
CPU = torch.device("cpu")
# Weights that diffusers' own block does not use, by the block's name.
UNUSED = {"KCrossAttnUpBlock2D": "norm_cross"}


def make(**arguments):
    """A model whose gates differ from one."""
    return open_gates(DIAUNet2DModel(**TINY | arguments))


def open_gates(model):
    for parameter in () if model.dia is None else model.dia.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(size=2):
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) * 100


def predict(model, size=2):
    with torch.no_grad():
        return model(*batch(size)).sample


def gradients(model, size=2):
    model.zero_grad()
    model(*batch(size)).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def combinations(inits=INITS):
    for attention, sharing, bridge, timed, init in itertools.product(
        (*ATTENTIONS, "none"), SHARINGS, BRIDGES, (True, False), inits
    ):
        arguments = {
            "dia_attention": attention,
            "dia_sharing": sharing,
            "dia_bridge": bridge,
            "dia_time_conditioned": timed,
            "dia_init": init,
        }
        with suppress(UsageError):  # Some have no meaning.
            yield DIAUNet2DModel(**TINY, **arguments), arguments


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- gradient checkpointing


def bytes_for_backward(model):
    """What autograd holds from the forward pass to the backward pass, without the weights."""
    held, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def hold(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        output = model(*batch(8)).sample
    assert output.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("arguments", [{}, {"dia_bridge": "skip"}, {"dia_attention": "cbam"}], ids=str)
def test_gradient_checkpointing_saves_memory_and_keeps_the_gradients(arguments):
    # Self-attention is not checkpointed, here as in UNet2DModel.
    model = make(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **arguments)
    expected, plain = gradients(model), bytes_for_backward(model)
    model.enable_gradient_checkpointing()
    assert bytes_for_backward(model) < 0.5 * plain
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    model.disable_gradient_checkpointing()
    assert bytes_for_backward(model) == plain


# ---- torch.compile and torch.export


@pytest.mark.parametrize("arguments", [{"dia_bridge": "skip"}, {"dia_attention": "cbam"}], ids=str)
def test_training_compiles_to_one_graph_for_all_batch_sizes(arguments, fresh_compiler):
    model, counter = make(**arguments), CompileCounter()
    expected = gradients(model)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend=counter)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert counter.frame_count == 1
    # The second size makes torch compile once more, for all sizes.
    for size in (3, 5, 8):
        torch.testing.assert_close(gradients(compiled, size), gradients(model, size))
    assert counter.frame_count == 2


def test_sampling_compiles_to_one_graph_for_all_batch_sizes(fresh_compiler):
    pipe, counter = DIAUNetPipeline(make(num_class_embeds=3).eval(), DDIMScheduler()), CompileCounter()
    pipe.set_progress_bar_config(disable=True)

    def images(size):
        generators = [torch.Generator().manual_seed(number) for number in range(size)]
        arguments = {"num_inference_steps": 4, "class_labels": 1, "guidance_scale": 2.0, "output_type": "latent"}
        return pipe(batch_size=size, generator=generators, **arguments).images

    expected = {size: images(size) for size in (2, 3, 5)}
    pipe.unet.compile(fullgraph=True, backend=counter)
    for size, plain in expected.items():
        torch.testing.assert_close(images(size), plain)
    assert counter.frame_count == 2


def test_a_checkpointed_model_compiles_with_its_backward_pass(fresh_compiler):
    model = make(dia_bridge="skip")
    expected = gradients(model)
    model.enable_gradient_checkpointing()
    model.compile(fullgraph=True, backend="aot_eager")
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_export_for_all_batch_sizes():
    model = make(dia_bridge="reset", dia_sharing="level").eval()
    # From 64 images on, the upsampling of diffusers goes another way.
    size = torch.export.Dim("size", min=2, max=63)
    program = torch.export.export(model, batch(), dynamic_shapes={"sample": {0: size}, "timestep": {0: size}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for number in (2, 3, 7):
        torch.testing.assert_close(predict(loaded, number), predict(model, number))


# ---- precision and memory format


def test_half_precision_is_that_of_the_unet_without_dia():
    unet = UNet2DModel(**PLAIN).eval()
    sample, timestep = batch()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = unet(sample, timestep).sample
            assert torch.equal(DIAUNet2DModel.from_unet(unet)(sample, timestep).sample, expected)
        unet = unet.to(torch.bfloat16)
        model = DIAUNet2DModel.from_unet(unet)
        assert model.dtype == torch.bfloat16
        assert torch.equal(model(sample.bfloat16(), timestep).sample, unet(sample.bfloat16(), timestep).sample)


@pytest.mark.parametrize("attention", ["lstm", "se", "eca", "srm", "cbam"])
def test_half_precision_is_near_the_full_one(attention):
    model = make(dia_attention=attention).eval()
    expected = predict(model)
    sample, timestep = batch()
    with torch.no_grad():
        half = copy.deepcopy(model).to(torch.bfloat16)(sample.bfloat16(), timestep).sample
        with torch.autocast("cpu", torch.bfloat16):
            automatic = model(sample, timestep).sample
    for output in (half, automatic):
        assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_is_that_of_the_unet_without_dia(storage):
    unet = UNet2DModel(**PLAIN).eval()
    model = DIAUNet2DModel.from_unet(unet)
    exact = predict(unet)
    for network in (unet, model):
        network.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert model.conv_in.weight.dtype == model.dia.decoders["8"].weight.dtype == storage
    assert torch.equal(predict(model), predict(unet))
    assert not torch.equal(predict(model), exact)


@pytest.mark.parametrize("attention", ["lstm", "se", "eca", "srm", "cbam", "none"])
def test_channels_last_goes_through_every_block(attention):
    model = make(dia_attention=attention).eval()
    expected, formats = predict(model), {}
    model = model.to(memory_format=torch.channels_last)

    def look(name):
        def hook(module, arguments, output):
            formats[name] = output[0].is_contiguous(memory_format=torch.channels_last)

        return hook

    for name, module in model.named_modules():
        if "Resnet" in type(module).__name__:
            module.register_forward_hook(look(name))
    sample, timestep = batch()
    with torch.no_grad():
        output = model(sample.contiguous(memory_format=torch.channels_last), timestep).sample
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert len(formats) == 8
    assert all(formats.values())


# ---- offloading, and what else diffusers sets on a model


@pytest.mark.parametrize("arguments", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offload_in_every_configuration(arguments, tmp_path):
    """Offloaded to a disk, weights are not there outside of the forward pass that needs them, also on a CPU."""
    if arguments["offload_type"] == "block_level":
        arguments = arguments | {"num_blocks_per_group": 1}
    for number, (model, configuration) in enumerate(combinations(inits=["identity"])):
        open_gates(model.eval())
        expected = predict(model)
        folder = str(tmp_path / str(number))
        model.enable_group_offload(CPU, CPU, offload_to_disk_path=folder, **arguments)
        for _ in range(2):
            assert torch.equal(predict(model), expected), configuration


def test_sequential_offload_in_every_configuration():
    """accelerate leaves no weights on a module but while its own forward pass runs."""
    for model, configuration in combinations(inits=["identity"]):
        open_gates(model.eval())
        expected = predict(model)
        cpu_offload(model, CPU, offload_buffers=True)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert torch.equal(predict(model), expected), configuration


def test_xformers_is_refused_where_it_is_missing():
    if torch.cuda.is_available():
        pytest.skip("xformers may be there")
    with pytest.raises((ModuleNotFoundError, ValueError), match="xformers"):
        make().enable_xformers_memory_efficient_attention()


def test_attention_backend_and_slicing_keep_the_output():
    model = make().eval()
    expected = predict(model)
    DDPMPipeline(model, DDPMScheduler()).enable_attention_slicing()
    model.set_attention_backend("native")
    torch.testing.assert_close(predict(model), expected)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def do_nothing(module, arguments, output):
    return None


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_gives_the_same_output(way):
    model = make(dia_bridge="skip").eval()
    model.compile(backend="eager")
    model.dia.register_forward_hook(do_nothing)
    model.requires_grad_(False)
    copied = way(model)
    expected = predict(model)
    assert torch.equal(predict(copied), expected)
    model.conv_out.weight.zero_()
    assert torch.equal(predict(copied), expected)


# ---- distributed training


def without_gradient(model):
    model(*batch()).sample.square().mean().backward()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def test_every_parameter_has_a_gradient_in_every_configuration():
    """DDP without `find_unused_parameters` needs it, from the first step on."""
    count = 0
    for model, arguments in combinations():
        assert without_gradient(model) == [], arguments
        count += 1
    assert count > 60


@pytest.mark.parametrize(("down", "up"), PAIRS)
def test_no_block_type_has_unused_weights_but_those_known(down, up):
    config = {"down_block_types": (down,) * 2, "up_block_types": (up,) * 2, "block_out_channels": (32, 32)}
    names = without_gradient(DIAUNet2DModel(**TINY | config))
    assert names == without_gradient(UNet2DModel(**PLAIN | config))
    word = UNUSED.get(down) or UNUSED.get(up)
    assert all(word in name for name in names) if word else names == []


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distributed_training(process_group, checkpointing):
    """DDP names unused parameters at the second step."""
    model = make(dia_bridge="skip")
    expected = gradients(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        for name, gradient in gradients(parallel).items():
            torch.testing.assert_close(gradient, expected[name.removeprefix("module.")], msg=name)
