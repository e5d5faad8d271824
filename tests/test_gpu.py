"""What only a GPU can show. Everything here is skipped where there is none."""

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.sampling.generation import image_generators, sample_images
from dia_diffusion.sampling.schedulers import make_scheduler
from dia_diffusion.training import loop
from training_runs import fresh_state, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU was found (torch.cuda.is_available())")

GPU = torch.device("cuda")
UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CONFIGURATIONS = [
    {},
    {"dia_bridge": "skip"},
    {"dia_bridge": "reset", "dia_sharing": "level"},
    {"dia_attention": "srm"},
    {"dia_attention": "cbam", "dia_sharing": "block"},
]


@pytest.fixture(autouse=True)
def full_precision():
    """The CPU has no TF32 to compare with; for convolutions it is the default of a GPU."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(**arguments):
    """A model on the CPU whose gates differ from one."""
    model = DIAUNet2DModel(**UNET | arguments).eval()
    for parameter in model.dia.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(model, size=2):
    generator = torch.Generator().manual_seed(size)
    sample = torch.randn(size, 3, 16, 16, generator=generator)
    return sample.to(model.device, model.dtype), torch.arange(size, device=model.device) * 100


def predict(model, size=2):
    with torch.no_grad():
        return model(*batch(model, size)).sample


def on_gpu(model, dtype=torch.float32):
    return copy.deepcopy(model).to(GPU, dtype=dtype)


def assert_near(output, expected, tolerance):
    """Within a share of the largest value."""
    difference = (output.float().cpu() - expected.float().cpu()).abs().max()
    assert difference <= tolerance * expected.abs().max()


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_the_gpu_computes_what_the_cpu_computes(arguments, dtype):
    model = make(**arguments)
    output = predict(on_gpu(model, dtype))
    assert output.dtype == dtype
    assert_near(output, predict(model), TOLERANCES[dtype])
    maps = on_gpu(model).attention_maps(*batch(on_gpu(model)))
    for name, gate in model.attention_maps(*batch(model)).items():
        assert_near(maps[name], gate, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_fresh_model_computes_what_the_unet_computes(dtype):
    unet = UNet2DModel(**UNET).eval().to(GPU, dtype=dtype)
    torch.testing.assert_close(predict(DIAUNet2DModel.from_unet(unet)), predict(unet))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    model = make()
    with torch.autocast("cuda", dtype):
        output = predict(on_gpu(model))
    assert_near(output, predict(model), TOLERANCES[dtype])


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_channels_last(arguments):
    model = on_gpu(make(**arguments))
    expected = predict(model)
    model = model.to(memory_format=torch.channels_last)
    sample, timestep = batch(model)
    with torch.no_grad():
        output = model(sample.contiguous(memory_format=torch.channels_last), timestep).sample
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_near(output, expected, 1e-4)


def gradients(model):
    model.zero_grad()
    model(*batch(model)).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_has_the_same_gradients(checkpointing, fresh_compiler):
    model = on_gpu(make(dia_bridge="skip"))
    expected = gradients(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.compile(fullgraph=True)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def draw(pipe, size=2):
    """The same noise wherever the pipeline runs, and whatever the size of the batch."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 5, "output_type": "latent"}
    return pipe(batch_size=size, generator=image_generators(0, range(size), "cpu"), **arguments).images


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_compiled_sampling_gives_the_same_images(mode, scheduler, fresh_compiler):
    """`reduce-overhead` replays CUDA graphs."""
    model = make(dia_bridge="skip").to(GPU)
    pipe = DIAUNetPipeline(model, make_scheduler(scheduler, DDIMScheduler().config))
    expected = draw(pipe)
    model.compile(fullgraph=True, mode=mode)
    for _ in range(3):
        assert_near(draw(pipe), expected, 1e-3)


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_a_forward_pass_can_be_captured_as_a_cuda_graph(arguments):
    """Capturing fails where something waits for the GPU or copies from the CPU."""
    model = on_gpu(make(**arguments))
    sample, timestep = batch(model)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            model(sample, timestep)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = model(sample, timestep).sample
    other = torch.randn(sample.shape, generator=torch.Generator().manual_seed(9)).to(GPU)
    sample.copy_(other)
    timestep.fill_(321)
    graph.replay()
    with torch.no_grad():
        expected = model(other, timestep).sample
    assert_near(output, expected, 1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_in_every_precision(precision, tmp_path):
    """With fp16 the gradients are scaled; steps that overflow are left out."""
    fresh_state()
    options = {"mixed_precision": precision, "dia_bridge": "skip"}
    run(tmp_path / "run", max_train_steps=12, **options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 2 for line in lines if "loss" in line)
    pipe = DIAUNetPipeline.from_pretrained(tmp_path / "run").to(GPU)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}
    assert draw(pipe).isfinite().all()
    # It goes on, with the scale that it had.
    fresh_state()
    run(tmp_path / "run", max_train_steps=15, resume_from_checkpoint="latest", **options)


