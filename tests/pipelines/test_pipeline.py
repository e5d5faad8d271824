"""The pipeline, and many images from it. `sampling/test_peers.py` holds it against those of diffusers."""

import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, IPNDMScheduler, UNet2DModel

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.errors import UsageError
from dia_diffusion.pipelines.noise import NoiseKind
from dia_diffusion.sampling.generation import image_generators, sample_images
from dia_diffusion.sampling.loading import load_pipeline
from dia_diffusion.sampling.schedulers import FAMILIES, make_scheduler

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def pipeline(scheduler=None, **arguments):
    unet = DIAUNet2DModel(**TINY | arguments).eval()
    for layer in unet.dia.decoders.values():
        torch.nn.init.normal_(layer.weight, std=0.1)
    return DIAUNetPipeline(unet, scheduler or DDIMScheduler())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_guidance_is_its_formula():
    pipe = pipeline(num_class_embeds=4)
    latents = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        pipe.scheduler.set_timesteps(1)
        timestep = pipe.scheduler.timesteps[0]
        with_class = pipe.unet(latents, timestep, torch.tensor([0, 2])).sample
        without = pipe.unet(latents, timestep, torch.tensor([3, 3])).sample
        expected = pipe.scheduler.step(without + 2.5 * (with_class - without), timestep, latents).prev_sample
    arguments = {"batch_size": 2, "num_inference_steps": 1, "latents": latents, "output_type": "latent"}
    guided = pipe(class_labels=[0, 2], guidance_scale=2.5, **arguments).images
    torch.testing.assert_close(guided, expected)
    assert not torch.allclose(guided, pipe(class_labels=[0, 2], **arguments).images)


