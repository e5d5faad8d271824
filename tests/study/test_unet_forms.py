"""UNets that only studies have: what is attached where, that it changes nothing at first, and a run of each study."""

import importlib
import math

import pytest
import torch
import yaml

from dia_diffusion.errors import UsageError
from small_studies import COMMON
from training_runs import ROOT, fresh_state

OPTIONS = COMMON | {
    "block_out_channels": [16, 32],
    "class_conditional": True,
    "unet_arguments": {"norm_num_groups": 8},
    "dia_attention": "none",
    "max_train_steps": 2,
    "seed": 0,
}
del OPTIONS["dia_hidden_size"]


@pytest.fixture
def forms(monkeypatch):
    fresh_state()
    monkeypatch.syspath_prepend(ROOT / "studies")
    return importlib.import_module("unet_forms")


def test_gates_at_each_place_change_nothing_at_first_and_something_later(forms):
    sample, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])

    def run(unet):
        with torch.no_grad():
            return unet(sample, torch.tensor([5, 700]), labels).sample

    plain = forms.make_unet(OPTIONS | {"form": "plain"}, 1, 10)
    for form in ("branches", "before-conv2", "skips", "skips-after-down", "both"):
        unet = forms.make_unet(OPTIONS | {"form": form}, 1, 10)
        torch.testing.assert_close(run(unet), run(plain))
        own = [parameter for name, parameter in unet.named_parameters() if name.startswith("dia.")]
        assert len(list(unet.parameters())) == len(list(plain.parameters())) + len(own) > len(own) > 0
        for parameter in own:
            torch.nn.init.normal_(parameter, std=0.5)
        assert not torch.allclose(run(unet), run(plain))


@pytest.mark.parametrize("form", ["skips", "shared-half-rank"])
def test_a_form_is_trained_and_measured(forms, form, tmp_path):
    figures = forms.train(OPTIONS | {"form": form, "output_dir": str(tmp_path)})
    assert math.isfinite(figures["held_out_loss"])
    assert (figures["attention_parameters"] > 0) == (form == "skips")
    # Two levels of 16 and 32 channels: each block projects 64 numbers, and shares a matrix of half the rank.
    if form == "shared-half-rank":
        assert figures["projection_parameters"] == sum(w // 2 * (64 + w) for w in (16, 32)) + 3 * 16 + 5 * 32


@pytest.mark.parametrize("name", ["places", "shared_projection"])
def test_the_studies_name_forms(forms, name):
    study = yaml.safe_load((ROOT / "studies" / f"{name}.yaml").read_text())
    for variant in study["variants"].values():
        forms.check(study["common"] | variant)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"form": "skip"}, "no form 'skip'. Did you mean 'skips'"), ({"form": "plain", "lr": 1}, "no options named lr")],
)
def test_unknown_names_are_refused(forms, changes, words):
    with pytest.raises(UsageError, match=words):
        forms.check(OPTIONS | changes)
