"""A few training steps of an attached model, in one process or in one of two: for `test_trainer.py`."""

import torch
from accelerate import Accelerator
from backbones import BACKBONES, noise
from safetensors.torch import save_file

from dia_diffusion import attach
from tiny_unets import open_gates

SIZE = 4


def make_model():
    torch.manual_seed(0)
    # It has no batch normalisation, which would see the half of each process alone.
    model = BACKBONES["ViTForImageClassification"].make()
    attach(model, hidden_size=8)
    model.requires_grad_(False)
    open_gates(model).dia.requires_grad_(True)
    return model


def steps(model, part, accelerator=None):
    attention = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(attention, lr=0.1)
    images, labels = noise(SIZE, 3, 16, 16)[part], torch.arange(SIZE)[part] % 2
    for _ in range(3):
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        if accelerator is None:
            loss.backward()
        else:
            accelerator.backward(loss)
        optimizer.step()


def main(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = accelerator.prepare(make_model())
    half = SIZE // 2
    number = accelerator.process_index
    steps(model, slice(number * half, (number + 1) * half), accelerator)
    weights = accelerator.unwrap_model(model).dia.state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / f"{number}.safetensors")
    # The process group must outlive the distributed model, and end before Python does.
    accelerator.wait_for_everyone()
    del model
    accelerator.free_memory()
    accelerator.end_training()
