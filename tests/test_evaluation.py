"""Scores of a pipeline: those of its images, computed apart."""

import torch
from diffusers import DDIMScheduler

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.digits import load_digits_dataset
from dia_diffusion.evaluation import evaluate, format_scores
from dia_diffusion.features import get_extractor
from dia_diffusion.metrics import score
from dia_diffusion.pixels import prepare_pixels
from dia_diffusion.sampling import sample_images


def test_scores_are_those_of_the_sampled_images_with_the_floor_beside_them():
    unet = DIAUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()
    pipeline = DIAUNetPipeline(unet, DDIMScheduler())
    train, held_out = (prepare_pixels(load_digits_dataset()[split], 8) for split in ("train", "test"))
    extractor = get_extractor("digits")
    scores = evaluate(pipeline, train, held_out, extractor, num_images=30, steps=2, seed=4, batch_size=7)

    images = list(sample_images(pipeline, 30, 2, seed=4, batch_size=7))
    floor = scores.pop("floor")
    assert scores == score(images, train.batches(500), extractor)
    assert floor == score(held_out.batches(500), train.batches(500), extractor)
    assert evaluate(pipeline, train, None, extractor, ("fid",), 10, 2)["floor"] is None
    table = format_scores(scores | {"floor": floor})
    assert f"| recall | {scores['recall']:.4f} | {floor['recall']:.4f} |" in table
    assert "| num_images | 30 | 360 |" in table


def test_global_random_state_does_not_matter():
    torch.manual_seed(5)
    train = prepare_pixels(load_digits_dataset()["train"], 8)
    first = score(train.batches(100, limit=300), train.batches(500), get_extractor("digits"))
    torch.manual_seed(6)
    assert score(train.batches(100, limit=300), train.batches(500), get_extractor("digits")) == first
