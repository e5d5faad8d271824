"""The experiment with places of the gates: what is attached there, and that it changes nothing at first."""

import importlib
import json
import sys

import pytest
import torch

from dia_diffusion.data.loading import load_pixels
from dia_diffusion.study.description import load_study
from small_studies import write_study
from training_runs import ROOT, fresh_state


@pytest.fixture
def places(monkeypatch):
    fresh_state()
    monkeypatch.syspath_prepend(ROOT / "studies")
    return importlib.import_module("places")


@pytest.fixture
def study(tmp_path):
    common = {"block_out_channels": [16, 32], "class_conditional": True, "norm_num_groups": 8, "dia_attention": "none"}
    return write_study(tmp_path / "study.yaml", {"plain": {}}, common)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_gates_at_each_place_change_nothing_at_first_and_something_later(places, study, tmp_path):
    described = load_study(study)
    config = described.config("plain", 0, tmp_path)
    data, _ = load_pixels(config.data)
    sample, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    outputs, sizes = {}, {}
    for variant in places.VARIANTS:
        unet, of_attention = places.make(variant, config, data)
        with torch.no_grad():
            outputs[variant] = unet(sample, torch.tensor([5, 700]), labels).sample
        sizes[variant] = count(unet) - of_attention
        assert (of_attention > 0) == (variant not in ("plain", "depthwise"))
        if not variant.startswith("depthwise") and variant != "plain":
            for name, parameter in unet.named_parameters():
                if name.startswith("dia."):
                    torch.nn.init.normal_(parameter, std=0.5)
            with torch.no_grad():
                assert not torch.allclose(unet(sample, torch.tensor([5, 700]), labels).sample, outputs[variant])
    for variant, output in outputs.items():
        like = "depthwise" if variant.startswith("depthwise") else "plain"
        torch.testing.assert_close(output, outputs[like])
        assert sizes[variant] == sizes[like]


def test_runs_are_added_to_those_that_are_there(places, study, tmp_path, monkeypatch, capsys):
    output = tmp_path / "places.json"
    for variants in (["plain", "skips"], ["skips", "depthwise", "depthwise-dia"]):
        options = ["--variants", *variants, "--seeds", "0", "1", "--steps", "2", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["places.py", str(study), *options])
        places.main()
    results = json.loads(output.read_text())
    assert [result["variant"] for result in results] == ["plain", "skips"] * 2 + ["depthwise", "depthwise-dia"] * 2
    assert f"8 runs: python tools/published_table.py {output}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.yaml"], "cannot read the configuration 'nothing.yaml'"),
        (["study.yaml", "--seeds", "-1"], "argument --seeds: it must be at least 0, but is -1."),
        (["study.yaml", "--steps", "0"], "argument --steps: it must be at least 1, but is 0."),
    ],
)
def test_what_it_cannot_do_is_refused(places, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["places.py", *arguments, "--output", str(tmp_path / "places.json")])
    with pytest.raises(SystemExit) as refusal:
        places.main()
    assert refusal.value.code == 2
    assert words in capsys.readouterr().err


def test_runs_of_another_study_are_not_taken_for_those_of_this_one(places, study, tmp_path, monkeypatch):
    other = tmp_path / "other.yaml"
    other.write_text(study.read_text())
    for path in (study, other, study):
        arguments = ["--variants", "plain", "--seeds", "0", "--steps", "1", "--output", str(tmp_path / "places.json")]
        monkeypatch.setattr(sys, "argv", ["places.py", str(path), *arguments])
        places.main()
    assert [run["study"] for run in json.loads((tmp_path / "places.json").read_text())] == ["study", "other"]


def test_figures_of_other_settings_are_not_joined(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "studies")
    extras, output = importlib.import_module("digits_extras"), tmp_path / "extras.json"
    settings = {"steps": 3, "num_images": 5000, "sampling_steps": 20}
    output.write_text(json.dumps({"settings": settings, "distances": {"0": {"as it is": 1.0}}}))
    monkeypatch.setattr(sys, "argv", ["digits_extras.py", "--seeds", "0", "--output", str(output)])
    with pytest.raises(SystemExit) as refusal:
        extras.main()
    assert refusal.value.code == 2
    assert "is of other settings, {'steps': 3, 'num_images': 5000, 'sampling_steps': 20}" in capsys.readouterr().err
