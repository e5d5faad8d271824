import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from torch import nn

from dia_diffusion import attach
from dia_diffusion.errors import UsageError

QUICK = ["--depth", "8", "--epochs", "1"]


@pytest.fixture
def classify(example, tmp_path):
    def run(*arguments):
        folder = tmp_path / "run"
        assert example("image_classification").main([*QUICK, "--output_dir", str(folder), *arguments]) == 0
        return json.loads((folder / "result.json").read_text())

    return run


@pytest.mark.parametrize(("name", "depths"), [("BasicBlock", (8, 20, 32)), ("Bottleneck", (11, 20, 164))])
def test_a_resnet_has_the_depth_that_it_is_given(example, name, depths):
    resnet = example("helpers.cifar_resnet")
    block = getattr(resnet, name)
    for depth in depths:
        model = resnet.ResNet(block, depth, channels=3, classes=10)
        layers = [
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear) and "downsample" not in name
        ]
        assert len(layers) == depth
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(UsageError, match=r"n \+ 2 for this block, but is 21"):
        resnet.ResNet(block, 21, channels=3, classes=10)


def test_resnet20_has_the_parameters_of_the_literature(example):
    """269,722 (Idelbayev's table of ResNets for CIFAR-10), and two projections, which it does without."""
    resnet = example("helpers.cifar_resnet")
    model = resnet.ResNet(resnet.BasicBlock, 20, channels=3, classes=10)
    assert sum(p.numel() for p in model.parameters()) == 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize(("name", "depth", "end"), [("BasicBlock", 8, "bn2"), ("Bottleneck", 11, "bn3")])
def test_gates_are_behind_the_last_norm_and_before_the_shortcut(example, name, depth, end):
    resnet = example("helpers.cifar_resnet")
    model = resnet.ResNet(getattr(resnet, name), depth, channels=3, classes=10).eval()
    dia = attach(model, **example("image_classification").ATTENTIONS["dia_paper"])
    assert list(dia.config.ends) == [f"layer{stage}.0.{end}" for stage in (1, 2, 3)]
    seen = {}
    model.layer2[0].register_forward_hook(lambda block, inputs, output: seen.update(x=inputs[0], y=output))
    with dia.record() as maps:
        model(torch.randn(2, 3, 16, 16))
    block, branch = model.layer2[0], seen["x"]
    for number in range(1, int(end[-1]) + 1):
        branch = branch.relu() if number > 1 else branch
        branch = block.get_submodule(f"bn{number}")(block.get_submodule(f"conv{number}")(branch))
    expected = (branch * maps["layer2.0"][:, :, None, None] + block.downsample(seen["x"])).relu()
    torch.testing.assert_close(seen["y"], expected)