def test_output_types_agree():
    pipe = pipeline()
    outputs = {
        kind: pipe(batch_size=3, num_inference_steps=2, generator=generator(), output_type=kind, return_dict=False)[0]
        for kind in ("pil", "np", "pt", "latent")
    }
    assert [image.size for image in outputs["pil"]] == [(8, 8)] * 3
    assert outputs["np"].shape == (3, 8, 8, 1)
    expected = (outputs["latent"] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(outputs["pt"], expected)
    assert np.array_equal(outputs["np"], expected.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(outputs["pil"][1]), (outputs["np"][1, ..., 0] * 255).round().astype(np.uint8))


def test_callback_changes_latents_and_can_interrupt():
    pipe = pipeline()
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append((index, int(timestep)))
        pipe._interrupt = index == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = pipe(num_inference_steps=5, callback_on_step_end=callback, output_type="latent").images
    assert seen == [(0, 800), (1, 600)]
    assert (result == 0).all()


def test_the_progress_bar_can_be_turned_off(capsys):
    pipe = pipeline()
    pipe(num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", sorted(FAMILIES[NoiseKind.BETAS].samplers))
def test_an_image_depends_on_its_seed_alone(name):
    pipe = pipeline(num_class_embeds=3)
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    one = torch.cat(list(sample_images(pipe, 5, 4, seed=1, batch_size=5)))
    split = torch.cat(list(sample_images(pipe, 5, 4, seed=1, batch_size=2)))
    assert one.dtype == torch.uint8
    assert one.shape == (5, 1, 8, 8)
    # The last bit of a float may depend on how many images are computed together.
    assert (one.int() - split.int()).abs().max() <= 1
    assert not torch.equal(one, torch.cat(list(sample_images(pipe, 5, 4, seed=2, batch_size=5))))


def test_generators_are_distinct_in_a_run_and_between_seeds():
    seeds = {g.initial_seed() for seed in range(20) for g in image_generators(seed, range(500), "cpu")}
    assert len(seeds) == 20 * 500


def test_classes_are_taken_in_turn():
    pipe = pipeline(num_class_embeds=3)
    turn = torch.cat(list(sample_images(pipe, 4, 2)))
    assert torch.equal(turn[3:], torch.cat(list(sample_images(pipe, 4, 2, class_label=1)))[3:])
    assert not torch.equal(turn[2:3], torch.cat(list(sample_images(pipe, 4, 2, class_label=1)))[2:3])


def test_save_and_load_from_any_folder(tmp_path, monkeypatch):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    expected = pipe(batch_size=2, num_inference_steps=3, generator=generator(), output_type="np").images
    for loaded in (DIAUNetPipeline.from_pretrained("model"), load_pipeline("model")):
        assert isinstance(loaded.unet, DIAUNet2DModel)
        # What `load_pipeline` changes is the order in memory, which moves the last bits.
        loaded.unet.to(memory_format=torch.contiguous_format)
        images = loaded(batch_size=2, num_inference_steps=3, generator=generator(), output_type="np").images
        assert np.array_equal(images, expected)
    assert {path.suffix for path in (tmp_path / "model" / "unet").iterdir()} == {".json", ".safetensors", ".py"}
    DDIMPipeline(UNet2DModel(**TINY), DDIMScheduler()).save_pretrained("plain")
    assert torch.cat(list(sample_images(load_pipeline("plain"), 3, 2))).shape == (3, 1, 8, 8)


def test_a_loaded_pipeline_computes_in_channels_last(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    formats = []
    for module in loaded.unet.modules():
        if isinstance(module, torch.nn.Conv2d) and module.out_channels > 1:
            module.register_forward_hook(
                lambda module, inputs, output: formats.append(
                    output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
                )
            )
    arguments = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    images = loaded(generator=generator(), **arguments).images
    assert len(formats) > 10
    assert all(formats)
    np.testing.assert_allclose(images, pipe(generator=generator(), **arguments).images, atol=1e-4)


def test_a_pickle_in_a_pipeline_is_not_executed(tmp_path):
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return trap.touch, ()

    pipeline().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        weights.with_name(name).write_bytes(pickle.dumps(Trap()))
    load_pipeline(str(tmp_path / "model"))
    weights.unlink()
    with pytest.raises(UsageError, match="cannot load a pipeline"):
        load_pipeline(str(tmp_path / "model"))
    assert not trap.exists()


def test_errors_say_what_to_do(tmp_path):
    pipe, conditional = pipeline(), pipeline(num_class_embeds=3)
    for call, words in (
        (lambda: pipe(output_type="jpeg"), "pil, np, pt, latent"),
        (lambda: pipe(class_labels=1), "not class-conditional"),
        (lambda: pipe(guidance_scale=2.0), "needs class_labels"),
        (lambda: pipe(batch_size=2, generator=[generator()]), "1 generators were given for a batch of 2"),
        (lambda: pipe(latents=torch.zeros(1, 3, 8, 8)), r"latents must have the shape \(1, 1, 8, 8\)"),
        (lambda: conditional(class_labels=5), "must lie between 0 and 2"),
        (lambda: conditional(batch_size=2, class_labels=[1]), "1 class_labels were given for a batch of 2"),
        (lambda: DIAUNetPipeline(pipe.unet, IPNDMScheduler())(), "no prediction_type"),
        (lambda: make_scheduler("best", pipe.scheduler.config), "ddpm, ddim"),
        (lambda: next(sample_images(pipe, 0, 1)), "num_images must be at least 1"),
        (lambda: next(sample_images(pipe, 1, 1, class_label=1)), "class-conditional pipeline, which this is not"),
        (lambda: next(sample_images(pipe, 1, 1, seed=-1)), "seed must be at least 0, but is -1"),
        (lambda: next(sample_images(DDPMPipeline(conditional.unet, DDPMScheduler()), 1, 1)), "needs class labels"),
        (lambda: next(sample_images(DiTPipeline(None, None, DDPMScheduler()), 1, 1)), "an unconditional pipeline"),
        (lambda: load_pipeline(str(tmp_path)), "has no model_index.json"),
    ):
        with pytest.raises(UsageError, match=words):
            call()
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="cannot load a pipeline"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    "make_unet", [lambda: pipeline().unet, lambda: UNet2DModel(**TINY).eval()], ids=["DIA", "plain"]
)
def test_pipelines_of_other_classes_are_made_from_each_other(make_unet):
    unet = make_unet()
    arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    ddpm = DDPMPipeline(unet, DDPMScheduler())
    ours = DIAUNetPipeline.from_pipe(ddpm)
    assert ours.unet is unet
    expected = ddpm(generator=generator(), **arguments).images
    np.testing.assert_allclose(ours(generator=generator(), **arguments).images, expected, atol=1e-5)
    assert DIAUNetPipeline.from_pipe(ours).scheduler is ours.scheduler
    # diffusers takes a component over where its class is the one in the signature; any other is named.
    named = {} if type(unet) is UNet2DModel else {"unet": ours.unet}
    back = DDPMPipeline.from_pipe(ours, **named)
    np.testing.assert_array_equal(back(generator=generator(), **arguments).images, expected)
