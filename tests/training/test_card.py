"""What the Hub reads in the card of a trained model."""

import pytest
from huggingface_hub import ModelCard

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.options.training import TrainingConfig
from dia_diffusion.training.card import write_model_card

SCORES = {"fid": 1.5, "kid_mean": 0.25, "kid_std": 0.1, "precision": 0.75, "recall": 0.5}
FIGURES = {"step": 7, "global_batch_size": 8, "loss": 0.5, "held_out_loss": 0.25}


@pytest.fixture(scope="module")
def unet():
    return DIAUNet2DModel(
        8, 1, 1, down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[32]
    )


def write(folder, unet, figures=None, hub_id=None, **options):
    options = {"dataset_name": "uoft-cs/cifar10", "resolution": 8} | options
    config = TrainingConfig.from_flat(**options)
    start_from, license = config.model.init_from, config.output.license
    figures = FIGURES | (figures or {})
    write_model_card(folder, unet, figures, "the command", config.data, start_from, license, hub_id)
    return ModelCard.load(folder / "README.md")


def test_metadata(tmp_path, unet):
    scores = SCORES | {"features": "pixels", "num_images": 100}
    data = write(tmp_path, unet, scores, license="mit", init_from="google/ddpm-cifar10-32").data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["license"] == "mit"
    assert data["datasets"] == ["uoft-cs/cifar10"]
    assert data["base_model"] == "google/ddpm-cifar10-32"
    assert "dia-diffusion" in data["tags"]
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert model["name"] == tmp_path.name
    assert result["task"]["type"] == "unconditional-image-generation"
    assert result["dataset"] == {"name": "uoft-cs/cifar10", "type": "uoft-cs/cifar10"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        name: SCORES[name] for name in ("fid", "kid_mean", "precision", "recall")
    }


def test_only_what_the_hub_can_link_is_linked(tmp_path, unet):
    folder = tmp_path / "run"
    folder.mkdir()
    for options in (
        {"dataset_name": "digits", "init_from": str(tmp_path)},
        {"dataset_name": str(tmp_path)},
        {"dataset_name": None, "train_data_dir": str(tmp_path)},
    ):
        card = write(folder, unet, **options)
        assert "datasets" not in card.data.to_dict()
        assert "base_model" not in card.data.to_dict()
        assert str(tmp_path.parent) not in card.content


def test_text_shows_samples_and_both_ways_to_load(tmp_path, unet):
    card = write(tmp_path, unet)
    assert "![samples](samples.png)" in card.text
    assert f'DIAUNetPipeline.from_pretrained("{tmp_path.name}")' in card.text
    assert f'DiffusionPipeline.from_pretrained("{tmp_path.name}", trust_remote_code=True)' in card.text
    assert "the command" in card.text
    assert "held out loss: 0.25000" in card.text
    text = write(tmp_path, unet, hub_id="me/faces").text
    assert text.count('from_pretrained("me/faces"') == 2