def test_augmentation_cuts_out_of_a_black_border_and_flips(example):
    pixels = torch.arange(1, 3 * 4 * 4 * 20 + 1).reshape(20, 3, 4, 4) % 251 + 1
    images = example("helpers.classification").Images.__new__(example("helpers.classification").Images)
    images.pixels, images.labels = pixels.to(torch.uint8), torch.arange(20)
    rows = torch.randperm(20)
    plain = list(images.batches(rows, 8, None))
    assert [len(batch) for batch, _ in plain] == [8, 8, 4]
    assert torch.equal(torch.cat([labels for _, labels in plain]), rows)
    assert torch.equal(torch.cat([batch for batch, _ in plain]), images.pixels[rows])
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch, _ in plain)

    padded = np.pad(images.pixels.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    places = []
    for batch, labels in images.batches(rows, 8, torch.Generator().manual_seed(0)):
        for image, label in zip(batch.numpy(), labels, strict=True):
            found = [
                (top, left, flipped)
                for top in range(9)
                for left in range(9)
                for flipped in (False, True)
                for cut in [padded[label, :, top : top + 4, left : left + 4]]
                if np.array_equal(image, cut[:, :, ::-1] if flipped else cut)
            ]
            assert found
            places += found[:1]
    assert len(set(places)) > 10
    assert {flipped for *_, flipped in places} == {False, True}


def test_it_learns_and_leaves_its_result(example, classify, tmp_path):
    result = classify("--epochs", "3")
    assert result["accuracy"] > 0.8  # 0.1 by chance
    assert [result["accuracy"], result["loss"]] == [
        result["history"][-1]["test_accuracy"],
        result["history"][-1]["test_loss"],
    ]
    assert len(result["history"]) == result["options"]["epochs"] == 3
    assert result["options"]["attention"] == "dia_paper"
    assert Pillow.open(tmp_path / "run" / "curves.png").size == (1080, 480)


def test_variants_of_a_seed_start_from_the_same_weights_and_see_the_same_images(classify):
    """Gates that start at 1, and stay there without a learning rate, change nothing."""
    frozen = ["--learning_rate", "0", "--augment"]
    plain, shared, other = (
        classify(*frozen, *arguments)
        for arguments in (
            ("--attention", "none"),
            ("--attention", "dia_network"),
            ("--attention", "none", "--seed", "1"),
        )
    )
    assert plain["history"] == shared["history"] != other["history"]
    assert plain["attention_parameters"] == 0
    assert shared["attention_parameters"] == shared["parameters"] - plain["parameters"] > 0


@pytest.mark.parametrize(("model", "depth"), [("resnet", 8), ("resnet_bottleneck", 11)])
def test_a_branch_scale_is_a_constant_gate_at_first(example, model, depth):
    """With branches at 0.5, and gates of 0.5 behind branches as they are, a fresh ResNet answers the same."""
    module, images, answers = example("image_classification"), torch.randn(2, 3, 16, 16), []
    for attention, scale in (("se", 1.0), ("none", 0.5)):
        torch.manual_seed(0)
        options = Namespace(model=model, depth=depth, attention=attention, branch_scale=scale)
        network = module.make_model(options, 16, 3, 10).eval()
        for name, parameter in network.named_parameters():
            if name.startswith("dia."):
                nn.init.zeros_(parameter)  # sigmoid(0)
        with torch.no_grad():
            answers.append(network(images))
    torch.testing.assert_close(*answers)


def test_a_branch_scale_is_for_resnets(example, capsys):
    assert example("image_classification").main(["--model", "vit", "--branch_scale", "0.5"]) == 2
    assert "--branch_scale 0.5 is for resnet and resnet_bottleneck, not for vit" in capsys.readouterr().err


def test_no_two_attentions_are_the_same_model(example):
    """Of the same weights each makes something else, but the one whose gates start at 1."""
    module, outputs = example("image_classification"), {}
    resnet, images = example("helpers.cifar_resnet"), torch.randn(2, 3, 16, 16)
    for name, arguments in module.ATTENTIONS.items():
        torch.manual_seed(0)
        model = resnet.ResNet(resnet.BasicBlock, 14, channels=3, classes=10).eval()
        if arguments is not None:
            attach(model, **arguments)
        with torch.no_grad():
            outputs[name] = model(images)
    same = {tuple(sorted((a, b))) for a in outputs for b in outputs if a != b and torch.equal(outputs[a], outputs[b])}
    assert same == {("dia_network", "none")}


def test_parameters_of_the_attention(classify):
    """Of ResNet-14, two blocks each of 16, 32 and 64 channels."""
    se = classify("--depth", "14", "--attention", "se")["attention_parameters"]
    assert se == 2 * sum(2 * c * (c // 4) + c // 4 + c for c in (16, 32, 64))
    dia = classify("--depth", "14", "--attention", "dia_paper")["attention_parameters"]
    assert dia == sum(2 * (c * c // 4 + c // 4 + c // 4 * 4 * c + 4 * c) for c in (16, 32, 64))


@pytest.mark.parametrize(
    "arguments", [("resnet_bottleneck", "--depth", "11"), ("vit", "--depth", "2")], ids=lambda words: words[0]
)
def test_other_models(classify, arguments):
    result = classify("--attention", "dia_network", "--epochs", "3", "--model", *arguments)
    assert result["attention_parameters"] > 0
    losses = [line["train_loss"] for line in result["history"]]
    assert losses[2] < losses[1] < losses[0] - 0.05


def test_images_of_a_folder(classify, example, tmp_path, capsys):
    for split in ("train", "test"):
        for number in range(6):
            path = tmp_path / "images" / split / f"class {number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Pillow.fromarray(pixels).save(path)
    result = classify("--train_data_dir", str(tmp_path / "images"), "--resolution", "12", "--batch_size", "4")
    assert result["accuracy"] in (0, *(pytest.approx(n / 6) for n in range(1, 7)))

    (tmp_path / "images" / "test").rename(tmp_path / "elsewhere")
    arguments = ["--train_data_dir", str(tmp_path / "images" / "train"), "--output_dir", str(tmp_path / "other")]
    assert example("image_classification").main(arguments) == 2
    assert "no split to test on" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_grey_images_are_tested_as_the_colour_images_that_were_trained_on(example):
    grey = Pillow.fromarray(np.full((8, 8), 7, dtype=np.uint8))
    features = Features({"image": Image(), "label": Value("int64")})
    split = Dataset.from_dict({"image": [grey] * 2, "label": [0, 1]}, features)
    images = example("helpers.classification").Images(split, 8, torch.device("cpu"), channels=3)
    assert torch.equal(images.pixels, torch.full((2, 3, 8, 8), 7, dtype=torch.uint8))
