"""What torch and diffusers offer to save time or memory: the results stay those of the model without it."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch._dynamo.testing import CompileCounter

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from tiny_unets import PLAIN, batch, combinations, gradients, make, open_gates, predict

CPU = torch.device("cpu")


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
            formats[name] = output.is_contiguous(memory_format=torch.channels_last)

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
