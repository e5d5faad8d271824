"""Generated images by number, and those that are kept in files."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.data.decoding import image_to_pixels
from dia_diffusion.data.preparation import prepare_at_own_size
from dia_diffusion.data.sources import load_dataset_splits
from dia_diffusion.errors import UsageError
from dia_diffusion.sampling.generation import sample_batch
from dia_diffusion.scoring.images import PipelineImages


class Counting(DIAUNetPipeline):
    """Counts the images that it has made."""

    made = 0

    def __call__(self, batch_size=1, **arguments):
        self.made += batch_size
        return super().__call__(batch_size=batch_size, **arguments)


@pytest.fixture(params=[1, 3])
def pipeline(request):
    torch.manual_seed(0)
    unet = DIAUNet2DModel(
        sample_size=8,
        in_channels=request.param,
        out_channels=request.param,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()
    return Counting(unet, DDIMScheduler())


def test_images_in_the_folder_are_the_generated_ones_and_are_not_made_again(pipeline, tmp_path):
    plain = PipelineImages(pipeline, 10, 2, seed=3).images_at(range(10))
    kept = PipelineImages(pipeline, 10, 2, seed=3, folder=tmp_path / "images")
    torch.testing.assert_close(kept.images_at(range(10)), plain, rtol=0, atol=0)
    for number, path in enumerate(sorted((tmp_path / "images").glob("*.png"))):
        with Image.open(path) as image:
            assert (image_to_pixels(image, 8, plain.shape[1]) == plain[number].numpy()).all()
    assert pipeline.made == 20
    again = PipelineImages(pipeline, 10, 2, seed=3, folder=tmp_path / "images")
    torch.testing.assert_close(again.images_at(range(10)), plain, rtol=0, atol=0)
    assert pipeline.made == 20


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_missing_and_broken_images_are_made_again(pipeline, tmp_path, damage):
    images = PipelineImages(pipeline, 6, 2, folder=tmp_path)
    expected = images.images_at(range(6))
    path = tmp_path / "000004.png"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[: 50 if damage == "truncated" else 0])
    assert torch.equal(images.images_at(range(6)), expected)
    assert torch.equal(images.images_at(range(3)), expected[:3])
    assert pipeline.made == 12
    assert len(list(tmp_path.iterdir())) == 7


def test_of_images_that_are_not_square_the_middle_is_scored(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=(8, 16),
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
    )
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    images = PipelineImages(pipeline, 3, 2, folder=tmp_path / "images")
    assert torch.equal(images.images_at(range(3)), sample_batch(pipeline, range(3), 2)[..., 4:12])
    # As it is where the same images are read from their files.
    files = prepare_at_own_size(load_dataset_splits(train_data_dir=str(tmp_path / "images"))[0])
    assert torch.equal(files.images_at(range(3)), images.images_at(range(3)))


def test_a_full_disk_leaves_nothing_half_written(pipeline, tmp_path, monkeypatch):
    images = PipelineImages(pipeline, 2, 2, folder=tmp_path)

    def fill(image, path, format):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fill)
        with pytest.raises(OSError, match="No space left"):
            images.images_at(range(2))
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    (tmp_path / "settings.json").write_text("")
    with pytest.raises(UsageError, match="choose another"):
        PipelineImages(pipeline, 2, 2, folder=tmp_path)


@pytest.mark.parametrize("change", ["seed", "steps", "scheduler", "weights"])
def test_images_of_other_settings_are_not_taken_for_these(pipeline, tmp_path, change):
    PipelineImages(pipeline, 4, 2, folder=tmp_path).images_at(range(4))
    more = PipelineImages(pipeline, 5, 2, folder=tmp_path)
    assert len(more.images_at(range(5))) == 5
    if change == "scheduler":
        pipeline.scheduler = DDPMScheduler()
    if change == "weights":
        with torch.no_grad():
            pipeline.unet.conv_out.bias += 1
    with pytest.raises(UsageError, match="holds images of another model or other settings"):
        PipelineImages(pipeline, 4, 3 if change == "steps" else 2, seed=int(change == "seed"), folder=tmp_path)


def test_a_folder_with_something_else_is_left_alone(pipeline, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="is not empty"):
        PipelineImages(pipeline, 4, 2, folder=tmp_path)


def test_pipelines_of_diffusers_generate_as_well(pipeline):
    other = DDPMPipeline(pipeline.unet.to_unet(), DDPMScheduler())
    images = PipelineImages(other, 4, 2)
    batch = images.images_at(range(4))
    assert batch.shape == (4, pipeline.unet.config.in_channels, 8, 8)
    assert (batch[1:2].int() - images.images_at(range(1, 2))).abs().max() <= 1
    json.dumps([images.settings, images.origin])
