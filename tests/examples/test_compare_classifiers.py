"""The classifiers over seeds, and what a trained one leaves."""

import json
import statistics
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dia_diffusion import attach
from dia_diffusion.data.sources import load_dataset_splits
from training_runs import ROOT

STUDIES = ROOT / "studies" / "classification"
VARIANTS = {"plain": {"attention": "none"}, "shared": {"attention": "dia_paper"}}
COMMON = {"depth": 8, "epochs": 1, "batch_size": 256, "augment": False}


@pytest.fixture
def study(tmp_path):
    def write(**changes):
        path = tmp_path / "small.yaml"
        variants = VARIANTS | {"impossible": {"depth": 9}}
        described = {"baseline": "plain", "seeds": [0, 1], "common": COMMON, "variants": variants}
        path.write_text(yaml.safe_dump(described | changes))
        return [str(path), "--output_dir", str(tmp_path / "runs")]

    return write


def test_variants_are_paired_by_seed_and_finished_runs_are_kept(example, study, tmp_path, capsys):
    main = example("compare_classifiers").main
    assert main(study()) == 1
    said = capsys.readouterr().out
    assert said.count("--depth must be 6n + 2 for this block, but is 9.") == 2
    runs = json.loads((tmp_path / "runs" / "study.json").read_text())["runs"]
    assert [(run["variant"], run["options"]["seed"]) for run in runs] == [
        ("plain", 0), ("plain", 1), ("shared", 0), ("shared", 1)
    ]  # fmt: skip
    losses = [run["loss"] for run in runs]
    difference = statistics.mean([losses[2] - losses[0], losses[3] - losses[1]])
    row = next(line for line in said.splitlines() if line.startswith("| shared "))
    assert f"| {difference:+.4f} [" in row
    assert f"| {statistics.mean(losses[2:]):.4f} |" in row

    # Once more without the variant that failed: nothing is left to do.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    assert main(study(variants=VARIANTS)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    with pytest.raises(SystemExit):
        main(study(variants=VARIANTS, common=COMMON | {"depth": 14}))
    assert "was trained with other options" in capsys.readouterr().err


def test_a_second_process_is_refused(example, study, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".lock"), pytest.raises(SystemExit):
        example("compare_classifiers").main(study())
    assert "another process is at work in" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no death signal")
def test_a_kill_ends_its_workers_too(study, tmp_path):
    options = study(common=COMMON | {"epochs": 10_000}, variants=VARIANTS, seeds=[0])
    script = str(ROOT / "examples" / "compare_classifiers.py")
    process = subprocess.Popen([sys.executable, script, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, log = time.monotonic() + 120, tmp_path / "runs" / "plain" / "seed-0" / "log.txt"
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    "path", sorted((ROOT / "studies" / "classification").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_options_of_the_studies_that_come_with_the_project_are_known(example, path, tmp_path, capsys):
    """A depth that there is not is noticed after all options, and before any work."""
    compare, classification = example("compare_classifiers"), example("image_classification")
    study = compare.load(path)
    for variant in study["variants"]:
        words = compare.command_line(study, variant, study["seeds"][0], tmp_path)
        assert classification.main([*words, "--dataset_name", "digits", "--model", "resnet", "--depth", "9"]) == 2
        assert "--depth must be 6n + 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "other"}, "the baseline 'other' must be one of the variants"),
        ({"variants": ["plain"]}, "the baseline 'plain' must be one of the variants"),
        ({"seeds": []}, "seeds must be a list of numbers"),
    ],
    ids=["baseline", "variants", "seeds"],
)
def test_a_description_that_cannot_work_is_refused(example, study, changes, words, capsys):
    with pytest.raises(SystemExit) as end:
        example("compare_classifiers").main(study(**changes))
    assert end.value.code == 2
    assert words in capsys.readouterr().err


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
    assert "no residual blocks that are known" in capsys.readouterr().err


def test_maps_are_correlated_over_all_images_and_within_classes(example, tmp_path):
    """Against numpy's correlation of the gates of two blocks, channel by channel."""
    classification = example("image_classification")
    arguments = ["--attention", "se", "--depth", "14", "--epochs", "2", "--output_dir", str(tmp_path)]
    assert classification.main(arguments) == 0
    options = classification.argparse.Namespace(model="resnet", depth=14, attention="se", branch_scale=1.0)
    model = classification.make_model(options, 8, 1, 10).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    train, test = (
        example("helpers.images_in_memory").Images(split, 8, torch.device("cpu"))
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
