"""Write an AutoencoderKL that loses nothing: its scaled latents are each pixel's colours times an orthogonal matrix.

    python tools/lossless_vae.py FOLDER [--channels 3]

A model that is trained on its latents has the same task as one that is trained on pixels, so that what they reach can
be compared (docs/latents.md). An AutoencoderKL ends in a normalisation and a SiLU; around them it is linear when its
residual branches are zero. Two large constants beside the signal fix what the normalisation divides by, and a large
offset keeps the SiLU where it is the identity.
"""

import argparse
import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

# Beside signals of about 1: the square of their ratio is what is lost, and so is the precision of float32 times it.
_CONSTANT = 300.0
_OFFSET, _GAIN = 40.0, 5.0
# Of the latents before they are scaled, as other VAEs have them.
_SHIFT, _SCALE = 0.3, 4.0


def lossless_vae(channels: int) -> AutoencoderKL:
    """Make an AutoencoderKL whose latents have the shape of the images `(B, C, H, W)`."""
    # Each signal, its negative, and the constant with both signs: their mean is zero.
    width = 2 * channels + 2
    vae = AutoencoderKL(
        channels,
        channels,
        block_out_channels=(width,),
        latent_channels=channels,
        norm_num_groups=1,
        scaling_factor=_SCALE,
        shift_factor=_SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    turn, _ = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)))
    for half, matrix, shift in ((vae.encoder, turn, 0.0), (vae.decoder, turn.T * _SCALE, _SHIFT)):
        for name, parameter in half.named_parameters():
            if ".conv2." in name:
                nn.init.zeros_(parameter)
        _read(half.conv_in, matrix, shift)
        _normalise(half.conv_norm_out, channels, width)
        _write(half.conv_out, channels)
    vae.encoder.conv_out.weight[:channels] /= _SCALE
    vae.encoder.conv_out.bias[:channels] = _SHIFT
    # The second half of what the encoder says is the logarithm of the variance.
    vae.encoder.conv_out.bias[channels:] = -30.0
    return vae.eval()


def _read(layer: nn.Conv2d, matrix: Tensor, shift: float) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    channels = len(matrix)
    layer.weight[:channels, :, 1, 1] = matrix
    layer.weight[channels : 2 * channels, :, 1, 1] = -matrix
    layer.bias[:channels] = -shift * matrix.sum(1)
    layer.bias[channels : 2 * channels] = shift * matrix.sum(1)
    layer.bias[-2], layer.bias[-1] = _CONSTANT, -_CONSTANT


def _normalise(layer: nn.GroupNorm, channels: int, width: int) -> None:
    deviation = _CONSTANT * math.sqrt(2 / width)
    nn.init.constant_(layer.weight, _GAIN * deviation)
    nn.init.constant_(layer.bias, _OFFSET)
    # What is constant has done its work.
    layer.weight[2 * channels :] = 0.0


def _write(layer: nn.Conv2d, channels: int) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    for channel in range(channels):
        layer.weight[channel, channel, 1, 1] = 1 / (2 * _GAIN)
        layer.weight[channel, channels + channel, 1, 1] = -1 / (2 * _GAIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--channels", type=int, default=3)
    options = parser.parse_args()
    with torch.no_grad():
        lossless_vae(options.channels).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
