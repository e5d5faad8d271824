"""Tiny UNets in every configuration, and what they compute."""

import itertools
from contextlib import suppress

import torch

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.attention.modules import ATTENTIONS
from dia_diffusion.errors import UsageError
from dia_diffusion.options.attention import BRIDGES, INITS, SHARINGS

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "dia_hidden_size": 8,
}
# As small as they get, for grey digits of 8x8 pixels.
GREY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
PLAIN = {name: value for name, value in TINY.items() if not name.startswith("dia_")}


def make(**arguments):
    """A model whose gates differ from one."""
    return open_gates(DIAUNet2DModel(**TINY | arguments))


def open_gates(model):
    for parameter in () if model.dia is None else model.dia.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(size=2):
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) * 100


def predict(model, size=2):
    with torch.no_grad():
        return model(*batch(size)).sample


def gradients(model, size=2):
    model.zero_grad()
    model(*batch(size)).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def combinations(inits=INITS):
    """A fresh model for each combination of DIA's arguments that has a meaning, with these arguments."""
    choices = itertools.product(ATTENTIONS, SHARINGS, BRIDGES, (True, False), inits)
    for attention, sharing, bridge, timed, init in choices:
        arguments = {
            "dia_attention": attention,
            "dia_sharing": sharing,
            "dia_bridge": bridge,
            "dia_time_conditioned": timed,
            "dia_init": init,
        }
        with suppress(UsageError):
            yield DIAUNet2DModel(**TINY, **arguments), arguments
