"""A run and gates at the ends of branches: what a model with DIA shares with the UNet2DModel that it is."""

import copy
import json
import multiprocessing
import threading

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline, attach
from dia_diffusion.errors import UsageError
from tiny_unets import PLAIN, TINY, batch, gradients, make, open_gates, predict

WEIGHTS = "diffusion_pytorch_model.safetensors"


# ---- blocks are those of diffusers


def seen_by_hooks(model):
    """For each submodule but the attention's: types and shapes of what goes in and comes out."""
    seen = {}

    def describe(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        if isinstance(value, (tuple, list)):
            return [describe(part) for part in value]
        return {k: describe(v) for k, v in value.items()} if isinstance(value, dict) else type(value).__name__

    for name, module in model.named_modules():
        if name and not name.startswith("dia"):
            module.register_forward_hook(
                lambda _, args, kwargs, output, name=name: seen.update({name: describe((args, kwargs, output))}),
                with_kwargs=True,
            )
    predict(model)
    return seen


@pytest.mark.parametrize("block", ["DownBlock2D", "AttnDownBlock2D", "SkipDownBlock2D", "KDownBlock2D"])
def test_hooks_see_what_they_see_in_unet2dmodel(block):
    config = {"down_block_types": (block,) * 2, "up_block_types": (block.replace("Down", "Up"),) * 2}
    config |= {"block_out_channels": (32, 32)}
    seen = seen_by_hooks(make(**config))
    assert seen == seen_by_hooks(UNet2DModel(**PLAIN | config))
    assert "down_blocks.1.resnets.0" in seen


def test_a_block_called_alone_is_that_of_the_plain_unet():
    unet = UNet2DModel(**PLAIN)
    model = open_gates(DIAUNet2DModel.from_unet(unet))
    features, embedding = torch.randn(2, 8, 8, 8), torch.randn(2, 32)
    for names in ("down_blocks.0.resnets.0", "down_blocks.0"):
        ours, theirs = (network.get_submodule(names)(features, embedding) for network in (model, unet))
        torch.testing.assert_close(ours, theirs)
    # Another model's forward pass is no run of this one.
    other, block = make(), model.down_blocks[0].resnets[0]
    alone, called = block(features, embedding), []
    other.conv_in.register_forward_hook(lambda *_: called.append(block(features, embedding)))
    predict(other)
    assert torch.equal(called[0], alone)


def test_a_block_that_is_left_out_does_no_harm():
    """The others keep their gates: with one module a block they are the same function of the same features."""
    model = make(dia_attention="se", dia_sharing="block", layers_per_block=2)
    whole = model.attention_maps(*batch())
    model.down_blocks[0].resnets[1].forward = lambda hidden_states, temb: hidden_states
    pruned = model.attention_maps(*batch())
    assert set(whole) - set(pruned) == {"down_blocks.0.resnets.1"}
    assert torch.equal(whole["down_blocks.0.resnets.0"], pruned["down_blocks.0.resnets.0"])
    after = {name: gate.shape for name, gate in whole.items() if name in pruned}
    assert {name: gate.shape for name, gate in pruned.items()} == after


def test_a_failed_forward_pass_leaves_no_run():
    model = make()
    expected = predict(model)
    handle = model.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(model)
    handle.remove()
    block, features = model.down_blocks[0].resnets[0], torch.randn(2, 8, 8, 8)
    plain = DIAUNet2DModel.to_unet(model).down_blocks[0].resnets[0]
    torch.testing.assert_close(block(features, torch.ones(2, 32)), plain(features, torch.ones(2, 32)))
    assert torch.equal(predict(model), expected)


# ---- threads, copies, processes


def test_threads_that_sample_with_one_model_get_the_images_they_get_alone():
    pipes = [DIAUNetPipeline(make(dia_bridge="skip").eval(), DDIMScheduler())]
    pipes += [DIAUNetPipeline(pipes[0].unet, DDIMScheduler()) for _ in range(3)]

    def sample(number):
        pipe = pipes[number]
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(number)
        return pipe(batch_size=2 + number, num_inference_steps=5, generator=generator, output_type="latent").images

    expected = [sample(number) for number in range(4)]
    results, start = [None] * 4, threading.Barrier(4)

    def work(number):
        start.wait()
        results[number] = sample(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, alone in zip(results, expected, strict=True):
        assert torch.equal(result, alone)


def answer(model, queue):
    queue.put(predict(model).numpy())


def test_a_spawned_process_gets_the_model():
    model = make(dia_bridge="skip", dia_attention="lstm").eval()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(model, queue))
    process.start()
    output = queue.get(timeout=120)
    process.join()
    torch.testing.assert_close(torch.from_numpy(output), predict(model))


def test_a_copy_has_gates_of_its_own():
    model = make().eval()
    copied = copy.deepcopy(model)
    for parameter in copied.dia.parameters():
        torch.nn.init.zeros_(parameter)
    plain = copied.to_unet()
    torch.testing.assert_close(predict(copied), predict(plain))
    assert not torch.allclose(predict(model), predict(plain))


# ---- loading


@pytest.fixture
def saved(tmp_path):
    model = make().eval()
    model.save_pretrained(tmp_path)
    return tmp_path, model


DEVICE_MAPS = {
    "all on the disk": {"": "disk"},
    "blocks on the disk": {"conv_in": "cpu", "time_embedding": "cpu", "conv_norm_out": "cpu", "conv_out": "cpu"}
    | {"down_blocks": "disk", "mid_block": "cpu", "up_blocks": "disk", "dia": "cpu"},
    "attention on the disk": {"conv_in": "cpu", "time_embedding": "cpu", "conv_norm_out": "cpu", "conv_out": "cpu"}
    | {"down_blocks": "cpu", "mid_block": "cpu", "up_blocks": "cpu", "dia": "disk"},
}


@pytest.mark.parametrize("bridge", ["carry", "skip"])
@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS)
def test_a_device_map_on_loading(tmp_path, device_map, bridge):
    model = make(dia_bridge=bridge).eval()
    model.save_pretrained(tmp_path)
    loaded = DIAUNet2DModel.from_pretrained(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert "meta" in {parameter.device.type for parameter in loaded.parameters()}
    torch.testing.assert_close(predict(loaded), predict(model))


@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS)
def test_a_device_map_on_loading_a_unet_without_dia(tmp_path, device_map):
    unet = UNet2DModel(**PLAIN).eval()
    unet.save_pretrained(tmp_path)
    loaded = DIAUNet2DModel.from_pretrained(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert torch.equal(predict(loaded), predict(unet))


@pytest.mark.parametrize("shards", [False, True])
def test_weights_of_the_attention_that_a_file_lacks_start_fresh_and_the_others_are_kept(tmp_path, shards):
    model = make().eval()
    model.save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / WEIGHTS)
    removed = [name for name in weights if name.startswith(("dia.decoders.8", "dia.initial_states"))]
    for name in removed:
        del weights[name]
    partial = DIAUNet2DModel(**TINY)
    partial.load_state_dict(weights, strict=False)
    if shards:
        # The first shard alone holds what is missing here.
        partial.save_pretrained(tmp_path / "partial", max_shard_size="20KB")
        for path in (tmp_path / "partial").glob("*.safetensors"):
            save_file({k: v for k, v in load_file(path).items() if k not in removed}, path, {"format": "pt"})
        index = tmp_path / "partial" / f"{WEIGHTS}.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = {k: v for k, v in content["weight_map"].items() if k not in removed}
        index.write_text(json.dumps(content))
    else:
        partial.save_pretrained(tmp_path / "partial")
        save_file(weights, tmp_path / "partial" / WEIGHTS, {"format": "pt"})

    loaded, info = DIAUNet2DModel.from_pretrained(
        tmp_path / "partial", output_loading_info=True, torch_dtype=torch.bfloat16
    )
    assert set(info["missing_keys"]) == set(removed)
    fresh = DIAUNet2DModel(**TINY).dia.decoders["8"]
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.bfloat16
        if name in weights:
            assert torch.equal(value, weights[name].bfloat16()), name
    assert torch.equal(loaded.dia.decoders["8"].weight.float(), fresh.weight)
    state = loaded.dia.initial_states["network"].weight
    assert state.isfinite().all()
    assert 0 < state.abs().max() <= 1 / state.shape[1] ** 0.5


