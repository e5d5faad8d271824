"""Arguments of a call of the pipeline: labels, callbacks, sizes, and what is refused before the first step."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.callbacks import SDCFGCutoffCallback

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.errors import UsageError
from tiny_unets import GREY, TINY

TEXT_UNET = {"block_out_channels": (8,), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
TEXT_UNET |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    unet = DIAUNet2DModel(**GREY, num_class_embeds=4).eval()
    names = {0: "7", 1: "cat", 2: "3"}
    pipeline = DIAUNetPipeline(unet, DDIMScheduler(), names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipe, labels, count=2, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipe(count, 2, generator, class_labels=labels, output_type="np", **arguments).images


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ("7", [0, 0]),
        (["7", "3"], [0, 2]),
        (["cat", 2], [1, 2]),
        ("2", [2, 2]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor(1), [1, 1]),
        (np.int64(1), [1, 1]),
        ("none", [3, 3]),
        (None, [3, 3]),
    ],
    ids=str,
)
def test_classes_go_by_name_or_number(pipe, labels, numbers):
    assert np.array_equal(images(pipe, labels), images(pipe, torch.tensor(numbers)))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[1], [2]], r"one label for each image, but \[\[1\], \[2\]\] is a list of lists"),
        (torch.tensor([[1], [2]]), "list of lists"),
        (1.0, "a whole number or the name of a class, but 1.0 is neither"),
        ([0, True], "but True is neither"),
        (torch.tensor([0.0, 1.0]), "but 0.0 is neither"),
        ([0, None], "but None is neither"),
        (b"01", "but b'01' is neither"),
        ("dog", "no class named 'dog'; its classes are: 7, cat, 3"),
        ("cta", "Did you mean 'cat'"),
        ("11", r"must lie between 0 and 3, where 3 means no class, but one is 11\."),
        ([0, 1, 2], "3 class_labels were given for a batch of 2"),
        (-1, "must lie between 0 and 3"),
    ],
    ids=str,
)
def test_labels_that_are_none_are_refused_in_words(pipe, labels, words):
    with pytest.raises(UsageError, match=words):
        images(pipe, labels)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, but is 0"),
        ({"batch_size": 2.0}, "batch_size must be a whole number, but is 2.0"),
        ({"batch_size": True}, "batch_size must be a whole number, but is True"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, but is 2.5"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, but is 0"),
        ({"eta": float("inf")}, "eta must be a finite number, but is inf"),
        ({"generator": 5}, "generator must be a torch.Generator or a list of them, but is 5"),
        ({"generator": (torch.Generator(),)}, "generator must be a torch.Generator or a list"),
        ({"latents": np.zeros((1, 3, 8, 8))}, "latents must be a tensor"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, but is 3"),
        ({"callback_on_step_end": lambda *given: given[-1]["latents"]}, "must return a dict, but returned Tensor"),
        ({"callback_on_step_end": lambda *given: {"latents": None}}, "latents as a tensor, but returned NoneType"),
        ({"callback_on_step_end_tensor_inputs": "noise"}, r"only 'latents', not \['noise'\]"),
        ({"latents": torch.full((1, 1, 8, 8), torch.nan)}, "latents hold values that are not finite"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1, 3, 4, 4)}}, r"another shape, \(1, 3, 4, 4\)"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number, but is '2'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, but is nan"),
    ],
    # Functions and generators have another address in each process.
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_another_kind_are_refused_in_words(pipe, arguments, words):
    with pytest.raises(UsageError, match=words):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"unet": None}, "a UNet2DModel as its unet, but has NoneType"),
        ({"unet": UNet2DConditionModel(**TEXT_UNET)}, "a UNet2DModel as its unet, but has UNet2DConditionModel"),
        ({"scheduler": None}, "a scheduler as its scheduler, but has NoneType"),
        ({"scheduler": DDIMScheduler}, "a scheduler as its scheduler, but has DDIMScheduler"),
        ({"unet": DIAUNet2DModel(**TINY | {"sample_size": None})}, "has no sample_size"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_a_pipeline_without_one_of_its_parts_says_so(pipe, parts, words):
    pipe = DIAUNetPipeline(**pipe.components, id2label=["cat", "dog"])
    assert pipe.class_names == ["cat", "dog"]
    for name, part in parts.items():
        setattr(pipe, name, part)
    with pytest.raises(UsageError, match=words):
        pipe()


def test_callbacks_see_and_set_what_diffusers_documents(pipe):
    seen = []

    def stop_guiding(pipeline, index, timestep, tensors):
        assert tensors["latents"].dtype == torch.float32
        seen.append((pipeline.num_timesteps, pipeline.guidance_scale, pipeline.do_classifier_free_guidance))
        pipeline._guidance_scale = 1.0
        return {}

    changed = images(pipe, "cat", guidance_scale=4.0, callback_on_step_end=stop_guiding)
    assert seen == [(2, 4.0, True), (2, 1.0, False)]
    assert not pipe.interrupt
    assert not np.array_equal(changed, images(pipe, "cat", guidance_scale=4.0))
    assert not np.array_equal(changed, images(pipe, "cat"))

    def interrupt(pipeline, index, timestep, tensors):
        pipeline._interrupt = True
        return {}

    images(pipe, "cat", callback_on_step_end=interrupt)
    assert pipe.interrupt
    # Text embeddings, which this callback of diffusers asks for.
    with pytest.raises(UsageError, match=r"can be given only 'latents', not \['prompt_embeds'\]"):
        pipe(callback_on_step_end=SDCFGCutoffCallback())


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_tensors_of_many_channels_are_no_pictures(channels):
    unet = DIAUNet2DModel(**TINY | {"in_channels": channels, "out_channels": channels})
    pipe = DIAUNetPipeline(unet, DDIMScheduler())
    with pytest.raises(UsageError, match=f"images of {channels} channels are no pictures"):
        pipe(num_inference_steps=1)
    assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, channels)


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_that_overflows_in_half_precision_decodes_in_float32(upcast):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, force_upcast=upcast)
    unet = DIAUNet2DModel(**TINY | {"in_channels": 4, "out_channels": 4})
    pipe = DIAUNetPipeline(unet, DDIMScheduler(clip_sample=False), vae=vae).to(torch.float16)
    seen = []
    pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    pipe(num_inference_steps=1, output_type="pt")
    assert seen == [torch.float32 if upcast else torch.float16]
    assert pipe.vae.dtype == torch.float16
