"""What the Hub reads in the card of a trained model."""

import ast
import re
import shlex

import pytest
from huggingface_hub import ModelCard

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.options.training import TrainingConfig, as_yaml, parse_arguments
from dia_diffusion.training.card import training_command, write_model_card

SCORES = {"fid": 1.5, "kid_mean": 0.25, "kid_std": 0.1, "precision": 0.75, "recall": 0.5}
FIGURES = {"step": 7, "global_batch_size": 8, "loss": 0.5, "held_out_loss": 0.25}


@pytest.fixture(scope="module")
def unet():
    return DIAUNet2DModel(
        8, 1, 1, down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[32]
    )


def write(folder, unet, figures=None, hub_id=None, class_names=None, **options):
    options = {"dataset_name": "uoft-cs/cifar10", "resolution": 8, "output_dir": str(folder)} | options
    config = TrainingConfig.from_flat(**options)
    write_model_card(config, unet, FIGURES | (figures or {}), "denoising diffusion", class_names, hub_id)
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
    # A distance in other features than those of Inception is no FID.
    names = {"fid": "frechet_distance_pixels", "kid_mean": "kid_mean_pixels", "precision": "precision_pixels"}
    expected = {name: SCORES[key] for key, name in names.items()} | {"recall_pixels": SCORES["recall"]}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == expected
    data = write(tmp_path, unet, scores | {"features": "inception", "kid_mean": float("nan")}).data.to_dict()
    (result,) = data["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["fid", "precision", "recall"]


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
    assert "held out loss: 0.25000" in card.text
    text = write(tmp_path, unet, hub_id="me/faces").text
    assert text.count('from_pretrained("me/faces"') == 2


def test_names_are_shown_as_they_are(tmp_path, unet):
    """Names of classes and folders come from users: they are text, and neither markup nor code."""
    folder = tmp_path / 'a "b" *c*'
    folder.mkdir()
    names = ["<script>alert(1)</script>", "line\n---\n# heading", "[link](x) `code`", "a | b", "R&D"]
    text = write(folder, unet, class_names=names).text
    assert "0 &lt;script&gt;alert(1)&lt;/script&gt;, 1 line --- \\# heading, 2 \\[link\\](x) \\`code\\`" in text
    assert "3 a \\| b, 4 R&amp;D." in text
    assert '# a "b" \\*c\\*\n' in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        (name,) = [node.value for node in ast.walk(ast.parse(code)) if isinstance(getattr(node, "value", None), str)]
        assert name == folder.name


@pytest.mark.parametrize(
    "options",
    [
        {"dataset_name": "uoft-cs/cifar10", "resolution": 32, "max_train_steps": 100, "dia_time_conditioned": False},
        {
            "dataset_name": "digits",
            "resolution": 8,
            "max_train_steps": 9,
            "score_features": "digits",
            "score_num_images": 9,
        }
        | {"unet_arguments": {"norm_num_groups": 4}, "block_out_channels": [8, 16], "layers_per_block": 1}
        | {"class_conditional": False, "use_ema": False, "checkpoints_total_limit": 3},
        {"dataset_name": "digits", "resolution": 8, "num_epochs": 3},
        {"dataset_name": "me/faces", "objective": "edm", "sigma_data": 0.4, "num_epochs": 3, "random_flip": True},
        {"dataset_name": "digits", "objective": "flow", "num_epochs": 3},
    ],
)
def test_the_command_makes_the_run_again(options, tmp_path, monkeypatch):
    """Whatever started the run: the command is made from its record."""
    monkeypatch.chdir(tmp_path)
    config = TrainingConfig.from_flat(**options, output_dir="faces", cache_dir=str(tmp_path))
    (tmp_path / "training_config.yaml").write_text(as_yaml(config))
    program, command, *flags = shlex.split(training_command(config))
    assert (program, command) == ("dia", "train")
    again, expected = parse_arguments(flags).public_dict(), config.public_dict()
    if "--config" not in flags:
        assert str(tmp_path) not in " ".join(flags)
        expected["cache_dir"] = None
    if expected["max_train_steps"] is not None:
        del again["num_epochs"], expected["num_epochs"]
    assert again == expected


def test_the_command_names_processes_and_no_folder_of_this_machine(tmp_path):
    (tmp_path / "my images").mkdir()
    config = TrainingConfig.from_flat(train_data_dir=str(tmp_path / "my images"), hub_token="secret", push_to_hub=True)
    words = shlex.split(training_command(config, num_processes=2))
    assert words == [
        *("accelerate", "launch", "--num_processes", "2", "-m", "dia_diffusion.train"),
        *("--train_data_dir", "my images"),
    ]
