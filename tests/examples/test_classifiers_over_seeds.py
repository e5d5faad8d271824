"""The classifiers over seeds, and what a trained one leaves."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dia_diffusion import attach
from dia_diffusion.cli import main
from dia_diffusion.data.sources import load_dataset_splits
from dia_diffusion.errors import UsageError
from dia_diffusion.study.description import Study, load_study
from training_runs import ROOT

STUDIES = sorted((ROOT / "studies" / "classification").glob("*.yaml"))


def test_variants_of_a_classifier_are_a_study(tmp_path, capfd):
    common = {"depth": 8, "epochs": 1, "batch_size": 256, "augment": False}
    trainer = str(ROOT / "examples" / "image_classification.py")
    variants = {"plain": {"attention": "none"}, "shared": {"attention": "dia_paper"}}
    study = {"trainer": trainer, "baseline": "plain", "seeds": [0], "common": common, "variants": variants}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study))
    command = ["study", str(tmp_path / "small.yaml"), "--output_dir", str(tmp_path / "out"), "--jobs", "1"]
    assert main(command) == 0
    said = capfd.readouterr().out
    runs = json.loads((tmp_path / "out" / "study.json").read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [("plain", 0), ("shared", 0)]
    assert f"{runs[1]['loss'] - runs[0]['loss']:+.4f}" in said
    assert {run["options"]["augment"] for run in runs} == {False}
    assert len(runs[1]["history"]) == 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_come_with_the_project_can_be_run(path):
    study = load_study(path)
    assert set(study.scores) == {"accuracy", "loss"}
    described = yaml.safe_load(path.read_text())
    described["variants"][described["baseline"]] = {"attention": "sse"}
    del described["trainer"]
    with pytest.raises(UsageError, match="invalid choice: 'sse'"):
        Study(**described, trainer=study.trainer, directory=study.directory)


@pytest.mark.parametrize(
    "arguments", [("vit", "--depth", "2"), ("regnet", "--attention", "none")], ids=lambda words: words[0]
)
def test_a_trained_classifier_loads_as_it_was_tested(example, tmp_path, arguments):
    """By transformers alone, with the attention attached, on images as its processor prepares them."""
    arguments = ["--epochs", "2", "--output_dir", str(tmp_path), "--model", *arguments]
    assert example("image_classification").main(arguments) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    if "none" not in arguments:
        attach(model, pretrained=tmp_path / "attention")
    images = load_dataset_splits("digits")[1]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    pixels = processor([np.asarray(image)[..., None] for image in images["image"]], return_tensors="pt")
    with torch.no_grad():
        right = model(**pixels).logits.argmax(1) == torch.tensor(images["label"])
    assert right.float().mean().item() == pytest.approx(json.loads((tmp_path / "result.json").read_text())["accuracy"])


def test_a_regnet_has_no_attention_to_attach(example, tmp_path, capsys):
    arguments = ["--model", "regnet", "--attention", "se", "--output_dir", str(tmp_path / "run")]
    assert example("image_classification").main(arguments) == 2
    assert "is not of a family whose residual branches are known by name" in capsys.readouterr().err


def test_maps_are_correlated_over_all_images_and_within_classes(example, tmp_path):
    """Against numpy's correlation of the gates of two blocks, channel by channel."""
    classification = example("image_classification")
    arguments = ["--attention", "se", "--depth", "14", "--epochs", "2", "--output_dir", str(tmp_path)]
    assert classification.main(arguments) == 0
    options = classification.argparse.Namespace(model="resnet", depth=14, attention="se", branch_scale=1.0)
    model = classification.make_model(options, 8, 1, 10).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    train, test = (
        example("helpers.classification").Images(split, 8, torch.device("cpu"))
        for split in load_dataset_splits("digits")
    )
    std, mean = torch.std_mean(train.pixels.float(), (0, 2, 3), keepdim=True)
    count = min(100, *(int((test.labels == label).sum()) for label in range(10)))
    rows = torch.cat([(test.labels == label).nonzero().flatten()[:count] for label in range(10)])
    with torch.no_grad(), model.dia.record() as maps:
        model((test.pixels[rows].float() - mean) / std)
        gates = {name: gate.numpy().astype(np.float64) for name, gate in maps.items()}
    expected = {"all": [], "within_class": []}
    for a, b in (("layer1.0", "layer1.1"), ("layer2.0", "layer2.1"), ("layer3.0", "layer3.1")):
        pair = [next(gate for name, gate in gates.items() if name.startswith(block)) for block in (a, b)]
        centred = [gate - gate.reshape(10, count, -1).mean(1).repeat(count, axis=0) for gate in pair]
        for view, (x, y) in (("all", pair), ("within_class", centred)):
            expected[view] += [np.corrcoef(x[:, c], y[:, c])[0, 1] for c in range(x.shape[1])]
    found = json.loads((tmp_path / "result.json").read_text())["correlation"]
    for view, values in expected.items():
        assert found[view]["count"] == len(values)
        assert found[view]["mean"] == pytest.approx(np.mean(values), abs=1e-4)
