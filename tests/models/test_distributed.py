"""Distributed training with DDP: it needs a gradient for every parameter, in every configuration."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.models.unet import DOWN_BLOCK_TYPES, UP_BLOCK_TYPES
from tiny_unets import PLAIN, TINY, batch, combinations, gradients, make

PAIRS = [(down, up) for down in DOWN_BLOCK_TYPES for up in UP_BLOCK_TYPES if down.startswith("K") == up.startswith("K")]
# Weights that diffusers' own block does not use, by the block's name.
UNUSED = {"KCrossAttnUpBlock2D": "norm_cross"}


def without_gradient(model):
    model(*batch()).sample.square().mean().backward()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def test_every_parameter_has_a_gradient_in_every_configuration():
    """DDP without `find_unused_parameters` needs it, from the first step on."""
    count = 0
    for model, arguments in combinations():
        assert without_gradient(model) == [], arguments
        count += 1
    assert count > 60


@pytest.mark.parametrize(("down", "up"), PAIRS)
def test_no_block_type_has_unused_weights_but_those_known(down, up):
    config = {"down_block_types": (down,) * 2, "up_block_types": (up,) * 2, "block_out_channels": (32, 32)}
    names = without_gradient(DIAUNet2DModel(**TINY | config))
    assert names == without_gradient(UNet2DModel(**PLAIN | config))
    word = UNUSED.get(down) or UNUSED.get(up)
    assert all(word in name for name in names) if word else names == []


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distributed_training(process_group, checkpointing):
    """DDP names unused parameters at the second step."""
    model = make(dia_bridge="skip")
    expected = gradients(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        for name, gradient in gradients(parallel).items():
            torch.testing.assert_close(gradient, expected[name.removeprefix("module.")], msg=name)
