"""What models of many configurations compute, from weights that depend on their names alone.

    python tests/models/reference_outputs.py FILE.safetensors

wrote tests/data/outputs-0.1.0.safetensors, with version 0.1.0 installed. It is left as it is.
"""

import itertools
import sys
import zlib

import torch
from safetensors.torch import save_file

from dia_diffusion import DIAUNet2DModel
from dia_diffusion.errors import UsageError

SMALL = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "num_class_embeds": 3,
    "dia_hidden_size": 8,
}
DOWN = "DownBlock2D ResnetDownsampleBlock2D AttnDownBlock2D SkipDownBlock2D AttnSkipDownBlock2D".split()
UP = "UpBlock2D ResnetUpsampleBlock2D AttnUpBlock2D SkipUpBlock2D AttnSkipUpBlock2D".split()


def configurations():
    """Name and arguments: all block types with DIA, and all kinds of attention on two levels of different width."""
    pairs = [*zip(DOWN, UP, strict=True), ("KDownBlock2D", "KUpBlock2D"), ("KDownBlock2D", "KCrossAttnUpBlock2D")]
    for down, up in pairs:
        blocks = {"down_block_types": (down,) * 2, "up_block_types": (up,) * 2, "block_out_channels": (32, 32)}
        yield f"{down} {up}", blocks | {"dia_bridge": "skip"}
    choices = itertools.product(
        ("lstm", "se", "eca", "srm", "cbam", "time"),
        ("network", "level", "block"),
        ("carry", "skip", "reset"),
        (True, False),
        ("identity", "paper"),
    )
    for attention, sharing, bridge, timed, init in choices:
        yield (
            f"{attention} {sharing} {bridge} {timed} {init}",
            {
                "block_out_channels": (16, 32),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "resnet_time_scale_shift": "scale_shift" if timed else "default",
                "dia_attention": attention,
                "dia_sharing": sharing,
                "dia_bridge": bridge,
                "dia_time_conditioned": timed,
                "dia_init": init,
            },
        )


def draw(name, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def compute(arguments):
    """The output `(2, 3, 8, 8)` of a model, and for each parameter its gradient's product with numbers drawn for it."""
    model = DIAUNet2DModel(**SMALL | arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if name.startswith("dia.") or parameter.ndim == 1 else 0.1
            parameter.copy_(spread * draw(name, parameter.shape) + (parameter.ndim == 1 and "norm" in name))
    sample = model(draw("sample", (2, 3, 8, 8)), torch.tensor([3, 700]), torch.tensor([0, 2])).sample
    (sample * draw("loss", sample.shape)).mean().backward()
    products = [
        (parameter.grad * draw(f"product {name}", parameter.shape)).sum()
        for name, parameter in sorted(model.named_parameters())
        if parameter.grad is not None
    ]
    return sample.detach().contiguous(), torch.stack(products)


def compute_all():
    found = {}
    for name, arguments in configurations():
        try:
            found[f"{name}: output"], found[f"{name}: gradients"] = compute(arguments)
        except UsageError:
            continue  # A combination without a meaning.
    return found


if __name__ == "__main__":
    save_file(compute_all(), sys.argv[1])