OBJECTIVES = [{}, {"objective": "edm", "mixed_precision": "bf16"}, {"objective": "flow"}]


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_nothing_waits_for_the_gpu_between_lines_of_the_log(options, tmp_path, monkeypatch):
    """With fp16 the scaler waits at each step, to find out whether gradients overflowed."""
    step, accumulate_gradients = 0, loop.accumulate_gradients

    def watched(*arguments):
        nonlocal step
        step += 1
        # The first steps bring tables and the state of the optimizer to the GPU.
        torch.cuda.set_sync_debug_mode("error" if step > 2 and step % 6 else "default")
        return accumulate_gradients(*arguments)

    monkeypatch.setattr(loop, "accumulate_gradients", watched)
    fresh_state()
    try:
        run(tmp_path / "run", max_train_steps=12, logging_steps=6, validation_steps=6, checkpointing_steps=6, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step == 12


def test_model_cpu_offload():
    pipe = DIAUNetPipeline(make(dia_bridge="skip", num_class_embeds=3), DDIMScheduler())
    expected = draw(pipe.to(GPU))
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    output = draw(pipe)
    assert output.device.type == "cuda"
    assert_near(output, expected, 1e-4)
    assert pipe.unet.device.type == "cpu"


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize(
    "offload",
    [
        {"offload_type": "leaf_level"},
        {"offload_type": "leaf_level", "use_stream": True},
        {"offload_type": "block_level", "num_blocks_per_group": 1},
    ],
    ids=str,
)
def test_group_offload(arguments, offload):
    model = make(**arguments)
    expected = predict(on_gpu(model))
    sample, timestep = batch(on_gpu(model))
    model.enable_group_offload(GPU, torch.device("cpu"), **offload)
    # With a stream, the first pass finds out the order of the modules.
    for _ in range(2):
        with torch.no_grad():
            assert_near(model(sample, timestep).sample, expected, 1e-4)


def test_layerwise_casting():
    unet = UNet2DModel(**UNET).eval().to(GPU, dtype=torch.bfloat16)
    model = DIAUNet2DModel.from_unet(unet)
    for network in (unet, model):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.conv_in.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(predict(model), predict(unet))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm_sde"])
def test_images_depend_on_their_seed_alone(scheduler):
    """Neither on the size of the batch nor, but for rounding, on the device."""

    def images(device, batch_size):
        pipe = DIAUNetPipeline(model.to(device), make_scheduler(scheduler, DDIMScheduler().config))
        return torch.cat(list(sample_images(pipe, 5, 4, seed=1, batch_size=batch_size))).int()

    model = make(num_class_embeds=3)
    together = images(GPU, 5)
    assert (together - images(GPU, 2)).abs().max() <= 1
    assert (together - images("cpu", 5)).abs().max() <= 2
