"""Attention trained by others' loops: transformers' Trainer, and accelerate with two processes."""

import pytest
import torch
from backbones import BACKBONES
from safetensors.torch import load_file
from train_in_processes import main, make_model, steps
from transformers import Trainer, TrainingArguments

from dia_diffusion import attach
from forks import start_together

CLASSIFIERS = ["ViTForImageClassification", "ResNetForImageClassification (basic)"]


@pytest.fixture(params=CLASSIFIERS)
def make(request):
    def make(attention_seed=0):
        torch.manual_seed(0)
        model = BACKBONES[request.param].make()
        model.requires_grad_(False)
        torch.manual_seed(attention_seed)
        attach(model, hidden_size=8)
        return model

    return make


def trainer(model, folder, max_steps=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 16, 16, generator=generator)
    rows = [{"pixel_values": image, "labels": number % 2} for number, image in enumerate(images)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=max_steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    return Trainer(model, arguments, train_dataset=rows)


def test_the_attention_alone_is_trained_and_resumed(make, tmp_path):
    model = make()
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer(model, tmp_path).train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("dia.") for name in changed)
    # Its weights are in the checkpoint, and one that starts from another place comes back to them.
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert {name for name in saved if name.startswith("dia.")} == {f"dia.{name}" for name in model.dia.state_dict()}
    other = make(attention_seed=1)
    assert not torch.equal(other.dia.encoders["16"].weight, before["dia.encoders.16.weight"])
    trainer(other, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


def test_two_processes_compute_what_one_computes(tmp_path):
    """Each has half of the batch, and the gradients are averaged: the weights are those of the whole batch."""
    log = tmp_path / "log"
    for process in start_together(2, main, tmp_path, output=log):
        process.join(300)
        assert process.exitcode == 0, log.read_text()
    expected = make_model()
    before = {name: value.clone() for name, value in expected.dia.state_dict().items()}
    steps(expected, slice(None))
    for number in range(2):
        found = load_file(tmp_path / f"{number}.safetensors")
        assert found.keys() == before.keys()
        for name, value in expected.dia.state_dict().items():
            torch.testing.assert_close(found[name], value, msg=name)
    assert any(not torch.allclose(before[name], value) for name, value in expected.dia.state_dict().items())