# ---- half precision


def test_half_precision_is_bit_equal_at_the_start_and_finite_where_the_unet_is():
    """A mean of 4 over 128 x 128 pixels is a sum that half precision does not hold."""
    config = PLAIN | {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    unet = UNet2DModel(**config).half().eval()
    for name, parameter in unet.named_parameters():
        if name.endswith("conv2.bias"):
            torch.nn.init.constant_(parameter, 4.0)
    sample = torch.randn(1, 3, 128, 128).half()
    with torch.no_grad():
        expected = unet(sample, 10).sample
        for attention in ("lstm", "se", "eca", "srm"):
            sharing = "network" if attention == "lstm" else "block"
            model = DIAUNet2DModel.from_unet(unet, dia_attention=attention, dia_sharing=sharing)
            assert torch.equal(model(sample, 10).sample, expected), attention
            assert open_gates(model)(sample, 10).sample.isfinite().all(), attention


# ---- checkpointing


def test_running_statistics_count_a_batch_once_under_checkpointing():
    model = make(dia_attention="srm", dia_sharing="block")
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    expected = gradients(model)
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    buffers = dict(checkpointed.named_buffers())
    assert any(name.endswith("running_mean") for name in buffers)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, msg=name)


@pytest.mark.parametrize(
    "arguments", [{"dia_bridge": "skip"}, {"dia_bridge": "reset"}, {"dia_attention": "cbam"}], ids=str
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forward_passes_before_one_backward_under_checkpointing(arguments, reentrant):
    def step(model):
        first, second = model(*batch(2)).sample, model(*batch(3)).sample
        (first.square().mean() + second.mean()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    model = make(**arguments)
    expected = step(copy.deepcopy(model))

    def checkpoint(module, *args):
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=reentrant)

    model.enable_gradient_checkpointing(checkpoint)
    for name, gradient in step(model).items():
        if reentrant:
            # It adds the gradients in another order.
            torch.testing.assert_close(gradient, expected[name], msg=name)
        else:
            assert torch.equal(gradient, expected[name]), name


def test_a_sequential_model_is_refused_and_left_as_it_was():
    """It would call the attention as its last layer."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(UsageError, match="would call 'dia' too"):
        attach(model, branches=["0"])
    assert list(dict(model.named_children())) == ["0"]
    assert not model[0]._forward_hooks
