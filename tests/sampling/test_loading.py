"""Pipelines as commands load them: variants of the weights, pipelines of diffusers, compiled ones."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file, save_file

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.sampling.generation import (
    check_sampling,
    find_advice,
    find_classes,
    is_compiled,
    sample_batch,
    sample_images,
)
from dia_diffusion.sampling.loading import load_pipeline
from dia_diffusion.sampling.schedulers import make_scheduler
from tiny_unets import GREY


def make_pipeline():
    torch.manual_seed(0)
    return DIAUNetPipeline(DIAUNet2DModel(**GREY, dia_hidden_size=8).eval(), DDIMScheduler())


def test_a_folder_with_one_variant_of_the_weights_loads_without_its_name(tmp_path):
    pipeline = make_pipeline()
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    expected = pipeline.unet.state_dict()
    for variant in (None, "fp16"):
        loaded = load_pipeline(str(tmp_path / "half"), variant=variant).unet
        assert loaded.dtype == torch.float32
        assert all(torch.equal(tensor, expected[name].float()) for name, tensor in loaded.state_dict().items())
    with pytest.raises(UsageError, match=r"no weights of the variant bf16\. Those here: fp16"):
        load_pipeline(str(tmp_path / "half"), variant="bf16")
    out = ["--steps", "1", "--num_images", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["sample", str(tmp_path / "half"), "--variant", "fp16", *out]) == 0
    # Where there are both, those without a variant count.
    make_pipeline().save_pretrained(tmp_path / "half")
    loaded = load_pipeline(str(tmp_path / "half")).unet.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in make_pipeline().unet.state_dict().items())


def test_files_beside_the_weights_and_parts_without_the_variant_do_no_harm(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model", safe_serialization=False)
    save_file({"lora": torch.zeros(1)}, tmp_path / "model" / "unet" / "pytorch_lora_weights.safetensors")
    expected = make_pipeline().unet.state_dict()
    loaded = load_pipeline(str(tmp_path / "model")).unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("sizes", [{}, {"max_shard_size": "20KB"}], ids=["one", "shards"])
def test_pickled_weights_of_a_variant_are_found(tmp_path, sizes):
    pipeline = make_pipeline().to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16", safe_serialization=False, **sizes)
    loaded = load_pipeline(str(tmp_path / "half")).unet.state_dict()
    assert all(torch.equal(tensor.float(), loaded[name]) for name, tensor in pipeline.unet.state_dict().items())


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _drop_weights(path, prefix):
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}, path)


BROKEN = {
    "a list for an index": (lambda folder: (folder / "model_index.json").write_text("[]"), "names no pipeline class"),
    "an unknown class": (lambda folder: _edit(folder / "model_index.json", _class_name="Foo"), "no attribute Foo"),
    "another UNet": (
        lambda folder: _edit(folder / "model_index.json", unet=["diffusers", "UNet2DModel"]),
        "unet hold dia",
    ),
    "missing weights": (lambda folder: _drop_weights(folder / UNET, "conv_out."), r"lack conv_out\.\w+ \(2 missing"),
    "left-over weights": (
        lambda folder: save_file({**load_file(folder / UNET), "a.b": torch.zeros(1)}, folder / UNET),
        r"hold a\.b, for which DIAUNet2DModel has no layer",
    ),
    "text for a number": (lambda folder: _edit(folder / SCHEDULER, num_train_timesteps="9"), "cannot load a pipeline"),
    "an unknown schedule": (lambda folder: _edit(folder / SCHEDULER, beta_schedule="cosine"), "cosine is not impl"),
    "betas of another number": (lambda folder: _edit(folder / SCHEDULER, trained_betas=[0.1, 0.2]), "2 betas for 1000"),
    "a flow": (
        lambda folder: _edit(folder / SCHEDULER, use_flow_sigmas=True),
        "does not fit '.*': it does not follow the flow",
    ),
    "no index": (lambda folder: (folder / "model_index.json").rename(folder.parent / "model_index.json"), "has one"),
}
UNET, SCHEDULER = "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"


@pytest.mark.parametrize("broken", BROKEN)
def test_pipelines_that_were_edited_are_refused_in_words(tmp_path, broken):
    damage, words = BROKEN[broken]
    make_pipeline().save_pretrained(tmp_path / "model")
    load_pipeline(str(tmp_path / "model"))
    damage(tmp_path / "model")
    with pytest.raises(UsageError, match=words):
        check_sampling(load_pipeline(str(tmp_path / "model")), 4)
    if "weights" in broken:
        with pytest.raises(UsageError, match=words):
            DIAUNetPipeline.from_pretrained(tmp_path / "model")
        unet = make_pipeline().unet
        assert DIAUNetPipeline.from_pretrained(tmp_path / "model", unet=unet).unet is unet


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EDMEulerScheduler, PNDMScheduler])
def test_a_pipeline_of_ddpm_with_another_scheduler_uses_it_as_it_is_meant(tmp_path, scheduler):
    torch.manual_seed(0)
    pipeline = DIAUNetPipeline(UNet2DModel(**GREY).eval(), scheduler())
    DDPMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path)
    (images,), (expected,) = (list(sample_images(each, 2, 5)) for each in (load_pipeline(str(tmp_path)), pipeline))
    assert (images.int() - expected.int()).abs().max() <= 1


def test_classes_of_other_pipelines_are_drawn_in_turn():
    torch.manual_seed(0)
    unet = UNet2DModel(**GREY | {"num_class_embeds": 3}).eval()
    pipeline = ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())
    images = torch.cat(list(sample_images(pipeline, 4, 1, batch_size=3)))
    of_class = torch.cat(list(sample_images(pipeline, 4, 1, class_label=find_classes(pipeline, "1"))))
    assert [torch.equal(*pair) for pair in zip(images, of_class, strict=True)] == [False, True, False, False]
    several = find_classes(pipeline, ["0", "2"])
    chosen = torch.cat(list(sample_images(pipeline, 4, 1, batch_size=3, class_label=several)))
    by_hand = torch.cat([sample_batch(pipeline, [number], 1, class_label=2 * (number % 2)) for number in range(4)])
    assert torch.equal(chosen, by_hand)
    with pytest.raises(UsageError, match="3 classes, 0 to 2, and none that stands"):
        find_classes(pipeline, "none")


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
@pytest.mark.parametrize("scheduler", ["ddpm", "DDIMScheduler", "euler", "heun", "dpm_sde"])
def test_pipelines_of_diffusers_take_every_sampler(tmp_path, pipeline_class, scheduler):
    torch.manual_seed(0)
    unet, saved = UNet2DModel(**GREY).eval(), DDIMScheduler()
    pipeline_class(unet, saved).save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path), scheduler)
    assert loaded.name_or_path == str(tmp_path)
    ours = DIAUNetPipeline(unet, make_scheduler(scheduler, saved.config))
    (images,), (expected,) = (list(sample_images(pipeline, 2, 3)) for pipeline in (loaded, ours))
    assert (images.int() - expected.int()).abs().max() <= 1


def test_few_steps_of_a_sampler_for_many_are_warned_of(tmp_path, capsys):
    pipeline = DDPMPipeline(UNet2DModel(**GREY), DDPMScheduler())
    assert "DDPMScheduler is meant for 1,000 steps, and 25 give worse images" in find_advice(pipeline, 25)
    assert find_advice(pipeline, 250) is None
    assert find_advice(DDIMPipeline(pipeline.unet, DDIMScheduler()), 25) is None
    assert find_advice(make_pipeline(), 1) is None
    pipeline.save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--num_images", "1", "--output_dir", str(tmp_path / "out")]) == 0
    assert "warning: DDPMScheduler is meant for 1,000 steps" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [4, 6])
def test_models_of_many_channels_make_no_pictures(channels):
    unet = UNet2DModel(**GREY | {"in_channels": channels, "out_channels": channels})
    for pipeline in (DIAUNetPipeline(unet, DDIMScheduler()), DDIMPipeline(unet, DDIMScheduler())):
        with pytest.raises(UsageError, match=f"makes images of {channels} channels, and pictures have 1 or 3"):
            check_sampling(pipeline, 5)


def test_steps_that_a_scheduler_cannot_take_are_refused_for_any_pipeline():
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    unet = UNet2DModel(**GREY)
    for pipeline in (DIAUNetPipeline(unet, DDIMScheduler()), DDPMPipeline(unet, DDPMScheduler())):
        pipeline.scheduler = make_scheduler("kdpm2_ancestral", config)
        with pytest.raises(UsageError, match=r"num_inference_steps 5 does not fit KDPM2Anc.*not finite, whatever the"):
            check_sampling(pipeline, 5)
    rising = EulerDiscreteScheduler(use_karras_sigmas=True, sigma_min=1.0, sigma_max=0.1)
    embedded = UNet2DModel(**GREY | {"num_class_embeds": 3, "class_embed_type": "identity"})
    for pipeline, words in (
        (DIAUNetPipeline(unet, rising), "it leads from images to noise with use_karras_sigmas"),
        (DDPMPipeline(unet, DDPMScheduler(variance_type="learned")), "'learned'.*, which the UNet does not predict"),
        (ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()), "41 steps do not fit CMStoch.* than .*: 40"),
        (DIAUNetPipeline(embedded, DDIMScheduler()), r"embeddings of classes \(class_embed_type 'identity'\)"),
    ):
        with pytest.raises(UsageError, match=words):
            check_sampling(pipeline, 41)


def test_latents_of_a_vq_model_are_decoded(tmp_path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, num_vq_embeddings=4, **blocks).eval()
    pipeline = DIAUNetPipeline(UNet2DModel(**GREY).eval(), DDIMScheduler(clip_sample=False), vae=vae)
    pipeline.save_pretrained(tmp_path)
    assert sample_batch(load_pipeline(str(tmp_path)), [0], 2).tolist() == sample_batch(pipeline, [0], 2).tolist()


def test_a_compiled_model_is_compiled_once_for_all_batches():
    """The last batch is smaller, and the images are those of the model that is not compiled."""
    pipeline = DIAUNetPipeline(DIAUNet2DModel(**GREY, num_class_embeds=3).eval(), DDIMScheduler())
    expected = torch.cat(list(sample_images(pipeline, 7, 3, batch_size=3)))
    compiled = []

    def count(module, inputs):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    pipeline.unet.compile(backend=count, fullgraph=True)
    assert is_compiled(pipeline)
    images = torch.cat(list(sample_images(pipeline, 7, 3, batch_size=3)))
    assert len(compiled) == 1
    assert images.shape == expected.shape
    assert np.abs(images.numpy().astype(int) - expected.numpy()).max() <= 1
    assert len(list(sample_images(pipeline, 4, 3, batch_size=250))) == 1
